"""Shards that are read in place: every row is an example or a problem, whatever is in the files."""

import csv
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader

from modeling_fromage.images_fromage import UnreadableImageError, load_rgb_image
from modeling_fromage.io import shard_files
from modeling_fromage.io.tables import read_rows
from tests.helpers.captioned_data import number_in, picture, tar_members, write_tar
from training.data import parquet_shards, sharded_examples
from training.data.captioned_images import load_captioned_images
from training.data.examples import Mixture
from training.data.sharded_examples import ShardedExamples
from training.data.table_shards import TableShard


def told(dataset) -> list[str]:
    """Of each example its caption, or its place and what the problem is."""
    return [f"{row['place']}: {row['problem']}" if "problem" in row else row["caption"] for row in dataset]


def tar(path, **options) -> ShardedExamples:
    return ShardedExamples([path], keep_problems=True, **options)


def test_every_whole_member_of_a_tar_that_is_cut_off_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members(range(4)))
    whole = path.read_bytes()
    assert told(tar(path)) == [f"picture {number}" for number in range(4)]
    headers = [member.offset for member in tarfile.open(path)]
    for cut in range(600, headers[-1] + 512 + 8, 100):
        path.write_bytes(whole[:cut])
        found = told(tar(path))
        pairs = sum(cut >= headers[2 * number + 1] + 512 + 9 for number in range(4))
        assert found[:pairs] == [f"picture {number}" for number in range(pairs)]
        at_an_end = pairs > 0 and cut <= (*headers, 0)[2 * pairs]  # or within the padding before it
        assert len(found) == pairs + (not at_an_end), cut
        assert at_an_end or found[-1] is None or "cut off, from byte" in found[-1]  # or an image without its caption
    with pytest.raises(ValueError, match=r"a.tar: the tar is damaged.*on_bad_example=skip"):
        list(ShardedExamples([path]))


