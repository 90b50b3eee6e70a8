"""Where an image index keeps its embeddings, ids and metadata: in memory, or in files that are opened and checked when
they are first needed.

Axes: N images, n of them in a shard, q the width of the shared image-text space.
"""

import contextlib
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

from ..image_ids_fromage import storable
from .values import as_json, as_list

INDEX_FILE = "index.json"
SHARD_ROWS = 65_536  # one file, one matrix product of a search: 32 MB in fp16 at q = 256
_AT_A_TIME = 1000  # ids in one SQL statement, rows whose norms are taken
_MAPPED = 1 << 31  # bytes of a file of entries
_LONGEST_ROW = 1.01  # the norm of a unit-norm embedding after rounding to fp16, and some
_DAMAGE = (sqlite3.Error, UnicodeDecodeError)
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries (position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT);"
    "CREATE TABLE IF NOT EXISTS skipped (id TEXT, source TEXT, reason TEXT);"
)
# Each by itself: together, SQLite would read every row for them.
_COUNT = (
    "SELECT (SELECT COUNT(*) FROM entries NOT INDEXED), (SELECT MIN(position) FROM entries), "
    "(SELECT MAX(position) FROM entries)"
)
# Of this connection alone, so never in a file: a search or a save that began before a deletion still finds its entries.
_DELETED = "CREATE TEMP TABLE deleted (position INTEGER PRIMARY KEY, id TEXT, metadata TEXT)"


class CorruptIndexError(ValueError):
    """A file of an index is not what was written; the message names it."""

    def __init__(self, path: Path, detail: str):
        super().__init__(f"{path} is damaged: {detail}. Copy or download the index again, or build it anew.")


class ReplacedIndexError(ValueError):
    """A folder holds another index than when it was opened, and files that were not yet read are gone."""

    def __init__(self, directory: Path):
        super().__init__(
            f"The index in {directory} was saved anew since it was opened. Reopen it: "
            "`FromageImageIndex.from_pretrained`."
        )


class IndexFolder:
    """A folder of an index as it was when it was opened.

    Args:
        path: The folder.
        listing: The contents of its `index.json`.
    """

    def __init__(self, path: Path, listing: bytes):
        self.path, self.listing = path, listing

    def is_replaced(self) -> bool:
        """Whether another index was saved into it since."""
        with contextlib.suppress(OSError):
            return (self.path / INDEX_FILE).read_bytes() != self.listing
        return False

    def error(self, file: Path, detail: str) -> ValueError:
        """What to raise about a file that is missing or not as listed."""
        return ReplacedIndexError(self.path) if self.is_replaced() else CorruptIndexError(file, detail)


class ListedFile:
    """A file that an `index.json` lists, with its checksum, to be checked when it is first used."""

    def __init__(self, path: Path, crc32: int, folder: IndexFolder):
        self.path, self.crc32, self.folder = path, crc32, folder

    def error(self, detail: str) -> ValueError:
        return self.folder.error(self.path, detail)

    def check(self):
        """Raise a [`CorruptIndexError`] where it does not have the listed checksum."""
        try:
            crc32 = crc32_of_file(self.path)
        except OSError as error:
            raise self.error(str(error)) from error
        if crc32 != self.crc32:
            raise self.error("its checksum differs from the index's")


class Shard:
    """Up to `SHARD_ROWS` unit-norm embeddings (n, q).

    Args:
        count: n.
        rows: The embeddings, where they are in memory.
        file: The file they are in otherwise. It is mapped, not read, and checked once.
        dim, dtype: What a file's embeddings must be like.
        buffer: What `rows` are the beginning of, with room for more.
    """

    def __init__(
        self,
        count: int,
        rows: torch.Tensor | None = None,
        file: ListedFile | None = None,
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        buffer: torch.Tensor | None = None,
    ):
        self.count, self._rows, self.file, self.dim, self.dtype = count, rows, file, dim, dtype
        self.buffer = buffer

    def __getstate__(self) -> dict[str, Any]:
        rows = self._rows
        if rows is not None and rows.untyped_storage().nbytes() > rows.nbytes:
            rows = rows.clone()  # a tensor's copy takes all of its storage along: what others write to, or other shards
        return {**self.__dict__, "_rows": rows, "buffer": None}

    def rows(self) -> torch.Tensor:
        """(n, q).

        Raises:
            CorruptIndexError: The file does not hold what was written.
        """
        if self._rows is None:
            try:
                rows = load_file(self.file.path)["embeds"]
            except (SafetensorError, KeyError, OSError) as error:
                raise self.file.error(str(error)) from error
            # The checksum is of the numbers alone; the file's header says what kind they are.
            found, listed = (tuple(rows.shape), rows.dtype), ((self.count, self.dim), self.dtype)
            if found != listed:
                raise self.file.error(f"it holds embeddings (shape, dtype) {found}, not {listed}")
            if crc32_of(rows) != self.file.crc32:
                raise self.file.error("its checksum differs from the index's")
            # NaN and longer rows would come first in every search. (NaN compares as false.) A few at a time: it is an
            # eighth of the time where the copies in fp32 stay in the processor's cache.
            norms = (torch.linalg.vector_norm(piece.float(), dim=-1) for piece in rows.split(_AT_A_TIME))
            if not all(bool((norm <= _LONGEST_ROW).all()) for norm in norms):
                raise self.file.error("it holds embeddings that are not finite or not of unit norm")
            self._rows = rows
        return self._rows

    def to(self, device: torch.device | str) -> "Shard":
        """A copy whose rows are on `device`."""
        return Shard(self.count, self.rows().to(device), self.file)


