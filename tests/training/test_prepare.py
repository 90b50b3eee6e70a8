"""`fromage prepare`: what it fetches, how politely, what it reports, and how it goes on after a kill."""

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modeling_fromage.images_fromage import UnreadableImageError, load_rgb_image
from modeling_fromage.io.fetching import fetch
from tests.helpers.captioned_data import number_in, picture
from training.data import fetching
from training.data.captioned_images import load_captioned_images
from training.prepare import main

COUNT = 24


class Server(ThreadingHTTPServer):
    """Pictures by number under /N; `answers` gives other numbers what they say, a status or contents, once each."""

    daemon_threads = True

    def __init__(self, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay, self.answers, self.asked = delay, {}, []
        self.active = self.most = 0
        self.lock = threading.Lock()

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.server_port}/{number}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, number = self.server, int(self.path[1:])
        with server.lock:
            server.asked.append(number)
            server.active += 1
            server.most = max(server.most, server.active)
        time.sleep(server.delay)
        answer = server.answers.get(number, [picture(number)])
        answer = answer.pop(0) if len(answer) > 1 else answer[0]
        self.send_response(answer if isinstance(answer, int) else 200)
        with server.lock:
            server.active -= 1
        self.end_headers()
        if isinstance(answer, bytes):
            self.wfile.write(answer)


@contextmanager
def serving(delay: float = 0.0):
    with Server(delay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "_FIRST_WAIT", 0.05)
    with serving() as server:
        yield server


def write_table(path, server, count: int = COUNT):
    path.write_text("".join(f"picture {number}\t{server.url(number)}\n" for number in range(count)))
    return path


def prepare(tmp_path, *options: str) -> dict:
    always = ["--allow-private-addresses", "--shard-size=10", "--threads=4"]
    return main([str(tmp_path / "Train_GCC.tsv"), str(tmp_path / "shards"), *always, *options])


def captions_of(folder) -> dict[int, str]:
    rows = list(load_captioned_images(str(folder), streaming=True))
    found = {number_in(row["image"]): row["caption"] for row in rows}
    assert len(found) == len(rows)
    return {number: found[number] for number in sorted(found)}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_table_becomes_shards(kind, server, tmp_path, capsys):
    table = write_table(tmp_path / "Train_GCC.tsv", server)
    with table.open("ab") as file:
        file.write(b"a\tb\tc\n" + b"not utf-8 \xff\thttp://x.org\n" + f" \t{server.url(99)}\n".encode() + b"alone\n")
    server.answers |= {3: [404], 5: [b"no picture"], 7: [503, 429, picture(7)], 9: [500], 11: [b""]}
    report = prepare(tmp_path, f"--format={kind}", "--retries=2")
    good = [number for number in range(COUNT) if number not in (3, 5, 9, 11)]
    one = (lambda text: [text]) if kind == "parquet" else (lambda text: text)
    assert captions_of(tmp_path / "shards") == {number: one(f"picture {number}") for number in good}
    assert report["rows"] == COUNT + 4 == report["images"] + sum(report["failures"].values())
    assert report["failures"] == {
        "no image": 2,
        "malformed row": 2,
        "HTTP 404": 1,
        "HTTP 500": 1,
        "empty caption": 1,
        "no URL": 1,
    }
    assert Counter(server.asked)[7] == 3 and Counter(server.asked)[9] == 3 and Counter(server.asked)[3] == 1
    listed = [json.loads(line) for line in (tmp_path / "shards/.reports/failures.jsonl").read_text().splitlines()]
    assert [(row["place"].rpartition(" ")[2], row["reason"]) for row in listed][:2] == [
        ("4", "HTTP 404"),
        ("6", "no image"),
    ]
    assert listed[0]["url"] == server.url(3)
    assert "20  images in 3 shards" in capsys.readouterr().out

    server.asked.clear()
    assert prepare(tmp_path, f"--format={kind}") == report and server.asked == []
    server.answers = {}
    again = prepare(tmp_path, f"--format={kind}", "--retry-failed")
    assert sorted(set(server.asked)) == [3, 5, 9, 11] and again["images"] == COUNT
    assert list(captions_of(tmp_path / "shards")) == list(range(COUNT))
    assert len(load_captioned_images(str(tmp_path / "shards"))) == COUNT  # without streaming too
    with pytest.raises(SystemExit):
        prepare(tmp_path, f"--format={kind}", "--size=4")
    assert "size None, not 4. Give another folder" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on(server, tmp_path):
    write_table(tmp_path / "Train_GCC.tsv", server)
    server.delay = 0.05
    child = os.fork()
    if not child:
        try:
            prepare(tmp_path)
        finally:
            os._exit(1)
    while not (tmp_path / "shards/.reports/00000.json").is_file():
        time.sleep(0.01)
    time.sleep(0.08)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = {path.name for path in (tmp_path / "shards").iterdir()}
    assert "00000.tar" in left and "00002.tar" not in left
    server.asked.clear()
    assert prepare(tmp_path)["images"] == COUNT
    assert not set(server.asked) & set(range(10))
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        ".reports",
        "00000.tar",
        "00001.tar",
        "00002.tar",
    }
    assert list(captions_of(tmp_path / "shards")) == list(range(COUNT))


