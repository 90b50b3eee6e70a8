"""Parquet files read in place, a row group at a time."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import ArrowException, Table, parquet

from modeling_fromage.io.columns import NEGATIVES, as_image, bad_row, find_columns, negatives_of
from modeling_fromage.io.shard_files import Shard
from modeling_fromage.trainer.documents import document_in

MOST_BYTES = 256_000_000  # of row groups of a source that a process holds at a time, without compression


class ParquetShard(Shard):
    """The rows of a Parquet file, by an index of `(groups, 2)`: where a row group ends, and its bytes.

    Raises:
        ValueError: A row group is too large to be held for the sake of one row, or a column is missing.
    """

    suffixes = (".parquet",)

    def make_index(self) -> np.ndarray:
        try:
            file = parquet.ParquetFile(self.path)
        except (ArrowException, OSError) as error:  # OSError also of a damaged footer
            self.damage: str | None = str(error).partition("\n")[0]
            return np.array([[1, 0]], dtype=np.int64)  # one row, which tells of it
        self.damage, metadata = None, file.metadata
        names = file.schema_arrow.names
        self.documents = self.documents_among(names)
        self.columns = self.documents or find_columns(str(self.path), names, self.image_column, self.caption_column)
        if NEGATIVES in names and not self.documents:
            self.columns = (*self.columns, NEGATIVES)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [_bytes_of(group, self.columns) for group in groups]
        if max(sizes, default=0) > MOST_BYTES:
            raise ValueError(
                f"{self.path} has row groups of {max(sizes) / 1e6:,.0f} MB, and a row is read with its whole group: "
                f"{MOST_BYTES / 1e6:,.0f} MB is the limit. Load it without streaming, write it with smaller row groups "
                "(`row_group_size=256`), or make tar shards of it."
            )
        return np.array([np.cumsum([group.num_rows for group in groups]), sizes], dtype=np.int64).T.reshape(-1, 2)

    def __init__(
        self, path: Path, image_column: str | None = None, caption_column: str | None = None, index_dir: Any = None
    ):
        super().__init__(path, image_column, caption_column)  # its index is not kept: a footer is read in no time
        self.groups = RowGroups()

    def __len__(self) -> int:
        return int(self.index[-1, 0]) if len(self.index) else 0

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        counts = np.diff(self.index[:, 0], prepend=0)
        return [(int(count), int(size)) for count, size in zip(counts, self.index[:, 1], strict=True) if count]

    def read(self, number: int, with_image: bool = True) -> dict[str, Any]:
        place = f"{self.path.name}, row {number + 1}"
        if self.damage is not None:
            return bad_row(self.path.name, f"not a Parquet file, or damaged: {self.damage}")
        group = int(np.searchsorted(self.index[:, 0], number, side="right"))
        columns = self.columns if with_image or self.documents else self.columns[1:]
        try:
            table = self.groups.read(self._stamp, group, columns, int(self.index[group, 1]))
            first = int(self.index[group - 1, 0]) if group else 0
            row = table.slice(number - first, 1).to_pylist()[0]
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            return bad_row(place, f"damaged: {str(error).partition(chr(10))[0]}")
        if self.documents:
            return {**document_in(self.path.parent, row), "place": place}
        image = as_image(row.get(self.columns[0]), self.path.parent)
        example = {"image": image, "caption": row[self.columns[1]], "place": place}
        return example | negatives_of(row, self.path.parent)


def _bytes_of(group: Any, columns: tuple[str, ...]) -> int:
    """The size of these columns of a row group, without compression."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns)


class RowGroups:
    """The row groups that a process holds of the shards that share these: those read last, of `MOST_BYTES` together."""

    def __init__(self) -> None:
        self._held: OrderedDict[Any, tuple[Table, int]] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self) -> tuple:  # another process reads its own
        return RowGroups, ()

    def read(self, stamp: tuple, group: int, columns: tuple[str, ...], size: int) -> Table:
        if self._process != os.getpid():  # forked: what the parent holds is not this process's to keep alive
            self.__init__()  # type: ignore[misc]
        key = (stamp, group, columns)
        if key not in self._held:
            while self._held and size + sum(held for _, held in self._held.values()) > MOST_BYTES:
                self._held.popitem(last=False)
            with parquet.ParquetFile(stamp[0]) as file:  # threads of Arrow's do not outlive a fork
                self._held[key] = file.read_row_group(group, columns=list(columns), use_threads=False), size
        self._held.move_to_end(key)
        return self._held[key][0]


__all__ = ["MOST_BYTES", "ParquetShard", "RowGroups"]
