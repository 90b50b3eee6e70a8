"""What each of several processes gets of an epoch's batches."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate.data_loader import BatchSamplerShard

logger = logging.getLogger(__name__)


class RankBatches(BatchSamplerShard):
    """This process's share of each global batch, so that an epoch in several processes takes the steps that one process
    takes with batches of their joint size.

    accelerate fills the last, smaller batch up with the first examples, which would count twice. Here each process gets
    an equal share of it, give or take one. Of fewer examples than processes, all of them get all: the gradients are
    those of one process (nearly, with `mask_duplicate_images`), and the contrastive loss is larger by the logarithm of
    the number of processes.
    """

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(self.batch_sampler.sampler)
        while batch := list(islice(numbers, self.num_processes * self.batch_sampler.batch_size)):
            if len(batch) < self.num_processes * self.batch_sampler.batch_size and self.drop_last:
                return
            first, end = (
                len(batch) * rank // self.num_processes for rank in (self.process_index, self.process_index + 1)
            )
            yield batch[first:end] if len(batch) >= self.num_processes else batch


def share_last_batch(dataloader: Any) -> Any:
    """Let a training `dataloader` that accelerate has prepared share the last batch out: see [`RankBatches`]."""
    sampler = dataloader.batch_sampler
    if type(sampler) is BatchSamplerShard and sampler.num_processes > 1 and not sampler.split_batches:
        shares = RankBatches(sampler.batch_sampler, sampler.num_processes, sampler.process_index)
        vars(dataloader.base_dataloader)["batch_sampler"] = shares  # torch refuses to set it
    return dataloader


__all__ = ["RankBatches", "share_last_batch"]
