"""What an image index holds at one moment.

Axes: N images, n of them in a shard, q the width of the shared image-text space.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .backends.faiss import FaissBackend
from .store import Shard


@dataclass(frozen=True)
class Snapshot:
    """Nothing in it is ever changed: searches and saves go on with theirs while others add and delete.

    A position is an image's for ever; what is added gets new ones.

    Attributes:
        shards: The embeddings, deleted ones included.
        count: N, deleted ones included.
        kept: (N,), False where an image was deleted; `None` if none was.
        removed: How many were deleted.
        faiss: What proposes positions to approximate searches. It may know of later images, too.
    """

    shards: tuple[Shard, ...] = ()
    count: int = 0
    kept: torch.BoolTensor | None = None
    removed: int = 0
    faiss: FaissBackend | None = None

    def grown(self, shards: tuple[Shard, ...]) -> "Snapshot":
        """With more images, in `shards` that hold this one's at the same positions."""
        count = sum(shard.count for shard in shards)
        kept = None if self.kept is None else torch.cat([self.kept, self.kept.new_ones(count - self.count)])
        return replace(self, shards=shards, count=count, kept=kept)

    def without(self, positions: list[int]) -> "Snapshot":
        """With those of `positions` deleted, which were not before."""
        kept = torch.ones(self.count, dtype=torch.bool) if self.kept is None else self.kept.clone()
        kept[positions] = False
        return replace(self, kept=kept, removed=self.removed + len(positions))

    def rows_from(self, position: int) -> Iterator[torch.Tensor]:
        """The embeddings from `position` on, deleted ones included, a shard at a time."""
        for shard, start, _ in self.pieces():
            if start + shard.count > position:
                yield shard.rows()[max(0, position - start) :]

    def pieces(self) -> Iterator[tuple[Shard, int, torch.BoolTensor | None]]:
        """The shards, their first positions, and which of their images are kept (n,), `None` for all."""
        start = 0
        for shard in self.shards:
            yield shard, start, None if self.kept is None else self.kept[start : start + shard.count]
            start += shard.count

    def kept_rows(self) -> Iterator[torch.Tensor]:
        """The embeddings that are kept, a shard at a time, on the CPU."""
        for shard, _, kept in self.pieces():
            yield shard.rows().cpu() if kept is None else shard.rows().cpu()[kept]


def appended(shards: tuple[Shard, ...], rows: torch.Tensor, device: torch.device, shard_rows: int) -> tuple[Shard, ...]:
    """`shards` and `rows` (n, q) after them, in shards of up to `shard_rows`.

    The last shard grows in a buffer whose end is written to, beyond what earlier snapshots see of it.
    """
    grown, rows = list(shards), rows.to(device)
    with torch.inference_mode(False):  # a buffer made within could not be written to outside of it
        if grown and grown[-1].file is None and grown[-1].count < shard_rows and len(rows):
            last = grown.pop()
            count = min(last.count + len(rows), shard_rows)
            buffer = last.buffer
            if buffer is None or len(buffer) < count:
                buffer = torch.zeros(min(shard_rows, 2 * count), rows.shape[1], dtype=rows.dtype, device=device)
                buffer[: last.count] = last.rows()
            buffer[last.count : count] = rows[: count - last.count]
            grown.append(Shard(count, buffer[:count], buffer=buffer))
            rows = rows[count - last.count :]
        if len(rows):
            grown += [Shard(len(piece), piece) for piece in rows.split(shard_rows)]
    return tuple(grown)
