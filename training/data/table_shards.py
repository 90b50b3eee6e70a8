"""Tables (JSON lines, TSV, CSV) read in place, by the byte offsets of their rows."""

import csv
import itertools
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modeling_fromage.images_fromage import is_url
from modeling_fromage.io.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    as_image,
    bad_row,
    find_column,
    find_columns,
    negatives_of,
)
from modeling_fromage.io.shard_files import Shard
from modeling_fromage.trainer.documents import document_in

_BOM = b"\xef\xbb\xbf"  # spreadsheets begin a table with it


class TableShard(Shard):
    """The rows of a table, by an index of `(N, 3)`: first byte, last byte, number of its line.

    Raises:
        ValueError: The table has no column of images, or none of captions.
    """

    suffixes = (".jsonl", ".tsv", ".csv")

    def __init__(self, path: Path, *args: Any, **kwargs: Any):
        super().__init__(path, *args, **kwargs)
        self._kind = path.suffix.lower()
        columns = _header(path)
        if _is_headerless(path, columns):
            columns = [self.caption_column or CAPTION_COLUMNS[0], self.image_column or IMAGE_COLUMNS[0]]
        self.columns, self.documents = columns, self.documents_among(columns)
        if columns and not self.documents:
            find_columns(str(path), columns, self.image_column, self.caption_column)

    def make_index(self) -> np.ndarray:
        kind = self.path.suffix.lower()
        with self.path.open("rb") as file:
            records = _csv_records(file) if kind == ".csv" else _lines(file)
            flat = array("q", itertools.chain.from_iterable(records))  # 24 bytes a row, where tuples take 200
        found = np.frombuffer(flat, dtype=np.int64).reshape(-1, 3)
        skipped = kind != ".jsonl" and not _is_headerless(self.path, _header(self.path))
        return found[int(skipped) :]

    def read(self, number: int, with_image: bool = True) -> dict[str, Any]:
        start, end, line = self.index[number].tolist()
        place = f"{self.path.name}, line {line}"
        try:
            row = self._parse(self.pread(start, end).removeprefix(_BOM if start == 0 else b"").decode())
        except UnicodeDecodeError as error:
            return bad_row(place, f"not UTF-8: {error}")
        except (ValueError, RecursionError, csv.Error) as error:  # ValueError also of a number of thousands of digits
            return bad_row(place, str(error) if isinstance(error, _Malformed) else f"{self._not} {error}")
        if self.documents:
            return {**document_in(self.path.parent, row), "place": place}
        image = row.get(find_column(row, self.image_column, IMAGE_COLUMNS))
        caption = row.get(find_column(row, self.caption_column, CAPTION_COLUMNS))
        example = {"image": as_image(image, self.path.parent), "caption": caption, "place": place}
        return example | negatives_of(row, self.path.parent)

    @property
    def _not(self) -> str:
        return "not JSON:" if self._kind == ".jsonl" else "not CSV:"

    def _parse(self, text: str) -> dict[str, Any]:
        if self._kind == ".jsonl":
            row = json.loads(text)
            if not isinstance(row, dict):
                raise _Malformed(f"not an object of columns and values: {text[:100].strip()!r}")
            return row
        text = text.rstrip("\r\n")
        if self._kind == ".tsv":  # without quoting: captions have single quotes
            values = text.split("\t")
        else:
            values = next(csv.reader([text], strict=True))
        count = len(self.columns)
        if any(values[count:]):  # empty ones are a separator at the end of the line
            raise _Malformed(f"{len(values)} fields, and the header has {count}")
        return dict(zip(self.columns, values, strict=False))


class _Malformed(ValueError):
    """A row that is not of the table's columns; the message is the whole problem."""


def _lines(file: Any) -> Iterator[tuple[int, int, int]]:
    end = 0
    for number, line in enumerate(file, start=1):
        start, end = end, end + len(line)
        if line.removeprefix(_BOM if start == 0 else b"").strip():
            yield start, end, number


def _csv_records(file: Any) -> Iterator[tuple[int, int, int]]:
    """Records of a CSV file, of which a quoted field may hold line breaks. A row with a broken quote is its first line
    alone: what follows is read anew."""
    start = number = 0
    while True:
        file.seek(start)
        pulled: list[int] = []  # lengths of the lines of this record

        def lines(pulled: list[int] = pulled) -> Iterator[str]:
            for line in file:
                pulled.append(len(line))
                yield line.decode(errors="surrogateescape")

        reader = csv.reader(lines(), strict=True)
        try:
            for row in reader:
                number, first = number + len(pulled), start
                start += sum(pulled)
                pulled.clear()
                if row:
                    yield first, start, number
            return
        except csv.Error:
            number += 1
            yield start, start + pulled[0], number
            start += pulled[0]


def _header(path: Path) -> list[str]:
    """The columns that the first line names; for JSON lines, those of the first hundred rows."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".jsonl":
            rows = [_object(line.removeprefix(_BOM)) or {} for line in itertools.islice(file, 100)]
            return list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        lines = (line.removeprefix(_BOM).decode(errors="replace") for line in file)
        if path.suffix.lower() == ".tsv":
            return next((line.rstrip("\r\n").split("\t") for line in lines if line.strip()), [])
        return next((row for row in csv.reader(lines) if row), [])


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_headerless(path: Path, first: list[str]) -> bool:
    """Whether a TSV file begins with a caption and a URL, as Conceptual Captions is published."""
    return path.suffix.lower() == ".tsv" and len(first) == 2 and is_url(first[1])


__all__ = ["TableShard"]
