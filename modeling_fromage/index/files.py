"""The folder of an image index: written so that a kill at any moment leaves a whole index, or one to go on with."""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from ..images_fromage import UnreadableImageError
from .images import IMAGE_FOLDERS, kept_images, own_folders, write_image
from .store import (
    INDEX_FILE,
    SHARD_ROWS,
    CorruptIndexError,
    Entries,
    IndexFolder,
    ListedFile,
    ReplacedIndexError,
    Shard,
    crc32_of,
    crc32_of_file,
)
from .values import as_entries

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)
UNFINISHED_FILE = "building.json"
_FORMAT = 1
_LARGEST_LISTING = 1 << 26  # bytes; 100 million images take 250 kB


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
        CorruptIndexError: It is damaged, or lacks ids or metadata.
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
            self.state, folder = _read_listing(self.directory, UNFINISHED_FILE)
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
            folder = IndexFolder(self.directory, b"")
        self.count = self.state["count"]
        self._entries_file = self.directory / Path(self.state["entries"]["file"]).name
        self.entries = Entries.in_file(self._entries_file)
        self._connection = self.entries.connection
        with self._connection:  # what came after the last checkpoint
            self._connection.execute("DELETE FROM entries WHERE position >= ?", (self.count,))
            self._connection.execute("DELETE FROM skipped WHERE rowid > ?", (self.state["progress"]["skipped"],))
        for position, image in kept_images(self.directory, self.state).items():
            if position >= self.count:
                image.unlink()
        if self._connection.execute("SELECT COUNT(*) FROM entries").fetchone() != (self.count,):
            raise CorruptIndexError(self._entries_file, "it lacks entries")
        self._outgrown: list[str] = []  # files of tails that have grown since
        self._tail: list[torch.Tensor] = []
        self._tail_is_listed = False
        if self.state["shards"] and self.state["shards"][-1]["count"] < SHARD_ROWS:
            self._tail = [_shard(folder, self.state, self.state["shards"][-1]).rows()]
            self._tail_is_listed = True

    @property
    def progress(self) -> dict[str, Any]:
        """What the last checkpoint was told."""
        return self.state["progress"]

    def add(self, rows: torch.Tensor, ids: Sequence[str], metadata: Sequence[dict[str, Any]]):
        """Append images; what is added between two checkpoints stands or falls together.

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

    def keep_image(self, position: int, image: Image.Image | Path) -> Path:
        """Keep an image that has no file or address of its own; one in memory that cannot be read is left out, with a
        warning. Returns its file.

        Raises:
            UnreadableImageError: It was kept before, and is gone.
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
        for path in (self.directory / UNFINISHED_FILE, self._entries_file):
            path.unlink(missing_ok=True)

    def finish(self, facts: dict[str, Any] | None = None, files: Sequence[str] = ()):
        """Complete the index, with more `facts`; of the folder's older index files only `files` are kept."""
        self._list_all(self.progress)
        self._connection.close()
        path = self._entries_file
        self.state["entries"].update(bytes=path.stat().st_size, crc32=crc32_of_file(path))
        self.state.update(facts or {})
        self._write(INDEX_FILE)
        (self.directory / UNFINISHED_FILE).unlink(missing_ok=True)
        kept = {entry["file"] for entry in self.state["shards"]} | {path.name, *files}
        for pattern in ("embeds-*.safetensors", "entries-*.sqlite*", "backend-*.faiss", "embeds-*.tmp", "backend.tmp"):
            for old in self.directory.glob(pattern):
                if old.name not in kept:
                    old.unlink()
        for old in self.directory.glob(IMAGE_FOLDERS):
            if old.name != self.state.get("images") and not old.is_symlink():
                for image in kept_images(self.directory, {"images": old.name}).values():
                    image.unlink()
                with contextlib.suppress(OSError):  # there is something else in it
                    old.rmdir()

    def _list_shard(self, rows: torch.Tensor):
        """Write one shard's file, in the place of the listed tail if that is what it grew from."""
        shards = self.state["shards"]
        if self._tail_is_listed:
            self._outgrown.append(shards.pop()["file"])
        rows = rows.contiguous()
        crc32 = crc32_of(rows)
        path = self.directory / f"embeds-{len(shards):05d}-{crc32:08x}.safetensors"
        temporary = path.with_suffix(".tmp")
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's umask's, where safetensors writes for the owner alone
        save_file({"embeds": rows}, temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
        shards.append({"file": path.name, "count": len(rows), "bytes": path.stat().st_size, "crc32": crc32})

    def _write(self, name: str):
        temporary = self.directory / f"{name}.tmp"
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        os.replace(temporary, self.directory / name)


@contextlib.contextmanager
def one_at_a_time(directory: str | os.PathLike) -> Iterator[None]:
    """Let one thread or process at a time save into a folder: whoever finishes removes what is not of its index.

    On Windows, and on file systems without locks, it is up to the callers.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def read_index_file(directory: Path) -> tuple[dict[str, Any], list[Shard], Entries, IndexFolder]:
    """What `index.json` says, the shards and entries that it lists, and the folder as it is now: no file is read, but
    all have the right size.

    Raises:
        FileNotFoundError: There is no finished index.
        CorruptIndexError: A file is missing, or shorter or longer than it was.
    """
    if not (directory / INDEX_FILE).is_file():
        unfinished = directory / UNFINISHED_FILE
        if unfinished.is_file():
            raise FileNotFoundError(
                f"{directory} holds an unfinished index. Call `build` with this `save_directory` again: it resumes."
            )
        raise FileNotFoundError(f"{directory} holds no image index: it has no {INDEX_FILE}.")
    while True:
        state, folder = _read_listing(directory, INDEX_FILE)
        with contextlib.suppress(ReplacedIndexError):  # just now; then the new one is as good
            shards = [_shard(folder, state, entry) for entry in state["shards"]]
            for entry in (*state["shards"], state["entries"], *([state["faiss"]] if state.get("faiss") else [])):
                _check_size(folder, entry)
            return state, shards, Entries(listed_file(folder, state["entries"]), state["count"]), folder


def _read_listing(directory: Path, name: str) -> tuple[dict[str, Any], IndexFolder]:
    """`index.json` or `building.json`, and the folder as it is now.

    Raises:
        CorruptIndexError: It is not what this version writes.
        ValueError: It is of another format.
    """
    path = directory / name
    try:
        if path.stat().st_size > _LARGEST_LISTING:
            raise CorruptIndexError(path, f"it has more than {_LARGEST_LISTING:,} bytes")
        data = path.read_bytes()
        state = json.loads(data.decode("utf-8"))
        if state["format"] == _FORMAT:
            _check_listing(state, finished=name == INDEX_FILE)
            return state, IndexFolder(directory, data)
    except CorruptIndexError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptIndexError(path, f"{type(error).__name__}: {error}") from error
    raise ValueError(f"{path} is of format {state['format']}, this version reads {_FORMAT}. Upgrade modeling-fromage.")


def _check_listing(state: dict[str, Any], finished: bool):
    """Raise an error (any of those that a wrong type gives) where a listing is not as this version writes it."""
    listed = [*state["shards"], *([state["entries"]] if finished else [])]
    kinds = {
        "dim": int, "dtype": str, "model": (str, type(None)), "image_root": (str, type(None)), "may_read_files": bool,
        "progress": dict, "count": int, **({"images": str} if "images" in state else {}),
    }  # fmt: skip
    _check_kinds(state, kinds)
    _check_kinds({"consumed": 0, "digest": "", "skipped": 0, **state["progress"]},
                 {"consumed": int, "digest": str, "skipped": int})  # fmt: skip
    if state["dim"] < 1 or state["dtype"] not in ("float32", "float16"):
        raise ValueError(f"embeddings of width {state['dim']!r} and dtype {state['dtype']!r}")
    if state.get("faiss"):
        _check_faiss_options(state["faiss"]["options"])
        listed.append(state["faiss"])
    for entry in listed:
        _check_kinds(entry, {"file": str, "bytes": int, "crc32": int})
    _check_kinds(state["entries"], {"file": str})
    row_bytes = state["dim"] * getattr(torch, state["dtype"]).itemsize
    for entry in state["shards"]:
        _check_kinds(entry, {"count": int})
        if not 1 <= entry["count"] <= entry["bytes"] // row_bytes:
            raise ValueError(f"{entry['count']} embeddings in the {entry['bytes']} bytes of {entry['file']}")
    if sum(entry["count"] for entry in state["shards"]) != state["count"]:
        raise ValueError("its shards do not add up to its count")


def _check_faiss_options(options: dict[str, Any]):
    _check_kinds(options, {"factory": str, "nprobe": (int, type(None)), "training_size": int})
    if len(options) > 3 or not all(
        0 < options[name] < 1 << 31 for name in ("nprobe", "training_size") if options[name]
    ):
        raise ValueError(f"FAISS options {options}")


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any]):
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or (isinstance(values[name], bool) and kind is not bool):
            raise TypeError(f"{name} is {str(values[name])[:100]!r}")


def _check_size(folder: IndexFolder, entry: dict[str, Any]):
    file = listed_file(folder, entry)
    try:
        size = file.path.stat().st_size if file.path.is_file() else None
        leads_out = file.path.is_symlink() and not any(
            file.path.resolve().is_relative_to(own) for own in own_folders(folder.path)
        )
    except (OSError, RuntimeError, ValueError) as error:  # a name that is none, a loop of links
        raise file.error(str(error)) from error
    if leads_out:
        raise file.error("it is a link that leads out of the index's folder")
    if size != entry["bytes"]:
        raise file.error(f"it should have {entry['bytes']:,} bytes, and has {size}")


def _shard(folder: IndexFolder, state: dict[str, Any], entry: dict[str, Any]) -> Shard:
    dtype = getattr(torch, state["dtype"])
    return Shard(entry["count"], file=listed_file(folder, entry), dim=state["dim"], dtype=dtype)


def listed_file(folder: IndexFolder, entry: dict[str, Any]) -> ListedFile:
    """The file of an entry of `index.json`: whatever is written there, one of the folder."""
    return ListedFile(folder.path / Path(entry["file"]).name, entry["crc32"], folder)
