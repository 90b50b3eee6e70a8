"""One reader of tables: every format gives the same rows, and errors name file and line."""

import csv
import json

import pytest
from datasets import Dataset

from modeling_fromage import FromageImageIndex
from modeling_fromage.io.tables import SUFFIXES, is_table, read_rows
from tests.helpers.backbones import PARITY, make_model, make_processor
from training.data.captioned_images import load_captioned_images

IMAGES = PARITY / "common" / "images"
ROWS = [
    {"caption": 'one "quoted", with a comma', "image": str(IMAGES / "img_000.png")},
    {"caption": "zwei Äpfel", "image": str(IMAGES / "img_001.png")},
    {"caption": "NA", "image": str(IMAGES / "img_002.png")},
]


def write(path, rows=ROWS):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    elif path.suffix == ".tsv":
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_has_the_same_rows(suffix, tmp_path):
    """For training and for the index."""
    path = write(tmp_path / f"table{suffix}")
    assert is_table(path) and [row for _, row in read_rows(path)] == ROWS
    dataset = load_captioned_images(str(path))
    assert [dict(row) for row in dataset] == [{"image": row["image"], "caption": row["caption"]} for row in ROWS]
    index = FromageImageIndex.build(make_model("opt_clip"), make_processor(), path, show_progress=False)
    assert [entry["caption"] for entry in index.metadata] == [row["caption"] for row in ROWS]


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('caption,image\n"two\nlines",a.png\nb,b.png\n')
    assert [line for line, _ in read_rows(path)] == [3, 4]


def test_a_separator_at_the_end_of_a_line_is_no_field(tmp_path):
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"table{suffix}"
        path.write_text(f"caption{separator}image\na{separator}a.png{separator}\n")
        assert list(read_rows(path)) == [(2, {"caption": "a", "image": "a.png"})]


def test_damaged_files_are_named(tmp_path):
    lines, table = tmp_path / "t.jsonl", write(tmp_path / "t.parquet")
    for value in ("1" * 5000, "[" * 100_000):
        lines.write_text(f'{{"image": {value}}}')
        with pytest.raises(ValueError, match="t.jsonl, line 1 is not JSON"):
            list(read_rows(lines))
    data = table.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    table.write_bytes(data[: -8 - length] + b"\xff" * length + data[-8:])
    with pytest.raises(ValueError, match="t.parquet is not a Parquet file, or is damaged"):
        list(read_rows(table))


def test_captions_and_urls_without_a_header(tmp_path):
    path = tmp_path / "Train_GCC.tsv"
    path.write_text('a cat\thttp://x.org/a.jpg\na "dog\thttp://x.org/b.jpg\n')
    assert [row["image"] for _, row in read_rows(path)] == ["http://x.org/a.jpg", "http://x.org/b.jpg"]
    assert load_captioned_images(str(path))["caption"] == ["a cat", 'a "dog']
    dataset = load_captioned_images(str(path), image_column="url", caption_column="alt")
    assert dataset["image"][0] == "http://x.org/a.jpg" and dataset["caption"][0] == "a cat"


def test_a_table_that_changed_is_read_again(tmp_path):
    path = write(tmp_path / "table.csv")
    assert len(load_captioned_images(str(path))) == 3
    write(path, ROWS[:2])
    assert len(load_captioned_images(str(path))) == 2


def test_paths_are_relative_to_the_table(tmp_path):
    path = write(tmp_path / "table.jsonl", [{"caption": "a", "image": "sub/a.png"}])
    assert load_captioned_images(str(path))["image"] == [str(tmp_path / "sub" / "a.png")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"caption,image\na,b\nc,d,e\n", "line 3 has 3 fields, and the header 2"),
        ("t.tsv", b"caption\timage\na\tb\tc\n", "line 2 has 3 fields"),
        ("t.csv", b'caption,image\na,b\n"c\n', "line 3 on: unexpected end"),
        ("t.csv", b"caption,image\na,b\n\xff,d\n", "line 3 is not UTF-8"),
        ("t.jsonl", b'{"caption": "a"}\n{"caption"\n', "line 2 is not JSON"),
        ("t.jsonl", b'{"caption": "a", "image": "b"}\n[1]\n', "line 2 must be an object"),
        ("t.parquet", b"no parquet", "t.parquet is not a Parquet file"),
    ],
)
def test_errors_name_the_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message.removeprefix(name)}"):
        list(read_rows(path))
    with pytest.raises(ValueError, match=f"{name}.*{message.removeprefix(name)}"):
        FromageImageIndex.build(make_model("opt_clip"), make_processor(), path, show_progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("caption,image\na,b\nc\n", "line 3 has no 'image'"),
        ('caption,image\na,b\n"c\n', "line 3 on: unexpected end"),
        ("caption,picture\na,b\n", "needs a column 'image'"),
        ("caption,image\n", "has no examples"),
    ],
)
def test_tables_to_train_on(content, message, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"t.csv.*{message}"):
        load_captioned_images(str(path))
    with pytest.raises(ValueError, match="There is no file .*none.csv"):
        load_captioned_images(str(tmp_path / "none.csv"))
