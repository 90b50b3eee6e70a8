"""Ids and metadata of an index, by position, in SQLite."""

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..image_ids_fromage import storable
from .columns import MetadataColumns
from .folder import CorruptIndexError, ListedFile
from .values import as_wanted

_AT_A_TIME = 1000  # ids or positions in one SQL statement
_MAPPED = 1 << 31  # bytes of a file of entries
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
# In this connection alone, never in a file: a search or a save that began before a deletion still finds its entries.
_DELETED = "CREATE TEMP TABLE deleted (position INTEGER PRIMARY KEY, id TEXT, metadata TEXT)"


class MetadataStore:
    """Ids and metadata by position. They stay in SQLite; only what is asked for is held in memory. Thread-safe.

    What stands at a position never changes. A deleted entry can no longer be found by its id, but still by its
    position.

    Args:
        file ([`ListedFile`], *optional*): A finished file, opened read-only and checked at its first use. The first
            change copies it into a temporary database. Without a file, a new temporary database. To write into a file,
            use [`in_file`].
        count (`int`): Number of entries in `file`.
    """

    def __init__(self, file: ListedFile | None = None, count: int = 0):
        self.file, self._count = file, count
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()
        self._transactions = 0
        self._columns = MetadataColumns()

    @classmethod
    def in_file(cls, path: Path) -> "MetadataStore":
        """A store that writes into a file, new or unfinished.

        Raises:
            CorruptIndexError: The file is there, and is not a database of entries.
        """
        store = cls()
        path.touch()  # SQLite's own files are readable by all, whatever the user's umask says
        try:
            store._connection = _connect(path)
            detail = _schema_difference(store._connection)
        except _DAMAGE as error:
            raise CorruptIndexError(path, str(error)) from error
        if detail:
            raise CorruptIndexError(path, detail)
        return store

    @property
    def connection(self) -> sqlite3.Connection:
        with self._lock:
            if self._connection is None:
                # "" is SQLite's own temporary file, once it is large.
                self._connection = _connect("") if self.file is None else self._open(self.file)
            return self._connection

    def _open(self, file: ListedFile) -> sqlite3.Connection:
        """Open the file. Whoever wrote it can neither run anything nor make a query endless: it may hold no view, no
        trigger, and no page that leads back to itself."""
        file.check()
        connection = sqlite3.connect(
            f"{file.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            connection.execute(f"PRAGMA mmap_size = {_MAPPED}")  # as the embeddings are; it halves the check's time
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
        raise file.error(detail)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            data = self.connection.serialize() if self.file is None else None
            return {"file": self.file, "count": self._count, "data": data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MetadataStore.__init__(self, state["file"], state["count"])
        if state["data"] is not None:
            self.connection.deserialize(state["data"])

    def detach(self) -> sqlite3.Connection:
        """Copy a file's entries into a temporary database, which can be changed and does without the file."""
        with self._lock:
            if self.file is not None:
                opened, copy = self.connection, _connect("")
                opened.backup(copy)
                opened.close()
                self._connection, self.file = copy, None
            return self.connection

    # ---- changing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Make all changes within it, or none; other threads see all of them or none."""
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

    def add(self, first: int, rows: Iterable[tuple[str, str]]) -> None:
        """Append (id, metadata as JSON), as [`as_entries`] returns them, at positions from `first` on.

        Raises:
            ValueError: An id is in use, or occurs twice.
        """
        numbered = ((position, *row) for position, row in enumerate(rows, first))
        try:
            with self.transaction() as connection:
                connection.executemany("INSERT INTO entries VALUES (?, ?, ?)", numbered)
        except sqlite3.IntegrityError as error:
            raise ValueError("Image ids must be unique; at least one occurs twice.") from error

    def delete(self, positions: Sequence[int]) -> None:
        """Delete the entries at `positions`."""
        rows = [(position,) for position in positions]
        with self.transaction() as connection:
            connection.executemany("INSERT INTO temp.deleted SELECT * FROM entries WHERE position = ?", rows)
            connection.executemany("DELETE FROM entries WHERE position = ?", rows)

    def skip(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Record (id, source, reason) of images that were left out."""
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
        """Position by id, of those of `ids` that are in the store."""
        found: dict[str, int] = {}
        for start in range(0, len(ids), _AT_A_TIME):
            piece = list(ids[start : start + _AT_A_TIME])
            marks = ",".join("?" * len(piece))
            found.update(self._select(f"SELECT id, position FROM entries WHERE id IN ({marks})", piece))  # noqa: S608
        return found

    def at(self, positions: Sequence[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Id and metadata by position, deleted entries included."""
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
        """Position, id and metadata of the entries from `start` to before `stop`, deleted ones included, in order."""
        with self._lock:
            rows = self._select("SELECT * FROM entries WHERE position >= ? AND position < ?", (start, stop))
            rows += self._select("SELECT * FROM temp.deleted WHERE position >= ? AND position < ?", (start, stop))
        return [self._decoded(row) for row in sorted(rows)]  # nearly sorted, by positions that differ

    def _metadata_between(self, start: int, stop: int) -> list[tuple[int, dict[str, Any]]]:
        """Position and metadata of the same entries: a fifth of the time, as all are decoded in one call."""
        query = "SELECT position, metadata FROM {0} WHERE position >= ? AND position < ?"
        with self._lock:
            rows = self._select(query.format("entries"), (start, stop))
            rows = sorted(rows + self._select(query.format("temp.deleted"), (start, stop)))
        try:
            metadata = json.loads(f"[{','.join(text for _, text in rows)}]")
        except (ValueError, TypeError, RecursionError):
            metadata = []
        if len(metadata) != len(rows) or not all(isinstance(values, dict) for values in metadata):
            metadata = [values for _, _, values in self.between(start, stop)]  # which names the one that is damaged
        return [(position, values) for (position, _), values in zip(rows, metadata, strict=True)]

    def _decoded(self, row: tuple) -> tuple[int, str, dict[str, Any]]:
        position, image_id, text = row
        try:
            metadata = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise self.error(f"metadata of position {position}: {error}") from error
        if not isinstance(image_id, str) or not isinstance(metadata, dict):
            raise self.error(f"position {position} has no id or no metadata")
        return position, image_id, metadata

    def error(self, detail: str) -> ValueError:
        """The error to raise about what is stored."""
        return CorruptIndexError(Path("The index"), detail) if self.file is None else self.file.error(detail)

    def mask(self, where: dict[str, Any], count: int) -> torch.Tensor:
        """Mask of shape (`count`,) of the positions whose metadata has every one of `where`'s values, or one of them
        where it names several; metadata that is a list has each of its items.

        The first filter on a name reads all metadata. Later ones take what [`MetadataColumns`] has kept of it.

        Raises:
            ValueError: `where` is not a dict of strings, numbers, booleans and `None`.
        """
        return torch.from_numpy(self._columns.mask(as_wanted(where), count, self._metadata_between))

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that were left out, and why."""
        rows = self._select("SELECT id, source, reason FROM skipped")
        return [{"id": image_id, "source": source, "reason": reason} for image_id, source, reason in rows]


def _connect(path: str | Path) -> sqlite3.Connection:
    """Open or create a database of entries."""
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.executescript(_SCHEMA)
    connection.execute(_DELETED)
    return connection


def _schema_difference(connection: sqlite3.Connection) -> str | None:
    """How a database of entries differs from this version's. A view or a trigger in it would run when it is queried."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    with contextlib.closing(_connect("")) as known:
        difference = set(known.execute(query)) ^ set(connection.execute(query))
    return f"its tables are not an index's: {sorted(map(str, difference))[:3]}" if difference else None
