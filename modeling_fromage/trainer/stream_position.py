"""Where a run is in a training stream of unknown length, of which the Trainer counts no epochs."""

from typing import Any, cast

import torch
from accelerate.state import GradientState
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from .draws import drawn_number

_NAME = "stream_position"  # in a checkpoint's `trainer_state.json`


class StreamPosition(TrainerCallback):
    """Counts the epochs of a stream, and the batches that this process has taken of the current one.

    The Trainer takes each pass over a stream as an epoch, but when it resumes, it works out epoch and batch from
    `max_steps`, as if the first epoch never ended. Where data have a length, its own count is right and kept.

    Shards differ in size, so that each process has a position of its own; checkpoints hold those of all processes.
    """

    def __init__(self) -> None:
        self.epoch, self.batches = 0, 0
        self._is_counted = self._is_over = False
        self._generator = torch.Generator()

    def count(self, dataloader: Any) -> Any:
        """Count the epochs of a training `dataloader` that has no length. One of a stream draws the seeds of its
        workers from the epoch, not from the global generator, of whose state a resumed run would need an earlier one.

        Raises:
            ValueError: Its workers would not learn which epoch it is.
        """
        _refuse_deaf_workers(dataloader)
        self._is_counted = not has_length(dataloader)
        if isinstance(dataloader.dataset, IterableDataset):
            dataloader.base_dataloader.generator = self._generator  # of accelerate, which wraps that of torch
        return dataloader

    def start(self, given: tuple[int, int], state: TrainerState, args: TrainingArguments) -> tuple[int, int]:
        """The epoch that a run starts in and the batches of it to skip, `given` as the Trainer has them.

        Raises:
            ValueError: The checkpoint was saved by another number of processes or workers, or holds no position and is
                past the first epoch.
        """
        saved = _states(state).get(_NAME, {"positions": [], "workers": 0})
        positions, workers = saved["positions"], saved["workers"]
        is_first = not positions and (state.epoch or 0) < 1  # of a checkpoint of the plain Trainer
        self.epoch, self.batches, self._is_over = *given, False
        if not self._is_counted or not state.global_step or args.ignore_data_skip or is_first:
            return given
        if (len(positions), workers) != (args.world_size, args.dataloader_num_workers):
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds the positions in the stream of {len(positions)} "
                f"processes with {workers} workers each, but {args.world_size} with {args.dataloader_num_workers} "
                "resume it, which would read it in another order. Resume it with as many, or read the stream from its "
                "start: `ignore_data_skip=True`."
            )
        self.epoch, self.batches = positions[args.process_index]
        return self.epoch, self.batches

    def take(self, batches: list[Any], wanted: int) -> list[Any]:
        """The batches of a step, counted. At an epoch's end fewer than those `wanted` to accumulate are dropped: the
        Trainer would add their gradients to those of the next step."""
        if not self._is_counted:
            return batches
        self._is_over = len(batches) < wanted or GradientState().end_of_dataloader
        taken = batches if len(batches) == wanted else []
        self.batches += len(taken)
        return taken

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = self.epoch if self._is_counted else int(state.epoch or 0)
        self._generator.manual_seed(drawn_number(args.seed, "stream", epoch))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_over or control.should_epoch_stop:  # else training stops within the epoch
            self.epoch, self.batches, self._is_over = self.epoch + 1, 0, False

    def save(self, state: TrainerState, args: TrainingArguments) -> None:
        """Put the positions into the state of a checkpoint. The processes call this together."""
        _states(state).pop(_NAME, None)
        if self._is_counted:
            positions = gather_object([[self.epoch, self.batches]])
            _states(state)[_NAME] = {"positions": positions, "workers": args.dataloader_num_workers}


def _states(state: TrainerState) -> dict[str, Any]:
    """What callbacks keep in a checkpoint, by name."""
    return cast(dict[str, Any], state.stateful_callbacks)  # once the state is made, whatever its type says


def _refuse_deaf_workers(dataloader: Any) -> None:
    """Refuse workers that persist with a stream that they hold copies of: those stay in the epoch that they began in,
    which in a resumed run is another one. The streams of `datasets` share their epoch."""
    stream = dataloader.dataset
    while isinstance(getattr(stream, "dataset", None), IterableDataset):
        stream = stream.dataset
    if is_datasets_available():
        import datasets

        if isinstance(stream, datasets.IterableDataset):
            return
    if dataloader.persistent_workers and isinstance(stream, IterableDataset) and hasattr(stream, "set_epoch"):
        raise ValueError(
            f"Workers that persist are not reached by {type(stream).__name__}.set_epoch, so that each epoch would "
            "be the one that they began in. Leave out `dataloader_persistent_workers`, or give a stream of `datasets`."
        )


__all__ = ["StreamPosition"]
