"""Crash-safe writer of index folders: an interrupted write leaves the old index or a resumable one."""

import contextlib
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..file_writing_fromage import replacing
from ..images_fromage import UnreadableImageError
from .folder import INDEX_FILE, CorruptIndexError, IndexFolder, crc32_of_file
from .images import IMAGE_FOLDERS, KeptImage, kept_images, write_image
from .metadata_store import MetadataStore
from .reading import FORMAT, MILVUS_FORMAT, UNFINISHED_FILE, listed_shard, read_listing
from .shards import SHARD_ROWS, crc32_of
from .values import as_entries

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)
# Of an index; `.*.tmp` are what a killed writer leaves, and the other temporary names an earlier version's.
_OWN_FILES = (
    "embeds-*.safetensors", "entries-*.sqlite*", "backend-????????.*", ".embeds-*.tmp", ".backend-*.tmp",
    ".index.json.*.tmp", ".building.json.*.tmp", "embeds-*.tmp", "backend.tmp", "index.json.tmp", "building.json.tmp",
)  # fmt: skip


class IndexWriter:
    """Writes embeddings, ids and metadata into a folder, a shard at a time.

    What `building.json` lists is safe: [`checkpoint`] writes it last. [`finish`] turns it into `index.json`, and only
    then removes the files of an older index.

    Args:
        directory (`str` or `os.PathLike`): Created if it is missing.
        header (`dict`): What `index.json` says besides its files: `dim`, `dtype`, `model`, ...
        resume (`bool`): Resume an unfinished index in `directory`, if there is one with the same `header`.
        progress (`dict`, *optional*): Of an index that is written at one go, what [`checkpoint`] would be told.

    Raises:
        ValueError: The unfinished index has another header.
        CorruptIndexError: It is damaged, or lacks ids or metadata.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        header: dict[str, Any],
        resume: bool = False,
        progress: dict[str, Any] | None = None,
    ):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.directory / UNFINISHED_FILE
        if resume and unfinished.is_file():
            self.state, folder = read_listing(self.directory, UNFINISHED_FILE)
            different = {name: (self.state.get(name), value) for name, value in header.items()}
            different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
            if different:
                raise ValueError(
                    f"{directory} holds an unfinished index with other settings, (there, now): {different}. Build with "
                    "those, or into another directory."
                )
        else:
            entries = {"file": f"entries-{uuid.uuid4().hex[:8]}.sqlite"}
            self.state = {"format": FORMAT, **header, "count": 0, "shards": [], "entries": entries}
            self.state["progress"] = {**(progress or {}), "skipped": 0}
            folder = IndexFolder(self.directory, b"")
        self.count = self.state["count"]
        self._entries_file = self.directory / Path(self.state["entries"]["file"]).name
        self.entries = MetadataStore.in_file(self._entries_file)
        self._connection = self.entries.connection
        with self._connection:  # forget what came after the last checkpoint
            self._connection.execute("DELETE FROM entries WHERE position >= ?", (self.count,))
            self._connection.execute("DELETE FROM skipped WHERE rowid > ?", (self.state["progress"]["skipped"],))
        for position, image in kept_images(self.directory, self.state).items():
            if position >= self.count:
                image.unlink()
        if self._connection.execute("SELECT COUNT(*) FROM entries").fetchone() != (self.count,):
            raise CorruptIndexError(self._entries_file, "it lacks entries")
        self._outgrown: list[str] = []  # files of tails that have grown since then
        self._tail: list[torch.Tensor] = []
        self._tail_is_listed = False
        if self.state["shards"] and self.state["shards"][-1]["count"] < SHARD_ROWS:
            self._tail = [listed_shard(folder, self.state, self.state["shards"][-1]).rows()]
            self._tail_is_listed = True

    @property
    def progress(self) -> dict[str, Any]:
        """What the last [`checkpoint`] was told."""
        return self.state["progress"]

    def add(self, rows: torch.Tensor, ids: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Append images. A kill undoes everything since the last checkpoint.

        Raises:
            ValueError: There are not as many `rows` as `ids` and `metadata`, or an id occurs twice.
        """
        if not len(rows) == len(ids) == len(metadata):
            raise ValueError(f"Got {len(rows)} embeddings, {len(ids)} ids and {len(metadata)} metadata entries.")
        self.entries.add(self.count, as_entries(ids, metadata))
        self.count += len(ids)
        self._tail.append(rows)
        while sum(map(len, self._tail)) >= SHARD_ROWS:
            rows = torch.cat(self._tail)
            self._list_shard(rows[:SHARD_ROWS])
            self._tail, self._tail_is_listed = [rows[SHARD_ROWS:]], False

    def keep_image(self, position: int, image: KeptImage) -> Path:
        """Keep an image that has neither path nor URL, and return its file. One that cannot be read is left out with a
        warning.

        Raises:
            UnreadableImageError: Its file was kept before, and is gone.
        """
        folder = self.directory / self.state.setdefault("images", IMAGE_FOLDERS.replace("*", uuid.uuid4().hex[:8]))
        folder.mkdir(exist_ok=True)
        path = folder / f"{position}.png"
        try:
            write_image(image, path)
        except UnreadableImageError as error:
            if isinstance(image, Path) and not image.exists():
                raise
            logger.warning("An image in memory is not kept with the index. %s", error)
        return path

    def reasons(self) -> dict[str, int]:
        """How many images were left out, by reason, the most common first."""
        query = "SELECT reason, COUNT(*) FROM skipped GROUP BY reason ORDER BY COUNT(*) DESC"
        return dict(self._connection.execute(query).fetchall())

    def checkpoint(self, progress: dict[str, Any]) -> None:
        """Make all images so far survive a kill."""
        self._list_all(progress)
        self._write(UNFINISHED_FILE)
        if not (self.directory / INDEX_FILE).is_file():  # it may list them too
            listed = {entry["file"] for entry in self.state["shards"]}
            for name in set(self._outgrown) - listed:
                (self.directory / name).unlink(missing_ok=True)
            self._outgrown = []

    def _list_all(self, progress: dict[str, Any]) -> None:
        tail = torch.cat(self._tail) if self._tail else torch.empty(0)
        if len(tail):
            self._list_shard(tail)
            self._tail, self._tail_is_listed = [tail], True
        skipped = self._connection.execute("SELECT COUNT(*) FROM skipped").fetchone()[0]
        self.state.update(count=self.count, progress={**progress, "skipped": skipped})

    def discard(self) -> None:
        """Remove what was written: there is nothing to resume."""
        self._connection.close()
        for path in (self.directory / UNFINISHED_FILE, self._entries_file):
            path.unlink(missing_ok=True)

    def finish(self, backend: dict[str, Any] | None = None) -> None:
        """Complete the index, and remove the folder's older index files.

        Args:
            backend (`dict`, *optional*): The listing of the backend's file, by the backend's name.
        """
        self._list_all(self.progress)
        self._connection.close()
        path = self._entries_file
        self.state["entries"].update(bytes=path.stat().st_size, crc32=crc32_of_file(path))
        self.state.update(backend or {})
        self._write(INDEX_FILE)
        (self.directory / UNFINISHED_FILE).unlink(missing_ok=True)
        kept = {entry["file"] for entry in (*self.state["shards"], *(backend or {}).values())} | {path.name}
        _remove_others(self.directory, kept, self.state.get("images"))

    def _list_shard(self, rows: torch.Tensor) -> None:
        """Write the file of one shard, in the place of the listed tail if it grew from that."""
        shards = self.state["shards"]
        if self._tail_is_listed:
            self._outgrown.append(shards.pop()["file"])
        rows = rows.contiguous()
        crc32 = crc32_of(rows)
        path = self.directory / f"embeds-{len(shards):05d}-{crc32:08x}.safetensors"
        with replacing(path) as temporary:
            save_file({"embeds": rows}, temporary)
        shards.append({"file": path.name, "count": len(rows), "bytes": path.stat().st_size, "crc32": crc32})

    def _write(self, name: str) -> None:
        _write_listing(self.directory / name, self.state)


def _write_listing(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")


def write_header(directory: Path, state: dict[str, Any]) -> None:
    """Write `index.json` alone, for an index whose contents are elsewhere, in the place of an index that is there."""
    _write_listing(directory / INDEX_FILE, {"format": MILVUS_FORMAT, **state})
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)
    _remove_others(directory, set(), None)


def _remove_others(directory: Path, kept: set[str], images: str | None) -> None:
    """Remove the files of other indexes than that of the files `kept` and the folder `images`."""
    for pattern in _OWN_FILES:
        for old in directory.glob(pattern):
            if old.name not in kept:
                old.unlink()
    for old in directory.glob(IMAGE_FOLDERS):
        if old.name != images and not old.is_symlink():
            for image in kept_images(directory, {"images": old.name}).values():
                image.unlink()
            with contextlib.suppress(OSError):  # there is something else in it
                old.rmdir()


@contextlib.contextmanager
def one_at_a_time(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Let one thread or process at a time save into a folder, as each removes the files of other indexes at its end.

    Windows and file systems without locks leave this to the callers.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