def crc32_of(rows: torch.Tensor) -> int:
    """Checksum of a tensor's bytes."""
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy())


def crc32_of_file(path: Path) -> int:
    """Checksum of a file, which is read piece by piece."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


class Entries:
    """Ids and metadata by position, in SQLite: nothing is held in memory but what is asked for. Safe under threads.

    A deleted entry can no longer be found by its id, but still by its position.

    Args:
        file, count: A finished file of `count` entries, opened read-only and checked at first use; a change goes to a
            temporary copy. Without them, a new temporary database. [`in_file`] writes into a file.
    """

    def __init__(self, file: ListedFile | None = None, count: int = 0):
        self.file, self._count = file, count
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()
        self._transactions = 0

    @classmethod
    def in_file(cls, path: Path) -> "Entries":
        """Entries that are written into a file, new or unfinished.

        Raises:
            CorruptIndexError: It is there, and is not a database of entries.
        """
        entries = cls()
        path.touch()  # SQLite's own files are readable by all, whatever the user's umask says
        try:
            entries._connection = connect(path)
            detail = _schema_difference(entries._connection)
        except _DAMAGE as error:
            raise CorruptIndexError(path, str(error)) from error
        if detail:
            raise CorruptIndexError(path, detail)
        return entries

    @property
    def connection(self) -> sqlite3.Connection:
        with self._lock:
            if self._connection is None and self.file is None:
                self._connection = connect("")  # SQLite's own temporary file, once it is large
            elif self._connection is None:
                self._connection = self._open_file()
            return self._connection

    def _open_file(self) -> sqlite3.Connection:
        """The file's connection. What others wrote must neither run nor be run over for ever: there is no view and no
        trigger in it, and no page that leads back to itself."""
        self.file.check()
        connection = sqlite3.connect(
            f"{self.file.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            connection.execute(f"PRAGMA mmap_size = {_MAPPED}")  # as the embeddings are; the check takes half the time
            detail = _schema_difference(connection)
            if not detail and (found := connection.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
                detail = str(found[0])
            if not detail:
                count = connection.execute(_COUNT).fetchone()
                if count != ((self._count, 0, self._count - 1) if self._count else (0, None, None)):
                    detail = f"its entries (number, first, last: {count}) do not match the {self._count} embeddings"
            if not detail:
                connection.execute(_DELETED)
                return connection
        except _DAMAGE as error:
            detail = str(error)
        connection.close()
        raise self.file.error(detail)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            data = self.connection.serialize() if self.file is None else None
            return {"file": self.file, "count": self._count, "data": data}

    def __setstate__(self, state: dict[str, Any]):
        self.__init__(state["file"], state["count"])
        if state["data"] is not None:
            self.connection.deserialize(state["data"])

    def detach(self) -> sqlite3.Connection:
        """Make it a temporary copy, if it is not, which can be changed and does without the file."""
        with self._lock:
            if self.file is not None:
                copy = connect("")
                self.connection.backup(copy)
                self._connection.close()
                self._connection, self.file = copy, None
            return self.connection

    # ---- changing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All changes within it are made, and seen by other threads, or none is."""
        with self._lock:
            connection, self._transactions = self.detach(), self._transactions + 1
            try:
                with connection if self._transactions == 1 else contextlib.nullcontext():
                    yield connection
            except sqlite3.DatabaseError as error:
                if type(error) is sqlite3.DatabaseError:  # and none of the kinds that say what else it is
                    raise self.error(str(error)) from error
                raise
            finally:
                self._transactions -= 1

    def add(self, first: int, rows: Iterable[tuple[str, str]]):
        """Append (id, metadata as JSON) at positions from `first` on; see [`as_entries`].

        Raises:
            ValueError: An id is there already, or occurs twice.
        """
        numbered = ((position, *row) for position, row in enumerate(rows, first))
        try:
            with self.transaction() as connection:
                connection.executemany("INSERT INTO entries VALUES (?, ?, ?)", numbered)
        except sqlite3.IntegrityError as error:
            raise ValueError("Image ids must be unique; at least one occurs twice.") from error

    def delete(self, positions: Sequence[int]):
        rows = [(position,) for position in positions]
        with self.transaction() as connection:
            connection.executemany("INSERT INTO temp.deleted SELECT * FROM entries WHERE position = ?", rows)
            connection.executemany("DELETE FROM entries WHERE position = ?", rows)

    def skip(self, rows: Iterable[tuple[str, str, str]]):
        """Note (id, source, reason) of images that were left out."""
        escaped = [tuple(map(storable, row)) for row in rows]
        with self.transaction() as connection:
            connection.executemany("INSERT INTO skipped VALUES (?, ?, ?)", escaped)

    # ---- reading --------------------------------------------------------------------------------------------------

    def _select(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        with self._lock:
            try:
                return self.connection.execute(query, values).fetchall()
            except _DAMAGE as error:
                raise self.error(str(error)) from error

    def positions(self, ids: Sequence[str]) -> dict[str, int]:
        """The positions of those of `ids` that there are."""
        found: dict[str, int] = {}
        for start in range(0, len(ids), _AT_A_TIME):
            piece = list(ids[start : start + _AT_A_TIME])
            marks = ",".join("?" * len(piece))
            found.update(self._select(f"SELECT id, position FROM entries WHERE id IN ({marks})", piece))  # noqa: S608
        return found

    def at(self, positions: Sequence[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Id and metadata by position, of deleted entries too."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        for table in ("entries", "temp.deleted"):
            wanted = [position for position in positions if position not in found]
            for start in range(0, len(wanted), _AT_A_TIME):
                piece = wanted[start : start + _AT_A_TIME]
                marks = ",".join("?" * len(piece))
                rows = self._select(f"SELECT * FROM {table} WHERE position IN ({marks})", piece)  # noqa: S608
                found.update({row[0]: self._decoded(row)[1:] for row in rows})
        if len(found) < len(positions):
            raise self.error(f"it lacks the entries of positions {[p for p in positions if p not in found][:10]}")
        return found

    def between(self, start: int, stop: int) -> list[tuple[int, str, dict[str, Any]]]:
        """Position, id and metadata of all from `start` to before `stop`, deleted ones too, in order."""
        with self._lock:
            rows = self._select("SELECT * FROM entries WHERE position >= ? AND position < ?", (start, stop))
            rows += self._select("SELECT * FROM temp.deleted WHERE position >= ? AND position < ?", (start, stop))
        return [self._decoded(row) for row in sorted(rows)]  # nearly sorted, by positions that differ

    def _decoded(self, row: tuple) -> tuple[int, str, dict[str, Any]]:
        position, image_id, text = row
        try:
            facts = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise self.error(f"metadata of position {position}: {error}") from error
        if not isinstance(image_id, str) or not isinstance(facts, dict):
            raise self.error(f"position {position} has no id or no metadata")
        return position, image_id, facts

    def error(self, detail: str) -> ValueError:
        return CorruptIndexError(Path("The index"), detail) if self.file is None else self.file.error(detail)

    def matching(self, where: dict[str, Any], count: int) -> list[int]:
        """Positions below `count` whose metadata has every one of `where`'s values, or one of a list of them; of
        metadata that is a list, one of its items.

        Raises:
            ValueError: `where` is not a dict of values as JSON has them.
        """
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where):
            raise ValueError(f"`where` is a dict of metadata names and values, got {where!r}.")
        conditions, values = [], []
        for name, wanted in where.items():
            wanted = as_list(wanted)
            if any(isinstance(value, (dict, list, tuple)) for value in wanted):
                raise ValueError(f"`where` compares texts, numbers, True, False and None, got {name!r}: {wanted}.")
            # A JSON path's quotes cannot be escaped in SQLite, so keys are compared as values; and wanted values are
            # one parameter, as SQLite limits how many there are. Lists and objects have no `atom`.
            one_of = "({0}.atom IN (SELECT atom FROM json_each(?)) OR ({0}.type = 'null' AND ?))"
            conditions.append(
                f"EXISTS (SELECT 1 FROM json_each(metadata) AS fact WHERE fact.key = ? AND ({one_of.format('fact')} OR "
                f"(fact.type = 'array' AND EXISTS (SELECT 1 FROM json_each(fact.value) AS item WHERE "
                f"{one_of.format('item')}))))"
            )
            values += [name, *[as_json(wanted, "`where`"), None in wanted] * 2]
        query = f"SELECT position FROM entries WHERE position < ? AND {' AND '.join(conditions)}"  # noqa: S608
        return [position for (position,) in self._select(query, [count, *values])]

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that were left out, and why."""
        rows = self._select("SELECT id, source, reason FROM skipped")
        return [{"id": image_id, "source": source, "reason": reason} for image_id, source, reason in rows]


def connect(path: str | Path) -> sqlite3.Connection:
    """Open or create a database of entries."""
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.executescript(_SCHEMA)
    connection.execute(_DELETED)
    return connection


def _schema_difference(connection: sqlite3.Connection) -> str | None:
    """What a database of entries has or lacks: a view or a trigger in it would be run by the query of a table."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    with contextlib.closing(connect("")) as known:
        difference = set(known.execute(query)) ^ set(connection.execute(query))
    return f"its tables are not an index's: {sorted(map(str, difference))[:3]}" if difference else None