def test_damage_within_a_tar(tmp_path):
    """What lies behind it is read, as in tars that were laid end to end."""
    first, second = (write_tar(tmp_path / f"{n}.tar", tar_members(range(2 * n, 2 * n + 2))) for n in range(2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert told(tar(joined)) == [f"picture {number}" for number in range(4)]
    data = bytearray(first.read_bytes())
    broken = [member.offset for member in tarfile.open(first)][2]
    data[broken : broken + 100] = os.urandom(100)
    joined.write_bytes(data + second.read_bytes())
    found = list(tar(joined))
    assert [row["caption"] for row in found] == ["picture 0", None, "picture 1", "picture 2", "picture 3"]
    assert "damaged" in found[1]["problem"] and found[2]["image"] is None and found[3]["image"] is not None
    joined.write_bytes(b"not a tar" * 500)
    assert told(tar(joined)) == ["joined.tar: the tar is damaged, or cut off, from byte 0 on"]


def resized(data: bytearray, start: int, size: bytes) -> None:
    """Let the header at `start` tell another size, with the sum that belongs to it."""
    data[start + 124 : start + 136] = size.ljust(12, b"\0")
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


@pytest.mark.parametrize("damaged", [0, 2])
@pytest.mark.parametrize("size", [b"-0000002000", b"-0000000001", b"\xff" * 12])
def test_headers_of_negative_sizes(damaged, size, tmp_path):
    """Followed, they lead back to what was read already, for ever."""
    path = write_tar(tmp_path / "a.tar", tar_members(range(3)))
    data = bytearray(path.read_bytes())
    resized(data, [member.offset for member in tarfile.open(path)][damaged], size)
    path.write_bytes(data)
    found = told(tar(path))
    assert "a.tar: the tar is damaged" in " ".join(map(str, found)) and "picture 2" in found and len(found) < 6


@pytest.mark.parametrize("size", [b"00000000001", b"-0000002000", b"77777777777", b"\x80" + b"\x7f" * 11])
def test_headers_that_belong_to_each_other(size, tmp_path):
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_LONGNAME
    resized(header, 0, size)
    (tmp_path / "a.tar").write_bytes((bytes(header) + bytes(512)) * 1500)
    assert told(tar(tmp_path / "a.tar")) == ["a.tar: the tar is damaged, or cut off, from byte 0 on"]


def test_samples_of_a_tar(tmp_path):
    members = [
        ("a.png", picture(0)), ("a.txt", b" first \n"),
        ("a.png", picture(1)), ("a.txt", b"the key again"),
        ("only an image.png", picture(2)),
        ("only a text.txt", b"alone"),
        ("../../etc/passwd.png", b""), ("../../etc/passwd.txt", b"empty image"),
        ("b\n\x1b[31m\xe4.PNG", picture(3)), ("b\n\x1b[31m\xe4.json", json.dumps({"captions": ["x", "y"]}).encode()),
        ("bad.png", picture(4)), ("bad.txt", b"\xff\xfe"),
        ("no.png", picture(5)), ("no.json", b"{"),
        ("._a.png", b"a Mac's"), ("a.cls", b"3"),
        ("both.png", picture(6)), ("both.json", b'{"caption": "of json"}'), ("both.txt", b"of txt"),
        ("z/" * 80 + "long.png", picture(7)), ("z/" * 80 + "long.txt", "ü".encode()),
        ("late.png", picture(8)), ("c.png", picture(9)), ("c.txt", b"c"), ("late.txt", b"late"),
    ]  # fmt: skip
    rows = list(tar(write_tar(tmp_path / "t.tar", members)))
    found = {row["place"].removeprefix("t.tar, "): row for row in rows}
    captions = [row["caption"] for row in rows]
    assert captions[:5] == ["first", "the key again", None, "alone", "empty image"]
    assert captions[5:] == [["x", "y"], None, None, "of txt", "ü", "late", "c"]
    assert "problem" not in found["only an image"] and found["only a text"]["image"] is None
    passwd = found["../../etc/passwd"]
    assert passwd["image"] is None  # its name would be read as that of a file
    with pytest.raises(UnreadableImageError):
        load_rgb_image({"bytes": b"", "path": None})
    assert "UTF-8" in found["bad"]["problem"] and "JSON" in found["no"]["problem"]
    assert all(place.isprintable() for place in found) and any(place.startswith("b\\n\\x1b") for place in found)
    assert [number_in(row["image"]) for row in rows if row["image"]] == [0, 1, 2, 3, 6, 7, 8, 9]
    masks = list(tar(write_tar(tmp_path / "m.tar", [("a.jpg", b""), ("a.Seg.png", picture(1)), ("a.txt", b"of it")]),
                     image_column="seg.png"))  # fmt: skip
    assert [(number_in(row["image"]), row["caption"]) for row in masks] == [(1, "of it")]
    of_json = list(tar(tmp_path / "t.tar", caption_column="caption"))
    assert next(row for row in of_json if row["place"].endswith("both"))["caption"] == "of json"


HOSTILE = {
    "t.jsonl": [b'{"caption": "one"}', b'{"image"', b"", b"[1]", b'{"image": "b", "caption": "\xff"}',
                b'{"image": "c.png", "caption": ["x", "y"]}', b"[" * 100_000, b'{"caption": "no image"}'],
    "t.tsv": [b"caption\timage", b"one\ta.png", b'"quoted\tb.png', b"", b"a\tb\tc", b"\xfe\tc.png", b"short",
              b"last\td.png\t"],
    "t.csv": [b"caption,image", b'one,a.png', b'"two\r\nlines",b.png', b'a,b,c', b'"broken"x,c.png', b"\xff,d.png",
              b'"never closed,e.png', b"f,f.png"],
}  # fmt: skip
FOUND = {
    "t.jsonl": ["one", "line 2: not JSON", "line 4: not an object", "line 5: not UTF-8", ["x", "y"],
                "line 7: not JSON", "no image"],
    "t.tsv": ["one", '"quoted', "line 5: 3 fields, and the header has 2", "line 6: not UTF-8", "short", "last"],
    "t.csv": ["one", "two\r\nlines", "line 5: 3 fields", "line 6: not CSV", "line 7: not UTF-8", "line 8: not CSV",
              "f"],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_rows_are_one_problem_each(name, tmp_path):
    path = tmp_path / name
    for bom, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"")):
        path.write_bytes(bom + b"\n".join(HOSTILE[name]) + end)
        found = told(ShardedExamples([path], keep_problems=True))
        assert len(found) == len(FOUND[name])
        for text, expected in zip(found, FOUND[name], strict=True):
            is_problem = isinstance(expected, str) and expected.startswith("line ")
            assert text.startswith(f"{name}, {expected}") if is_problem else text == expected
    with pytest.raises(ValueError, match=f"{name}, line .* on_bad_example=skip"):
        list(ShardedExamples([path]))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_rows_are_those_of_the_reader_of_whole_tables(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("caption", "image"), *rows])
    expected = [(line, row["caption"]) for line, row in read_rows(path)]
    shard = TableShard(path)
    found = [shard.read(number) for number in range(len(shard))]
    assert [(int(row["place"].rpartition(" ")[2]), row["caption"]) for row in found] == expected


def test_parquet_files(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [f"{n}.png" for n in range(10)], "caption": [[f"picture {n}", "x"] for n in range(10)]})
    parquet.write_table(table, path, row_group_size=3)
    parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    paths = [tmp_path / name for name in ("none.parquet", "a.parquet", "bad.parquet")]
    dataset = ShardedExamples(paths, keep_problems=True)
    found = list(dataset)
    assert [row["caption"] for row in found[:-1]] == [[f"picture {n}", "x"] for n in range(10)]
    assert [row["image"] for row in found[:-1]] == [str(tmp_path / f"{n}.png") for n in range(10)]
    assert found[3]["place"] == "a.parquet, row 4" and "not a Parquet file" in found[-1]["problem"]
    with pytest.raises(ValueError, match="none.parquet has no examples"):
        ShardedExamples(paths[:1])
    data = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(1).column(1).file_offset or 200
    data[start - 120 : start + 40] = b"\xff" * 160
    path.write_bytes(data)
    damaged = told(ShardedExamples([path], keep_problems=True))
    assert len(damaged) == 10 and any("damaged" in text for text in damaged)
    monkeypatch.setattr(parquet_shards, "MOST_BYTES", 20)
    with pytest.raises(ValueError, match="a.parquet has row groups of .* MB.*without streaming"):
        ShardedExamples([path])


