"""What an index holds at one moment.

Axes: N images, n of them in a shard, q the width of the shared image-text space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .backends.base import SearchBackend
from .backends.flat import FlatBackend
from .shards import Shard


@dataclass(frozen=True)
class Snapshot:
    """An immutable state of an index. A search or a save keeps to its snapshot while others add and delete.

    A position belongs to one image for ever; whatever is added gets new positions.

    Attributes:
        shards: The embeddings, deleted ones included.
        count: N, deleted ones included.
        kept: Mask of shape (N,), False where an image was deleted; `None` if none was.
        removed: Number of deleted images.
        backend: What searches. It may know of later images, too.
    """

    shards: tuple[Shard, ...] = ()
    count: int = 0
    kept: torch.Tensor | None = None
    removed: int = 0
    backend: SearchBackend = field(default_factory=FlatBackend)

    def grown(self, shards: tuple[Shard, ...]) -> "Snapshot":
        """With more images, in `shards` that hold the present ones at the same positions."""
        count = sum(shard.count for shard in shards)
        kept = None if self.kept is None else torch.cat([self.kept, self.kept.new_ones(count - self.count)])
        return replace(self, shards=shards, count=count, kept=kept)

    def without(self, positions: Sequence[int]) -> "Snapshot":
        """With the images at `positions` deleted, which were not before."""
        kept = torch.ones(self.count, dtype=torch.bool) if self.kept is None else self.kept.clone()
        kept[list(positions)] = False
        return replace(self, kept=kept, removed=self.removed + len(positions))

    def rows_from(self, position: int) -> Iterator[torch.Tensor]:
        """The embeddings from `position` on, deleted ones included, a shard at a time."""
        for shard, start, _ in self.pieces():
            if start + shard.count > position:
                yield shard.rows()[max(0, position - start) :]

    def pieces(self) -> Iterator[tuple[Shard, int, torch.Tensor | None]]:
        """Each shard, its first position, and the mask (n,) of its images that are kept, `None` for all."""
        start = 0
        for shard in self.shards:
            yield shard, start, None if self.kept is None else self.kept[start : start + shard.count]
            start += shard.count

    def kept_rows(self) -> Iterator[torch.Tensor]:
        """The embeddings that are kept, a shard at a time, on the CPU."""
        for shard, _, kept in self.pieces():
            yield shard.rows().cpu() if kept is None else shard.rows().cpu()[kept]
