"""Where an image index keeps its embeddings, ids and metadata: in memory, or in files that are opened and checked when
they are first needed.

Axes: N images, n of them in a shard, q the width of the shared image-text space.
"""

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

SHARD_ROWS = 65_536  # one file, one matrix product of a search: 32 MB in fp16 at q = 256
_AT_A_TIME = 1000  # ids in one SQL statement


class CorruptIndexError(ValueError):
    """A file of an index is not what was written; the message names it."""

    def __init__(self, path: Path, detail: str):
        super().__init__(f"{path} is damaged: {detail}. Copy or download the index again, or build it anew.")


class Shard:
    """Up to `SHARD_ROWS` unit-norm embeddings (n, q).

    Args:
        count: n.
        rows: The embeddings, where they are in memory.
        path, crc32: The file they are in otherwise. It is mapped, not read, and compared with its checksum once.
    """

    def __init__(
        self, count: int, rows: torch.Tensor | None = None, path: Path | None = None, crc32: int | None = None
    ):
        self.count, self._rows, self.path, self.crc32 = count, rows, path, crc32

    def rows(self) -> torch.Tensor:
        """(n, q).

        Raises:
            CorruptIndexError: The file does not hold what was written.
        """
        if self._rows is None:
            try:
                rows = load_file(self.path)["embeds"]
            except (SafetensorError, KeyError, OSError) as error:
                raise CorruptIndexError(self.path, str(error)) from error
            # The checksum is of the numbers alone; the file's header says what kind they are.
            right = rows.dim() == 2 and rows.is_floating_point() and len(rows) == self.count
            if not right or crc32_of(rows) != self.crc32:
                raise CorruptIndexError(self.path, "its checksum differs from the index's")
            self._rows = rows
        return self._rows

    def to(self, device: torch.device | str) -> "Shard":
        """A copy whose rows are on `device`."""
        return Shard(self.count, self.rows().to(device), self.path, self.crc32)


def crc32_of(rows: torch.Tensor) -> int:
    """Checksum of a tensor's bytes."""
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy())


def check_file(path: Path, crc32: int):
    """Raise a [`CorruptIndexError`] where a file is not the one of this checksum."""
    if crc32_of_file(path) != crc32:
        raise CorruptIndexError(path, "its checksum differs from the index's")


def crc32_of_file(path: Path) -> int:
    """Checksum of a file, which is read piece by piece."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


class Entries:
    """Ids and metadata by position, in SQLite: nothing is held in memory but what is asked for.

    Args:
        path, crc32: A finished file, opened read-only and compared with its checksum at first use; a change goes to a
            temporary copy. Without them, a new temporary database. [`in_file`] writes into a file.
    """

    def __init__(self, path: Path | None = None, crc32: int | None = None):
        self.path, self._crc32 = path, crc32
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()

    @classmethod
    def in_file(cls, path: Path) -> "Entries":
        """Entries that are written into a file, new or unfinished."""
        entries = cls()
        entries._connection = connect(path)
        return entries

    @property
    def connection(self) -> sqlite3.Connection:
        with self._lock:
            if self._connection is None and self.path is None:
                self._connection = connect("")  # SQLite's own temporary file, once it is large
            elif self._connection is None:
                check_file(self.path, self._crc32)
                self._connection = sqlite3.connect(
                    f"{self.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
                )
            return self._connection

    def __getstate__(self) -> dict[str, Any]:
        data = self.connection.serialize() if self.path is None else None
        return {"path": self.path, "crc32": self._crc32, "data": data}

    def __setstate__(self, state: dict[str, Any]):
        self.__init__(state["path"], state["crc32"])
        if state["data"] is not None:
            self.connection.deserialize(state["data"])

    def detach(self) -> sqlite3.Connection:
        """Make it a temporary copy, if it is not, which can be changed and does without the file."""
        if self.path is not None:
            copy = connect("")
            self.connection.backup(copy)
            self._connection.close()
            self._connection, self.path = copy, None
        return self.connection

    def add(self, first: int, ids: Iterable[str], metadata: Iterable[dict[str, Any]]):
        """Append entries at positions from `first` on.

        Raises:
            ValueError: An id is there already, or occurs twice.
        """
        rows = [
            (position, str(image_id), json.dumps(facts, ensure_ascii=False, allow_nan=False))  # JSON has no NaN
            for position, (image_id, facts) in enumerate(zip(ids, metadata, strict=True), first)
        ]
        connection = self.detach()
        try:
            with connection:
                connection.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
        except sqlite3.IntegrityError as error:
            raise ValueError("Image ids must be unique; at least one occurs twice.") from error

    def delete(self, positions: Sequence[int]):
        connection = self.detach()
        with connection:
            connection.executemany("DELETE FROM entries WHERE position = ?", ((position,) for position in positions))

    def positions(self, ids: Sequence[str]) -> dict[str, int]:
        """The positions of those of `ids` that there are."""
        found: dict[str, int] = {}
        for start in range(0, len(ids), _AT_A_TIME):
            piece = list(ids[start : start + _AT_A_TIME])
            marks = ",".join("?" * len(piece))
            found.update(self.connection.execute(f"SELECT id, position FROM entries WHERE id IN ({marks})", piece))  # noqa: S608
        return found

    def at(self, positions: Sequence[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Id and metadata by position."""
        found = {}
        for start in range(0, len(positions), _AT_A_TIME):
            piece = list(positions[start : start + _AT_A_TIME])
            marks = ",".join("?" * len(piece))
            query = f"SELECT position, id, metadata FROM entries WHERE position IN ({marks})"  # noqa: S608
            for position, image_id, text in self.connection.execute(query, piece):
                found[position] = (image_id, json.loads(text))
        return found

    def __iter__(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        for position, image_id, text in self.connection.execute("SELECT * FROM entries ORDER BY position"):
            yield position, image_id, json.loads(text)

    def matching(self, where: dict[str, Any]) -> list[int]:
        """Positions of the entries whose metadata has every one of `where`'s values, or one of a list of them."""
        conditions, values = [], []
        for name, wanted in where.items():
            wanted = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
            # A JSON path's quotes cannot be escaped in SQLite, so keys are compared as values; and wanted values are
            # one parameter, as SQLite limits how many there are.
            conditions.append(
                "EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND "
                "(value IN (SELECT value FROM json_each(?)) OR (value IS NULL AND ?)))"
            )
            values += [name, json.dumps(wanted, ensure_ascii=False), None in wanted]
        query = f"SELECT position FROM entries WHERE {' AND '.join(conditions)} ORDER BY position"  # noqa: S608
        return [position for (position,) in self.connection.execute(query, values)]

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that were left out, and why."""
        return [
            {"id": image_id, "source": source, "reason": reason}
            for image_id, source, reason in self.connection.execute("SELECT id, source, reason FROM skipped")
        ]

    def skip(self, rows: Iterable[tuple[str, str, str]]):
        """Note (id, source, reason) of images that were left out."""
        connection = self.detach()
        with connection:
            connection.executemany("INSERT INTO skipped VALUES (?, ?, ?)", rows)


def connect(path: str | Path) -> sqlite3.Connection:
    """Open or create a database of entries."""
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.executescript(
        "CREATE TABLE IF NOT EXISTS entries (position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT);"
        "CREATE TABLE IF NOT EXISTS skipped (id TEXT, source TEXT, reason TEXT);"
    )
    return connection
