"""Tables of images and captions, read row by row: CSV, TSV, JSON lines and Parquet."""

import csv
import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..images_fromage import is_url, printable

Row = tuple[int, dict[str, Any]]  # its line, and its values by column
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def is_table(path: Path) -> bool:
    """Whether `path` is named like a table that [`read_rows`] reads."""
    return path.suffix.lower() in SUFFIXES


def read_rows(
    path: Path, headerless: Sequence[str] = ("caption", "image"), keep_problems: bool = False
) -> Iterator[Row]:
    """Yield the rows of a table, each with its line (of a Parquet file, its number from 1).

    Tables are UTF-8, and CSV and TSV files begin with a header. A quote in a TSV file is a quote: captions have single
    ones. A field that a short row lacks is `None`.

    Args:
        path (`Path`): A `.csv`, `.tsv`, `.jsonl` or `.parquet` file.
        headerless (`Sequence[str]`): Columns of a `.tsv` file that begins with a caption and a URL, as Conceptual
            Captions is published.
        keep_problems (`bool`, defaults to `False`): A row that is not of the format becomes `{"problem": ...}`, with
            the line that it begins in, and reading goes on at the next line. A damaged Parquet file has one problem.

    Raises:
        ValueError: There is no such file; or without `keep_problems`, a line is not of the format; says which.
        ImportError: A Parquet file needs pyarrow.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path, keep_problems)
        return
    # Spreadsheets begin a file with a byte order mark. Bytes that are not UTF-8 become surrogates: see `_check_utf8`.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        if suffix == ".jsonl":
            yield from _json_rows(path, file, keep_problems)
        elif suffix == ".tsv":
            first = file.readline().rstrip("\r\n").split("\t")
            file.seek(0)
            columns = list(headerless) if len(first) == 2 and is_url(first[1]) else None
            yield from _csv_rows(path, file, keep_problems, columns, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from _csv_rows(path, file, keep_problems, strict=True)


class _Lines:
    """The lines of a file. Those of the last row can be read anew from its second on."""

    def __init__(self, file: Iterator[str]):
        self._file, self._again = file, deque[str]()
        self.row: list[str] = []
        self.last = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.row.append(line)
        self.last += 1
        return line

    @property
    def first(self) -> int:
        return self.last - len(self.row) + 1

    def leave_first(self) -> None:
        """Read what followed the first line of the row anew: an opening quote may have swallowed it."""
        self.last = self.first
        self._again.extendleft(reversed(self.row[1:]))


def _csv_rows(
    path: Path, file: Iterator[str], keep: bool, columns: list[str] | None = None, **options: Any
) -> Iterator[Row]:
    lines = _Lines(file)
    reader = csv.reader(lines, **options)
    while True:
        lines.row = []
        try:
            fields = next(reader)
            _check_utf8(lines.row)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            yield _problem(path, lines.first, _not_utf8(error), keep and columns is not None)
            continue
        except csv.Error as error:
            first = lines.first
            if not keep or columns is None:
                raise ValueError(f"{path}, the row from line {first} on: {error}.") from error
            lines.leave_first()
            yield first, {"problem": printable(f"not {path.suffix[1:].upper()}: {error}")}
            continue
        if columns is None:
            columns = fields
        elif fields:  # a blank line has none
            beyond = fields[len(columns) :]
            if any(beyond):  # empty ones are a separator at the end of the line
                text = f"has {len(fields)} fields, and the header {len(columns)}. Quote fields that hold a separator"
                yield _problem(path, lines.last, f"{text}, or take it out", keep)
            else:
                missing = [None] * (len(columns) - len(fields))
                yield lines.last, dict(zip(columns, [*fields, *missing], strict=False))


def _json_rows(path: Path, lines: Iterator[str], keep: bool) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _check_utf8([line])
            row = json.loads(line)
        except UnicodeDecodeError as error:
            yield _problem(path, number, _not_utf8(error), keep)
        except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
            yield _problem(path, number, f"is not JSON: {error}", keep)
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                yield _problem(path, number, f"must be an object of columns and values, got {line[:100]!r}", keep)


def _parquet_rows(path: Path, keep: bool) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError("Parquet tables need pip install 'modeling-fromage[train]'.") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError, UnicodeDecodeError) as error:  # OSError also of a damaged footer
        if not keep:
            raise ValueError(f"{path} is not a Parquet file, or is damaged: {error}.") from error
        yield number + 1, {"problem": printable(f"not a Parquet file, or damaged from here on: {error}")}


def _problem(path: Path, line: int, text: str, keep: bool) -> Row:
    """A row that could not be read: `text` follows its place in a sentence. Without `keep` it raises."""
    if not keep:
        raise ValueError(f"{path}, line {line} {text}.")
    return line, {"problem": printable(text.removeprefix("is "))}


def _check_utf8(lines: list[str]) -> None:
    """
    Raises:
        UnicodeDecodeError: One of `lines` has bytes that are not UTF-8.
    """
    for line in lines:
        if not line.isascii():
            line.encode("utf-8", "surrogateescape").decode("utf-8")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 ({error}). Save the table as UTF-8"


__all__ = ["SUFFIXES", "is_table", "read_rows"]
