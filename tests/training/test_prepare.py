"""`fromage prepare`: what it fetches, how politely, what it reports, and how it goes on after a kill."""

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modeling_fromage.images_fromage import ImageLimits, UnreadableImageError, load_rgb_image
from modeling_fromage.io.fetching import BusyHostError, fetch
from tests.helpers.captioned_data import number_in, picture
from training.data import fetching
from training.data.captioned_images import load_captioned_images
from training.data.fetching import Fetcher
from training.prepare import main

COUNT = 24


class Server(ThreadingHTTPServer):
    """Pictures by number under /N; `answers` gives other numbers what they say, once each: a status, one with a
    `Retry-After`, or contents."""

    daemon_threads = True

    def __init__(self, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay, self.answers, self.asked, self.times = delay, {}, [], []
        self.active = self.most = 0
        self.lock = threading.Lock()

    def url(self, number: int, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{number}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, number = self.server, int(self.path[1:])
        with server.lock:
            server.asked.append(number)
            server.times.append(time.monotonic())
            server.active += 1
            server.most = max(server.most, server.active)
        time.sleep(server.delay)
        answer = server.answers.get(number, [picture(number)])
        answer = answer.pop(0) if len(answer) > 1 else answer[0]
        status, retry_after = answer if isinstance(answer, tuple) else (answer, None)
        self.send_response(status if isinstance(status, int) else 200)
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
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


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_host_is_left_alone_for_as_long_as_it_asks(kind, server, tmp_path):
    """And no other one waits for it."""
    urls = [server.url(0), server.url(1), *(server.url(number, "localhost") for number in range(2, 6))]
    table = tmp_path / "Train_GCC.tsv"
    table.write_text("".join(f"picture {number}\t{url}\n" for number, url in enumerate(urls)))
    server.answers[0] = [(429, "1" if kind == "seconds" else in_seconds(2)), picture(0)]
    report = prepare(tmp_path, "--threads=2", "--per-host=1", "--pause=0.05")
    assert report["images"] == 6
    first = server.asked.index(0)
    asked = list(zip(server.asked, server.times, strict=True))
    assert all(when - server.times[first] >= 0.9 for number, when in asked[first + 1 :] if number < 2)
    assert all(when - server.times[first] < 0.9 for number, when in asked if number >= 2)


def test_a_host_that_asks_for_too_long_is_not_asked_again(server, tmp_path):
    write_table(tmp_path / "Train_GCC.tsv", server)
    server.answers = {number: [(503, in_seconds(7200))] for number in range(COUNT)}
    start = time.monotonic()
    report = prepare(tmp_path, "--per-host=1")
    assert report["failures"] == {"HTTP 503": COUNT} and time.monotonic() - start < 5
    assert len(server.asked) == 1  # of all three shards
    rows = [json.loads(line) for line in (tmp_path / "shards/.reports/failures.jsonl").read_text().splitlines()]
    assert all("not waited for beyond 300 s" in row["detail"] for row in rows)
    server.answers = {}
    assert prepare(tmp_path, "--retry-failed")["images"] == COUNT


def test_a_host_that_is_always_busy_is_given_up(server, tmp_path):
    """Each wait is short, all of them are not."""
    write_table(tmp_path / "Train_GCC.tsv", server, 10)
    server.answers = {number: [(429, "1")] for number in range(10)}
    report = prepare(tmp_path, "--per-host=1", "--max-wait=1.5")
    assert report["failures"] == {"HTTP 429": 10} and len(server.asked) == 2


def test_failures_that_lie_far_apart_give_no_host_up():
    fetcher = Fetcher(ImageLimits(), max_wait=10.0)
    queue = fetching._Queue([(0, "http://a.example/0")], fetcher)
    queue.note("a.example", BusyHostError("0", "HTTP 500"), attempt=0)
    fetcher.busy["a.example"].until -= 1000
    queue.note("a.example", BusyHostError("0", "HTTP 500"), attempt=0)
    assert queue.refusal("a.example", "http://a.example/0") is None
    queue.note("a.example", b"a picture", attempt=0)  # that was asked for before
    assert fetcher.busy["a.example"].until > time.monotonic()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("120", 120), ("9" * 5000, math.inf), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 2015 07:28:00", 0)]
    + [(header, None) for header in ("", "soon", "-5", "\u00b2", "Wed, 21 Oct 99999 07:28:00 GMT")],
)
def test_what_a_host_may_ask_for(header, seconds, server):
    server.answers[0] = [(429, header)]
    with pytest.raises(BusyHostError, match="HTTP 429") as caught:
        fetch(server.url(0), ImageLimits(allow_private_addresses=True))
    assert caught.value.retry_after == seconds


def test_a_second_run_into_a_folder_is_refused(server, tmp_path, capsys):
    write_table(tmp_path / "Train_GCC.tsv", server, 2)
    server.delay = 0.5
    first = threading.Thread(target=prepare, args=[tmp_path])
    first.start()
    while not server.asked:
        time.sleep(0.01)
    with pytest.raises(SystemExit):
        prepare(tmp_path)
    message = f"Another `fromage prepare` is writing into {tmp_path / 'shards'}. Wait for it or end it"
    assert message in capsys.readouterr().err
    first.join()
    assert Counter(server.asked) == {0: 1, 1: 1}
    assert prepare(tmp_path)["images"] == 2


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
