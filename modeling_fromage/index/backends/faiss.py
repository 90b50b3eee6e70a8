"""FAISS as a backend of the image index: approximate search for millions of images on one machine."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_faiss_available

from ..store import ListedFile, Shard

if is_faiss_available():
    import faiss


class FaissBackend:
    """Proposes positions; the index itself computes their scores. Searches run side by side; a change waits for them.

    Args:
        factory: A string of `faiss.index_factory`, over inner products: `"Flat"`, `"IVF1024,Flat"`, `"HNSW32"`,
            `"OPQ64,IVF4096,PQ64"`, ...
        nprobe: Lists that a search of an IVF index visits; FAISS's default is 1.
        training_size: Most embeddings that train it, evenly spaced.

    Raises:
        ImportError: FAISS is not installed.
    """

    def __init__(self, factory: str = "Flat", nprobe: int | None = None, training_size: int = 200_000):
        if not is_faiss_available():
            raise ImportError("backend='faiss' needs FAISS: pip install 'modeling-fromage[index]' (or faiss-gpu).")
        self.factory, self.nprobe, self.training_size = factory, nprobe, training_size
        self._index = None
        self._file: tuple[ListedFile, int, int] | None = None  # and the count and width of what is in it
        self._opening, self._access = threading.Lock(), _SharedLock()

    @classmethod
    def from_file(cls, file: ListedFile, count: int, dim: int, options: dict[str, Any]) -> "FaissBackend":
        """A saved one, read and checked when it is first used."""
        backend = cls(**options)
        backend._file = file, count, dim
        return backend

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opening", "_access")}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state, _opening=threading.Lock(), _access=_SharedLock())

    def copy(self) -> "FaissBackend":
        """One that can be changed by itself."""
        other = type(self)(**self.options)
        other._file = self._file
        with self._access.shared():
            other._index = None if self._index is None else faiss.clone_index(self._index)
        return other

    @property
    def options(self) -> dict[str, object]:
        return {"factory": self.factory, "nprobe": self.nprobe, "training_size": self.training_size}

    @property
    def index(self) -> "faiss.Index":
        """
        Raises:
            CorruptIndexError: The file does not hold what was saved.
        """
        with self._opening:
            if self._index is None:
                self._index = self._read(*self._file)
            return self._index

    def _read(self, file: ListedFile, count: int, dim: int) -> "faiss.Index":
        file.check()
        try:
            index = faiss.read_index(str(file.path))
            ivf = faiss.try_extract_index_ivf(index)
            on_disk = ivf is not None and isinstance(
                faiss.downcast_InvertedLists(ivf.invlists), faiss.OnDiskInvertedLists
            )
        except (RuntimeError, MemoryError) as error:
            raise file.error(str(error)) from error
        if (index.ntotal, index.d) != (count, dim) or on_disk:
            what = "lists in another file" if on_disk else f"{index.ntotal} embeddings of width {index.d}"
            raise file.error(f"it has {what}, not {count} of width {dim}")
        return index

    @property
    def size(self) -> int:
        """How many embeddings it has."""
        return self.index.ntotal

    def build(self, shards: Sequence[Shard], dim: int):
        """Train on and add all embeddings, in order.

        Raises:
            ValueError: FAISS does not know the factory string, or there are too few embeddings to train it.
        """
        try:
            index = faiss.index_factory(dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"FAISS does not know the factory string {self.factory!r}: {error}") from error
        if not index.is_trained:
            step = max(1, -(-sum(shard.count for shard in shards) // self.training_size))
            sample = torch.cat([shard.rows()[::step].float() for shard in shards])
            try:
                index.train(sample.cpu().numpy())
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot train {self.factory!r} on {len(sample)} embeddings: {error}. Use fewer lists or "
                    "codes, or the flat backend."
                ) from error
        self._index = index
        for shard in shards:
            self.add(shard.rows())

    def add(self, rows: torch.Tensor):
        """Append embeddings (n, q)."""
        index, numbers = self.index, rows.float().cpu().numpy()
        with self._access.alone():
            index.add(numbers)

    def restore(self, shards: Sequence[Shard]):
        """Go back to `shards` after an addition that failed: what it left would move all later positions."""
        if self.size != sum(shard.count for shard in shards):
            with self._access.alone():
                self.index.reset()
                for shard in shards:
                    self.index.add(shard.rows().float().cpu().numpy())

    def search(self, queries: torch.Tensor, count: int) -> torch.LongTensor:
        """(Q, count) positions of what is near `queries` (Q, q); -1 where no more are found."""
        index = self.index
        with self._access.shared():
            if self.nprobe is not None and (inner := faiss.try_extract_index_ivf(index)) is not None:
                inner.nprobe = self.nprobe
            return torch.from_numpy(index.search(queries.cpu().numpy(), count)[1])

    def save(self, path: Path, count: int) -> bool:
        """Write it, if it has `count` embeddings and not more by now."""
        index = self.index
        with self._access.shared():
            if index.ntotal != count:
                return False
            faiss.write_index(index, str(path))
            return True


class _SharedLock:
    """Many at once, or one alone; those who come while one waits to be alone let it go first."""

    def __init__(self):
        self._door, self._left, self._inside = threading.Lock(), threading.Condition(), 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._door, self._left:
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._door, self._left:
            self._left.wait_for(lambda: not self._inside)
            yield
