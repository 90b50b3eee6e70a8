"""Gradient caching (Gao et al. 2021): a contrastive batch in the memory of one chunk."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from .frozen_lm_fromage import FrozenLM
from .losses_fromage import largest_of_ranks


def in_chunks(
    lm: FrozenLM, branch: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """Run `branch` on chunks of `tensors` (B, ...), each of which is recomputed in the backward pass."""
    size, rows = lm.config.gradient_cache_chunk_size, len(tensors[0])
    if not size or not torch.is_grad_enabled():
        return [branch(*tensors)]
    pieces = [tensor.split(size) for tensor in tensors]
    if lm.traits.is_sharded:  # as many chunks in every process
        count = largest_of_ranks(len(pieces[0]), tensors[0].device)
        if largest_of_ranks(rows < count, tensors[0].device):
            raise ValueError(
                f"With sharded layers all processes run as many chunks, here {count}, and one has fewer sequences "
                f"(this one {rows}). Set `dataloader_drop_last=True`, or a larger `gradient_cache_chunk_size`."
            )
        pieces = [tensor.tensor_split(count) for tensor in tensors]
    if len(pieces[0]) == 1:
        return [branch(*tensors)]
    return [checkpoint(branch, *piece, use_reentrant=False) for piece in zip(*pieces, strict=True)]


__all__ = ["in_chunks"]
