"""The folder of an image index: written so that a kill at any moment leaves a whole index, or one to go on with."""

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .index_storage_fromage import (
    SHARD_ROWS,
    CorruptIndexError,
    Entries,
    Shard,
    crc32_of,
    crc32_of_file,
)

INDEX_FILE, UNFINISHED_FILE = "index.json", "building.json"
_FORMAT = 1


class IndexWriter:
    """Writes embeddings, ids and metadata into a folder, a shard at a time.

    What is listed in `building.json` is safe: [`checkpoint`] writes it last. [`finish`] turns it into `index.json`, and
    only then removes the files of an older index.

    Args:
        directory: Created where it is missing.
        facts: JSON-serialisable, kept in the index: `dim`, `dtype`, `model`, ...
        resume: Go on with an unfinished index in `directory`, if there is one with the same `facts`.
        progress: For an index that is written at one go, what [`checkpoint`] would be told.

    Raises:
        ValueError: What is to be resumed has other facts.
        CorruptIndexError: It lacks ids or metadata.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        facts: dict[str, Any],
        resume: bool = False,
        progress: dict[str, Any] | None = None,
    ):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.directory / UNFINISHED_FILE
        if resume and unfinished.is_file():
            self.state = json.loads(unfinished.read_text(encoding="utf-8"))
            different = {name: (self.state.get(name), value) for name, value in facts.items()}
            different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
            if different:
                raise ValueError(
                    f"{directory} holds an unfinished index with other settings, (there, now): {different}. Build with "
                    "those, or into another directory."
                )
        else:
            entries = {"file": f"entries-{uuid.uuid4().hex[:8]}.sqlite"}
            self.state = {"format": _FORMAT, **facts, "count": 0, "shards": [], "entries": entries}
            self.state["progress"] = {**(progress or {}), "skipped": 0}
        self.count = self.state["count"]
        self.entries = Entries.in_file(self.directory / self.state["entries"]["file"])
        self._connection = self.entries.connection
        with self._connection:  # what came after the last checkpoint
            self._connection.execute("DELETE FROM entries WHERE position >= ?", (self.count,))
            self._connection.execute("DELETE FROM skipped WHERE rowid > ?", (self.state["progress"]["skipped"],))
        if self._connection.execute("SELECT COUNT(*) FROM entries").fetchone() != (self.count,):
            raise CorruptIndexError(self.directory / self.state["entries"]["file"], "it lacks entries")
        self._outgrown: list[str] = []  # files of tails that have grown since
        self._tail: list[torch.Tensor] = []
        self._tail_is_listed = False
        if self.state["shards"] and self.state["shards"][-1]["count"] < SHARD_ROWS:
            self._tail = [_shard(self.directory, self.state["shards"][-1]).rows()]
            self._tail_is_listed = True

    @property
    def progress(self) -> dict[str, Any]:
        """What the last checkpoint was told."""
        return self.state["progress"]

    def add(self, rows: torch.Tensor, ids: Sequence[str], metadata: Sequence[dict[str, Any]]):
        """Append images; what is added between two checkpoints stands or falls together."""
        self.entries.add(self.count, ids, metadata)
        self.count += len(ids)
        self._tail.append(rows)
        while sum(map(len, self._tail)) >= SHARD_ROWS:
            rows = torch.cat(self._tail)
            self._list_shard(rows[:SHARD_ROWS])
            self._tail, self._tail_is_listed = [rows[SHARD_ROWS:]], False

    def reasons(self) -> dict[str, int]:
        """How many images were left out, by reason, the most common first."""
        query = "SELECT reason, COUNT(*) FROM skipped GROUP BY reason ORDER BY COUNT(*) DESC"
        return dict(self._connection.execute(query).fetchall())

    def checkpoint(self, progress: dict[str, Any]):
        """Make what was added so far survive a kill."""
        self._list_all(progress)
        self._write(UNFINISHED_FILE)
        if not (self.directory / INDEX_FILE).is_file():  # which may list them too
            listed = {entry["file"] for entry in self.state["shards"]}
            for name in set(self._outgrown) - listed:
                (self.directory / name).unlink(missing_ok=True)
            self._outgrown = []

    def _list_all(self, progress: dict[str, Any]):
        tail = torch.cat(self._tail) if self._tail else torch.empty(0)
        if len(tail):
            self._list_shard(tail)
            self._tail, self._tail_is_listed = [tail], True
        skipped = self._connection.execute("SELECT COUNT(*) FROM skipped").fetchone()[0]
        self.state.update(count=self.count, progress={**progress, "skipped": skipped})

    def discard(self):
        """Remove what was written, with nothing to go on from."""
        self._connection.close()
        for name in (UNFINISHED_FILE, self.state["entries"]["file"]):
            (self.directory / name).unlink(missing_ok=True)

    def finish(self, facts: dict[str, Any] | None = None, files: Sequence[str] = ()):
        """Complete the index, with more `facts`; of the folder's older index files only `files` are kept."""
        self._list_all(self.progress)
        self._connection.close()
        path = self.directory / self.state["entries"]["file"]
        self.state["entries"].update(bytes=path.stat().st_size, crc32=crc32_of_file(path))
        self.state.update(facts or {})
        self._write(INDEX_FILE)
        (self.directory / UNFINISHED_FILE).unlink(missing_ok=True)
        kept = {entry["file"] for entry in self.state["shards"]} | {path.name, *files}
        for pattern in ("embeds-*.safetensors", "entries-*.sqlite*", "backend-*.faiss", "embeds-*.tmp", "backend.tmp"):
            for old in self.directory.glob(pattern):
                if old.name not in kept:
                    old.unlink()

    def _list_shard(self, rows: torch.Tensor):
        """Write one shard's file, in the place of the listed tail if that is what it grew from."""
        shards = self.state["shards"]
        if self._tail_is_listed:
            self._outgrown.append(shards.pop()["file"])
        rows = rows.contiguous()
        crc32 = crc32_of(rows)
        path = self.directory / f"embeds-{len(shards):05d}-{crc32:08x}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({"embeds": rows}, temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
        shards.append({"file": path.name, "count": len(rows), "bytes": path.stat().st_size, "crc32": crc32})

    def _write(self, name: str):
        temporary = self.directory / f"{name}.tmp"
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        os.replace(temporary, self.directory / name)


