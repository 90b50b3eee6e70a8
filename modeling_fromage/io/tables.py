"""Tables of images and captions, read row by row: CSV, TSV, JSON lines and Parquet."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..images_fromage import is_url

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def is_table(path: Path) -> bool:
    """Whether `path` is named like a table that [`read_rows`] reads."""
    return path.suffix.lower() in SUFFIXES


def read_rows(path: Path, headerless: Sequence[str] = ("caption", "image")) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table, each with its line (of a Parquet file, its number from 1).

    Tables are UTF-8, and CSV and TSV files begin with a header. A quote in a TSV file is a quote: captions have single
    ones. A field that a short row lacks is `None`.

    Args:
        path (`Path`): A `.csv`, `.tsv`, `.jsonl` or `.parquet` file.
        headerless (`Sequence[str]`): Columns of a `.tsv` file that begins with a caption and a URL, as Conceptual
            Captions is published.

    Raises:
        ValueError: The file is missing, or a line is not of the format; says which.
        ImportError: A Parquet file needs pyarrow.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
            if suffix == ".jsonl":
                yield from _json_rows(path, file)
            elif suffix == ".tsv":
                first = file.readline().rstrip("\r\n").split("\t")
                file.seek(0)
                columns = headerless if len(first) == 2 and is_url(first[1]) else None
                options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
                yield from _csv_rows(path, csv.DictReader(file, columns, **options))
            else:
                yield from _csv_rows(path, csv.DictReader(file, strict=True))
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _csv_rows(path: Path, reader: csv.DictReader) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for row in reader:
            beyond = row.pop(None, [])
            if any(beyond):  # empty ones are a separator at the end of the line
                count = len(reader.fieldnames or ())
                raise ValueError(
                    f"{path}, line {reader.line_num} has {count + len(beyond)} fields, and the header {count}. "
                    "Quote fields that hold a separator, or take it out."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, the row from line {reader.line_num + 1} on: {error}.") from error


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be an object of columns and values, got {line[:100]!r}.")
        yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError("Parquet tables need pip install 'modeling-fromage[train]'.") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, OSError, UnicodeDecodeError) as error:  # OSError also of a damaged footer
        raise ValueError(f"{path} is not a Parquet file, or is damaged: {error}.") from error


def _not_utf8(path: Path) -> ValueError:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return ValueError(f"{path}, line {number} is not UTF-8 ({error}). Save the table as UTF-8.")
    return ValueError(f"{path} is not UTF-8. Save the table as UTF-8.")  # it has just changed


__all__ = ["SUFFIXES", "is_table", "read_rows"]