def test_no_host_is_asked_for_too_much(server, tmp_path):
    write_table(tmp_path / "Train_GCC.tsv", server, 8)
    server.delay = 0.03
    prepare(tmp_path, "--per-host=2", "--threads=8")
    assert server.most == 2
    (tmp_path / "other").mkdir()
    write_table(tmp_path / "other/Train_GCC.tsv", server, 4)
    start = time.monotonic()
    prepare(tmp_path / "other", "--pause=0.1")
    assert time.monotonic() - start >= 0.3


def test_larger_images_are_made_smaller(server, tmp_path):
    write_table(tmp_path / "Train_GCC.tsv", server, 3)
    report = prepare(tmp_path, "--size=4")
    assert report["images"] == 3
    images = [row["image"] for row in load_captioned_images(str(tmp_path / "shards"))]
    assert [load_rgb_image(image).size for image in images] == [(4, 4)] * 3


def test_limits_hold(server, tmp_path, capsys):
    write_table(tmp_path / "Train_GCC.tsv", server, 2)
    assert prepare(tmp_path, "--max-bytes=10")["failures"] == {"too large": 2}
    table, folder = str(tmp_path / "Train_GCC.tsv"), str(tmp_path / "public")
    assert main([table, folder])["failures"] == {"private address": 2}
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.tsv"), folder])
    assert "There is no file" in capsys.readouterr().err


def write_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_hostile_rows_fail_alone(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    cut = "cut \ud83d"
    hostile = {
        "caption is not Unicode": {"image": "a.png", "caption": [cut, 5]},
        "empty caption": {"image": "a.png", "caption": [5, None, " "]},
        "malformed URL": {"image": "a\0.png", "caption": "x"},
        "not found": {"image": "none.png", "caption": "x"},
    }
    rows = [
        *hostile.values(),
        {"image": "a.png", "caption": cut},
        {"image": f"{cut}.png", "caption": "x"},
        {"image": "data:image/png,\ud83d", "caption": "x"},
        {"image": "a.png", "caption": ["a", 5, cut]},
    ]
    table = write_rows(tmp_path / "t.jsonl", rows)
    report = main([table, str(tmp_path / "out"), f"--format={kind}"])
    assert report["images"] == 1 and report["failures"] == {
        "caption is not Unicode": 2,
        "malformed URL": 3,
        "empty caption": 1,
        "not found": 1,
    }
    assert captions_of(tmp_path / "out") == {1: ["a"]}


def test_local_files_keep_to_the_limits(tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    for place in (folder / "a.png", tmp_path / "secret.png"):
        place.write_bytes(picture(1))
    os.mkfifo(folder / "fifo.png")
    (folder / "large.png").write_bytes(picture(1) + bytes(5000))
    images = ("a.png", "fifo.png", "large.png", "../secret.png", str(tmp_path / "secret.png"), str(folder / "a.png"))
    table = write_rows(folder / "t.jsonl", [{"image": image, "caption": "x"} for image in images])
    report = main([table, str(tmp_path / "out"), "--max-bytes=4000"])
    expected = {"not a regular file": 1, "too large": 1}
    assert report["images"] == 2 and report["failures"] == {"outside the table's folder": 2, **expected}
    report = main([table, str(tmp_path / "out"), "--max-bytes=4000", "--retry-failed", "--allow-outside-paths"])
    assert report["images"] == 4 and report["failures"] == expected


def test_whatever_reading_an_image_raises_is_about_that_image(tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("of a decoder")

    monkeypatch.setattr(fetching, "load_rgb_image", broken)
    (tmp_path / "a.png").write_bytes(picture(1))
    table = write_rows(tmp_path / "t.jsonl", [{"image": "a.png", "caption": "x"}])
    assert main([table, str(tmp_path / "out")])["failures"] == {"broken": 1}
    with pytest.raises(UnreadableImageError, match="broken data: URL"):
        fetch("data:image/png,\ud83d")