def read_index_file(directory: Path) -> tuple[dict[str, Any], list[Shard], Entries]:
    """What `index.json` says, and the shards and entries that it lists: none is read, but all have the right size.

    Raises:
        FileNotFoundError: There is no finished index.
        CorruptIndexError: A file is missing, or shorter or longer than it was.
    """
    path = directory / INDEX_FILE
    if not path.is_file():
        unfinished = directory / UNFINISHED_FILE
        if unfinished.is_file():
            raise FileNotFoundError(
                f"{directory} holds an unfinished index. Call `build` with this `save_directory` again: it resumes."
            )
        raise FileNotFoundError(f"{directory} holds no image index: it has no {INDEX_FILE}.")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] == _FORMAT:
            return state, *_listed_files(directory, state)
    except CorruptIndexError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptIndexError(path, f"{type(error).__name__}: {error}") from error
    raise ValueError(f"{path} is of format {state['format']}, this version reads {_FORMAT}. Upgrade modeling-fromage.")


def _listed_files(directory: Path, state: dict[str, Any]) -> tuple[list[Shard], Entries]:
    if missing := {"dim", "dtype", "model", "image_root", "may_read_files", "progress"} - state.keys():
        raise ValueError(f"it lacks {sorted(missing)}")
    if not isinstance(state["dim"], int) or state["dtype"] not in ("float32", "float16"):
        raise ValueError(f"embeddings of width {state['dim']!r} and dtype {state['dtype']!r}")
    if sum(entry["count"] for entry in state["shards"]) != state["count"]:
        raise ValueError("its shards do not add up to its count")
    for entry in (*state["shards"], state["entries"], *([state["faiss"]] if state.get("faiss") else [])):
        if not isinstance(entry["crc32"], int):
            raise ValueError(f"no checksum of {entry['file']}")
        file = listed_file(directory, entry)
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise CorruptIndexError(file, f"it should have {entry['bytes']:,} bytes, and has {size}")
    shards = [_shard(directory, entry) for entry in state["shards"]]
    return shards, Entries(listed_file(directory, state["entries"]), state["entries"]["crc32"])


def _shard(directory: Path, entry: dict[str, Any]) -> Shard:
    return Shard(entry["count"], path=listed_file(directory, entry), crc32=entry["crc32"])


def listed_file(directory: Path, entry: dict[str, Any]) -> Path:
    """The file of an entry of `index.json`: whatever is written there, one of the folder."""
    return directory / Path(entry["file"]).name
