"""FAISS: approximate search for millions of images on one machine."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import is_faiss_available

from ...file_writing_fromage import replacing
from ..folder import ListedFile
from ..shards import Shard
from .base import Hits, SearchRequest
from .flat import search_flat
from .ranking import cosines, rows_at, search_by_position

if is_faiss_available():
    import faiss

if TYPE_CHECKING:
    from ..metadata_store import MetadataStore
    from ..snapshot import Snapshot

logger = logging.getLogger(__name__)
_LARGEST_OPTION = 1 << 31


class FaissBackend:
    """FAISS proposes positions; the stored embeddings give their cosines. Searches run side by side; a change waits for
    them.

    Args:
        factory (`str`): A factory string of FAISS, over inner products: `"Flat"`, `"IVF1024,Flat"`, `"HNSW32"`,
            `"OPQ64,IVF4096,PQ64"`, ...
        nprobe (`int`, *optional*): Number of lists that a search of an IVF index visits; FAISS's default is 1.
        training_size (`int`): Number of embeddings, evenly spaced, that train it at most.
        k_factor (`int`): Number of proposals for each image that is wanted, of which the stored embeddings tell the
            nearest. More than 1 is for codes such as PQ, which tell neighbours apart badly.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: An option is not of its kind.
    """

    name = "faiss"

    def __init__(
        self,
        factory: str = "Flat",
        nprobe: int | None = None,
        training_size: int = 200_000,
        k_factor: int = 1,
    ):
        if not is_faiss_available():
            raise ImportError("backend='faiss' needs FAISS: pip install 'modeling-fromage[index]' (or faiss-gpu).")
        if not isinstance(factory, str):
            raise ValueError(f"`factory` is a string of `faiss.index_factory`, got {factory!r}.")
        self.factory, self.training_size = factory, _as_count("training_size", training_size)
        self.nprobe = None if nprobe is None else _as_count("nprobe", nprobe)
        self.k_factor = _as_count("k_factor", k_factor)
        self._index: faiss.Index | None = None
        self._file: tuple[ListedFile, int, int] | None = None  # with the count and width of what is in it
        self._opening, self._access = threading.Lock(), _SharedLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opening", "_access")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock(), _access=_SharedLock())

    def copy(self) -> "FaissBackend":
        other = type(self)(**self.options)
        other._file = self._file
        with self._access.shared():
            other._index = None if self._index is None else faiss.clone_index(self._index)
        return other

    @property
    def options(self) -> dict[str, Any]:
        names = ("factory", "nprobe", "training_size", "k_factor")
        return {name: getattr(self, name) for name in names}

    def set_options(self, **options: Any) -> None:
        unknown = sorted(set(options) - {"nprobe", "k_factor"})
        if unknown:
            raise ValueError(f"The search options of the faiss backend are ['k_factor', 'nprobe'], got {unknown}.")
        counts = {name: _as_count(name, value) for name, value in options.items()}
        if "nprobe" in counts and faiss.try_extract_index_ivf(self.index) is None:
            raise ValueError(
                f"The FAISS index {self.factory!r} has no lists, so `nprobe` does not apply. It is for IVF "
                "factories, such as 'IVF1024,Flat'."
            )
        self.nprobe, self.k_factor = counts.get("nprobe", self.nprobe), counts.get("k_factor", self.k_factor)

    @property
    def index(self) -> "faiss.Index":
        """The FAISS index.

        Raises:
            CorruptIndexError: Its file does not hold what was saved.
        """
        with self._opening:
            if self._index is None:
                if self._file is None:
                    raise ValueError("This FAISS backend is empty. Call `build` or `load` first.")
                self._index = _read(*self._file)
            return self._index

    @property
    def size(self) -> int:
        """Number of its embeddings."""
        return self.index.ntotal

    def build(self, snapshot: "Snapshot", dim: int, entries: "MetadataStore") -> None:
        """Train on the embeddings, and add them.

        Raises:
            ValueError: FAISS does not know the factory string, or there are too few embeddings to train it.
        """
        self._fill(snapshot.shards, dim)

    def _fill(self, shards: Sequence[Shard], dim: int) -> None:
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
        for shard in shards:
            index.add(shard.rows().float().cpu().numpy())
        self._index = index

    def add(self, rows: torch.Tensor, entries: Sequence[tuple[str, str]]) -> None:
        index, numbers = self.index, rows.float().cpu().numpy()
        with self._access.alone():
            index.add(numbers)

    def delete(self, ids: Sequence[str]) -> None:
        pass  # what was deleted is masked

    def restore(self, shards: Sequence[Shard]) -> None:
        # What a failed addition left would move all later positions.
        if self.size != sum(shard.count for shard in shards):
            with self._access.alone():
                self.index.reset()
                for shard in shards:
                    self.index.add(shard.rows().float().cpu().numpy())

    def search(self, request: SearchRequest) -> Hits:
        """Approximate; exact with a filter, and where the lists that FAISS visits do not hold enough images."""
        return search_by_position(request, search_flat if request.where else self._find)

    def _find(
        self,
        shards: Sequence[Shard],
        queries: torch.Tensor,
        top_k: int,
        excluded_positions: Sequence[torch.Tensor],
        allowed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`search_flat`] among what FAISS proposes."""
        count, total = sum(shard.count for shard in shards), self.size  # which may know of more by now
        wanted = top_k * self.k_factor + max((len(excluded) for excluded in excluded_positions), default=0)
        while True:
            proposed = self._propose(queries, min(wanted, total))
            usable = (proposed >= 0) & (proposed < count)
            if allowed is not None:
                usable &= allowed[proposed.clamp(0, count - 1)]
            for row, excluded in enumerate(excluded_positions):
                usable[row] &= ~torch.isin(proposed[row], excluded)
            enough = bool((usable.sum(-1) >= top_k).all())
            if enough or wanted >= total or bool((proposed < 0).any()):
                break
            wanted *= 4
        if not enough:
            return search_flat(shards, queries, top_k, excluded_positions, allowed)
        rows = rows_at(shards, proposed.clamp(0, count - 1).flatten()).view(*proposed.shape, -1)
        scores = cosines(queries, rows).masked_fill(~usable, -torch.inf)
        proposed, order = proposed.sort(dim=-1)  # equal cosines rank by position
        scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return scores[:, :top_k], proposed.gather(-1, order)[:, :top_k]

    def _propose(self, queries: torch.Tensor, count: int) -> torch.Tensor:
        """Positions (Q, count) of what is near `queries` (Q, q); -1 where no more are found."""
        index = self.index
        with self._access.shared():
            if self.nprobe is not None and (inner := faiss.try_extract_index_ivf(index)) is not None:
                inner.nprobe = self.nprobe
            return torch.from_numpy(index.search(queries.cpu().numpy(), count)[1])

    def save(self, path: Path, snapshot: "Snapshot", dim: int) -> bool:
        if not snapshot.removed and self._write(path, snapshot.count):
            return True
        # Positions move up, or images were added meanwhile.
        other, rows = type(self)(**self.options), snapshot.kept_rows()
        try:
            other._fill([Shard(len(piece), piece) for piece in rows], dim)
        except ValueError as error:  # the images are not to be lost for it
            logger.warning("Saved without its FAISS index: %s", error)
            return False
        return other._write(path, snapshot.count - snapshot.removed)

    def _write(self, path: Path, count: int) -> bool:
        """Write it, if it has `count` embeddings and not more by now."""
        index = self.index
        with self._access.shared():
            if index.ntotal != count:
                return False
            with replacing(path) as temporary:
                faiss.write_index(index, str(temporary))
            return True

    def load(self, file: ListedFile, count: int, dim: int) -> None:
        self._file = file, count, dim


def _as_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value < _LARGEST_OPTION:
        raise ValueError(f"`{name}` is a whole number from 1 to {_LARGEST_OPTION - 1}, got {value!r}.")
    return int(value)


def _read(file: ListedFile, count: int, dim: int) -> "faiss.Index":
    file.check()
    try:
        index = faiss.read_index(str(file.path))
        ivf = faiss.try_extract_index_ivf(index)
        lists = None if ivf is None else ivf.invlists
        on_disk = lists is not None and isinstance(faiss.downcast_InvertedLists(lists), faiss.OnDiskInvertedLists)
    except (RuntimeError, MemoryError) as error:
        raise file.error(str(error)) from error
    if (index.ntotal, index.d) != (count, dim) or on_disk:
        what = "lists in another file" if on_disk else f"{index.ntotal} embeddings of width {index.d}"
        raise file.error(f"it has {what}, not {count} of width {dim}")
    return index


class _SharedLock:
    """Lets in many at once, or one alone. Whoever comes while one waits to be alone lets that one go first."""

    def __init__(self) -> None:
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
