"""Epochs in the order that a dataset gives: one that suits its disks, or mixes its sources."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochOrderSampler(Sampler[int]):
    """The examples of a dataset in the order of its `epoch_order(seed, epoch)`, an array of their numbers.

    An epoch may have more numbers than the dataset has examples, or fewer, but as many as any other epoch.

    Args:
        dataset: A map-style dataset with `epoch_order`.
        seed (`int`): Seed of all epochs.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        self._known: tuple[int, np.ndarray] | None = None  # the order of an epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _order(self) -> np.ndarray:
        if self._known is None or self._known[0] != self.epoch:
            self._known = self.epoch, self.dataset.epoch_order(self.seed, self.epoch)
        return self._known[1]

    def __iter__(self) -> Iterator[int]:
        return map(int, self._order())

    def __len__(self) -> int:
        return len(self._order())


class SetEpochCallback(TrainerCallback):
    """Tells the sampler of the training data which epoch begins.

    accelerate's `DataLoaderShard.set_epoch` looks for it two wrappers deep; in a run of several processes that goes on
    in the middle of an epoch it is three deep, and would give the first epoch again.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        wrapper = train_dataloader
        while getattr(wrapper, "batch_sampler", None) is not None:
            wrapper = wrapper.batch_sampler
        sampler: Any = getattr(wrapper, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))


def epoch_order_sampler(dataset: Any, args: TrainingArguments) -> EpochOrderSampler | None:
    """The sampler of a training set that gives its epochs an order; `None` for others, and where `args` ask for another
    order than a random one."""
    if not hasattr(dataset, "epoch_order") or args.train_sampling_strategy != "random":
        return None
    return EpochOrderSampler(dataset, args.seed if args.data_seed is None else args.data_seed)


__all__ = ["EpochOrderSampler", "SetEpochCallback", "epoch_order_sampler"]
