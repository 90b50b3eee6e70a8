"""FAISS as a backend of the image index: approximate search for millions of images on one machine."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import is_faiss_available

from .index_storage_fromage import Shard

if is_faiss_available():
    import faiss


class FaissBackend:
    """Proposes positions; the index itself computes their scores.

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
        self.index = None

    @property
    def options(self) -> dict[str, object]:
        return {"factory": self.factory, "nprobe": self.nprobe, "training_size": self.training_size}

    def build(self, shards: Sequence[Shard], dim: int):
        """Train on and add all embeddings, in order.

        Raises:
            ValueError: FAISS does not know the factory string, or there are too few embeddings to train it.
        """
        try:
            self.index = faiss.index_factory(dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"FAISS does not know the factory string {self.factory!r}: {error}") from error
        if not self.index.is_trained:
            step = max(1, -(-sum(shard.count for shard in shards) // self.training_size))
            sample = torch.cat([shard.rows()[::step].float() for shard in shards])
            try:
                self.index.train(sample.cpu().numpy())
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot train {self.factory!r} on {len(sample)} embeddings: {error}. Use fewer lists or "
                    "codes, or the flat backend."
                ) from error
        for shard in shards:
            self.add(shard.rows())

    def add(self, rows: torch.Tensor):
        """Append embeddings (n, q)."""
        self.index.add(rows.float().cpu().numpy())

    def search(self, queries: torch.Tensor, count: int) -> torch.LongTensor:
        """(Q, count) positions of what is near `queries` (Q, q); -1 where no more are found."""
        if self.nprobe is not None and (inner := faiss.try_extract_index_ivf(self.index)) is not None:
            inner.nprobe = self.nprobe
        return torch.from_numpy(self.index.search(queries.cpu().numpy(), count)[1])

    def save(self, path: Path):
        faiss.write_index(self.index, str(path))

    def load(self, path: Path):
        self.index = faiss.read_index(str(path))
