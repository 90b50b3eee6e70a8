"""The embeddings of an index, in shards: in memory, or in files that are mapped and checked when they are first used.

Axes: n images of a shard, q the width of the shared image-text space.
"""

import zlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .folder import ListedFile

SHARD_ROWS = 65_536  # one file: 32 MB in fp16 at q = 256
_ROWS_AT_A_TIME = 1000  # whose norms are computed together
LONGEST_ROW = 1.01  # the norm of a unit-norm embedding, with room for its rounding to fp16


class Shard:
    """Up to `SHARD_ROWS` unit-norm embeddings (n, q).

    Args:
        count (`int`): n.
        rows (`torch.Tensor` of shape `(n, q)`, *optional*): The embeddings, if they are in memory.
        file ([`ListedFile`], *optional*): Their file otherwise. It is mapped, not read, and checked once.
        dim, dtype: What the embeddings of the file must be like.
        buffer (`torch.Tensor`, *optional*): A larger tensor that `rows` are the beginning of.
    """

    def __init__(
        self,
        count: int,
        rows: torch.Tensor | None = None,
        file: ListedFile | None = None,
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        buffer: torch.Tensor | None = None,
    ):
        self.count, self._rows, self.file, self.dim, self.dtype = count, rows, file, dim, dtype
        self.buffer = buffer

    def __getstate__(self) -> dict[str, Any]:
        rows = self._rows
        if rows is not None and rows.untyped_storage().nbytes() > rows.nbytes:
            rows = rows.clone()  # a pickled view takes its whole storage along: the buffer, or other shards
        return {**self.__dict__, "_rows": rows, "buffer": None}

    def rows(self) -> torch.Tensor:
        """The embeddings (n, q).

        Raises:
            CorruptIndexError: The file does not hold what was written.
        """
        if self._rows is None:
            if self.file is None:
                raise ValueError("A shard needs its rows or their file.")
            self._rows = self._mapped(self.file)
        return self._rows

    def _mapped(self, file: ListedFile) -> torch.Tensor:
        try:
            rows = load_file(file.path)["embeds"]
        except (SafetensorError, KeyError, OSError) as error:
            raise file.error(str(error)) from error
        # The checksum covers the numbers alone. The header of the file says what kind they are.
        found, listed = (tuple(rows.shape), rows.dtype), ((self.count, self.dim), self.dtype)
        if found != listed:
            raise file.error(f"it holds embeddings (shape, dtype) {found}, not {listed}")
        if crc32_of(rows) != file.crc32:
            raise file.error("its checksum differs from the index's")
        # NaN and longer rows would come first in every search. (NaN compares as false.) Pieces whose fp32 copies stay
        # in the processor's cache take an eighth of the time.
        norms = (torch.linalg.vector_norm(piece.float(), dim=-1) for piece in rows.split(_ROWS_AT_A_TIME))
        if not all(bool((norm <= LONGEST_ROW).all()) for norm in norms):
            raise file.error("it holds embeddings that are not finite or not of unit norm")
        return rows

    def to(self, device: torch.device | str) -> "Shard":
        """A copy whose rows are on `device`."""
        return Shard(self.count, self.rows().to(device), self.file)


def crc32_of(rows: torch.Tensor) -> int:
    """Checksum of a tensor's bytes."""
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy().data)


def appended(shards: tuple[Shard, ...], rows: torch.Tensor, device: torch.device) -> tuple[Shard, ...]:
    """`shards` followed by `rows` (n, q), in shards of up to `SHARD_ROWS`.

    The last shard grows in a buffer. Earlier snapshots see only the beginning of it, which never changes.
    """
    grown, rows = list(shards), rows.to(device)
    with torch.inference_mode(False):  # a buffer made within could not be written to outside of it
        if grown and grown[-1].file is None and grown[-1].count < SHARD_ROWS and len(rows):
            last = grown.pop()
            count = min(last.count + len(rows), SHARD_ROWS)
            buffer = last.buffer
            if buffer is None or len(buffer) < count:
                buffer = torch.zeros(min(SHARD_ROWS, 2 * count), rows.shape[1], dtype=rows.dtype, device=device)
                buffer[: last.count] = last.rows()
            buffer[last.count : count] = rows[: count - last.count]
            grown.append(Shard(count, buffer[:count], buffer=buffer))
            rows = rows[count - last.count :]
        if len(rows):
            grown += [Shard(len(piece), piece) for piece in rows.split(SHARD_ROWS)]
    return tuple(grown)
