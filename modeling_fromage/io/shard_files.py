"""What shards of all formats share: an index of their rows, and reads that processes do not disturb each other by."""

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..file_writing_fromage import replace_file
from .columns import document_columns


class Shard(ABC):
    """A file of examples that are read in place, by number.

    Args:
        path: The file.
        image_column, caption_column: Columns of images and captions; by default found by their names.
        index_dir: A folder that keeps the index, so that the next run need not make it, and memory need not hold it.
    """

    suffixes: tuple[str, ...]
    documents: tuple[str, ...] = ()  # the columns that hold documents, of a shard that has these

    def __init__(
        self,
        path: Path,
        image_column: str | None = None,
        caption_column: str | None = None,
        index_dir: Path | None = None,
    ):
        self.path, self.image_column, self.caption_column = path, image_column, caption_column
        found = path.stat()
        self._stamp = (str(path.absolute()), found.st_size, found.st_mtime_ns)
        self._kept: str | None = None
        if index_dir is None:
            self._held = self.make_index()
            return
        digest = hashlib.sha256(repr((self._stamp, type(self).__name__, image_column, caption_column)).encode())
        kept = index_dir / f"{path.name[:100]}.{digest.hexdigest()[:16]}.npy"
        if not kept.is_file():
            contents = io.BytesIO()
            np.save(contents, self.make_index())
            index_dir.mkdir(parents=True, exist_ok=True)
            replace_file(kept, contents.getvalue())
        self._kept = str(kept)
        self._count = len(_map(self._kept))

    def documents_among(self, columns: Iterable[str]) -> tuple[str, ...]:
        """The columns that hold documents, unless those of images or captions are named."""
        return document_columns(columns) if self.image_column is self.caption_column is None else ()

    @property
    def index(self) -> np.ndarray:
        return self._held if self._kept is None else _map(self._kept)

    @abstractmethod
    def make_index(self) -> np.ndarray:
        """An array with a row for each example, which tells where it lies."""

    @abstractmethod
    def read(self, number: int, with_image: bool = True) -> dict[str, Any]:
        """An example: `image`, `caption`, `place`, or a document; and `problem` where its row cannot be read."""

    def __len__(self) -> int:
        return len(self._held) if self._kept is None else self._count

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """`(rows, bytes to keep)` of the pieces that are read in one go, one after the other, of about `rows` rows."""
        return [(min(rows, len(self) - start), 0) for start in range(0, len(self), rows)]

    def pread(self, start: int, end: int) -> bytes:
        return os.pread(_open(*self._stamp).fileno(), end - start, start)  # leaves no position that a fork could share


@functools.lru_cache(maxsize=64)
def _map(path: str) -> np.ndarray:
    """An index that is kept: as few are mapped at a time as shards are open, since each holds a descriptor."""
    return np.load(path, mmap_mode="r")


@functools.lru_cache(maxsize=64)
def _open(path: str, size: int, mtime_ns: int) -> io.FileIO:
    """The file, opened once a process, as long as it is the same one."""
    return io.FileIO(path)


def close_files() -> None:
    """Close the files of this process: one that was removed takes up its room on the disk until then."""
    _open.cache_clear()


__all__ = ["Shard", "close_files"]