def test_little_of_a_parquet_file_is_held(tmp_path, monkeypatch):
    images = [os.urandom(1000) for _ in range(60)]
    table = pa.table({"image": images, "caption": [str(n) for n in range(60)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    limit = 18_000  # three groups
    for module in (parquet_shards, sharded_examples):
        monkeypatch.setattr(module, "MOST_BYTES", limit)
    reads = []
    whole = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a[1]) or whole(*a, **k))
    dataset = ShardedExamples([tmp_path / "a.parquet"])
    groups = dataset.shards[0].groups
    order = dataset.epoch_order(0, 0)
    for number in order:
        assert dataset[number]["image"]["bytes"] == images[number]
        assert sum(size for _, size in groups._held.values()) <= limit
    assert sorted(reads) == list(range(12))  # each once: the order mixes no more than are held
    assert dataset.select_columns(["caption"])[7] == {"caption": "7"}
    assert len(pickle.dumps(dataset)) < 5_000  # without what is held

    reads.clear()
    sources = [ShardedExamples([tmp_path / "a.parquet"]) for _ in range(3)]
    mixture = Mixture(sources)
    for number in mixture.epoch_order(0, 0):
        assert mixture[number]["image"]["bytes"] == images[number % 60]
    assert len(reads) == 3 * 12  # each once, though the windows of the three are read in turns
    two = ShardedExamples([tmp_path / "a.parquet"] * 2).shards
    assert two[0].groups is two[1].groups


def test_indexes_are_kept_and_made_anew(tmp_path):
    path, kept = write_tar(tmp_path / "a.tar", tar_members(range(3))), tmp_path / "indexes"
    first = ShardedExamples([path], index_dir=kept)
    assert len(list(kept.iterdir())) == 1
    again = ShardedExamples([path], index_dir=kept)
    assert isinstance(again.shards[0].index, np.memmap) and list(again) == list(first)
    assert len(pickle.dumps(again)) < len(pickle.dumps(ShardedExamples([path]))) + 300
    write_tar(path, tar_members(range(5)))
    assert len(ShardedExamples([path], index_dir=kept)) == 5
    assert len(ShardedExamples([path], index_dir=kept)) == 5 and len(list(kept.iterdir())) == 2


def test_many_shards_hold_few_descriptors(tmp_path):
    paths = [write_tar(tmp_path / f"{number}.tar", tar_members(range(1))) for number in range(150)]
    before = len(os.listdir("/proc/self/fd"))
    dataset = ShardedExamples(paths, index_dir=tmp_path / "indexes")
    assert sorted(dataset.epoch_order(0, 0)) == list(range(150))
    assert told(dataset) == ["picture 0"] * 150
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 64


def test_loader_workers_read_what_this_process_reads(tmp_path):
    write_tar(tmp_path / "a.tar", tar_members(range(20)))
    rows = [{"image": f"{n}.png", "caption": f"row {n}"} for n in range(20)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.table({"image": [picture(n) for n in range(20)], "caption": [f"group {n}" for n in range(20)]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=4)
    dataset = ShardedExamples([tmp_path / name for name in ("a.tar", "b.jsonl", "c.parquet")], index_dir=tmp_path)
    expected = list(dataset)  # opens the files, whose places a fork would share
    assert list(DataLoader(dataset, batch_size=None, num_workers=2)) == expected
    shard_files._open.cache_clear()  # as in a process that was spawned
    assert list(pickle.loads(pickle.dumps(dataset))) == expected


def test_substitutes_are_the_next_of_the_shard(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", tar_members(range(3 * shard, 3 * shard + 3)))
    dataset = load_captioned_images(f"{tmp_path}/*.tar")
    assert list(dataset.substitutes(1)) == [2, 0] and list(dataset.substitutes(5)) == [3, 4]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.png", "d/" * 60 + "a.png", "ä" * 60 + ".png", "x" * 120 + ".png"])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_every_kind_of_header(form, name, mtime, tmp_path):
    """As `tarfile` reads them, which the quick reader of plain ones leaves the others to."""
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        for number, suffix in enumerate(("", "2")):
            for member, data in ((name, picture(number)), (name[:-4] + ".txt", b"picture %d" % number)):
                info = tarfile.TarInfo(suffix + member)
                info.size, info.mtime = len(data), mtime
                try:
                    archive.addfile(info, io.BytesIO(data))
                except ValueError:
                    pytest.skip("this format has no such name")
    rows = list(tar(tmp_path / "a.tar"))
    assert [(number_in(row["image"]), row["caption"]) for row in rows] == [(0, "picture 0"), (1, "picture 1")]
    assert [row["place"] for row in rows] == [f"a.tar, {suffix}{name[:-4]}" for suffix in ("", "2")]
