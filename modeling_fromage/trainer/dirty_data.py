"""Data with errors in it, as a [`FromageTrainer`] reads it: `on_bad_example` and `max_bad_share`."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers import TrainingArguments

from .bad_example_list import BadExampleList
from .bad_examples import (
    BadExampleError,
    ExampleReader,
    GoodExamples,
    PreparedExample,
    TooManyBadExamplesError,
    refuse_too_many,
)
from .data_collator import FromageDataCollator, takes_common_examples
from .good_streams import GoodStream, good_stream

logger = logging.getLogger(__name__)


class DirtyData:
    """Gives a Trainer its data sets with examples that are prepared, and keeps the list of the bad ones.

    Args:
        collator: A [`FromageDataCollator`] prepares examples; one of another kind gets them as they are.
        args (`TrainingArguments`): Of the run.
        skips (`bool`): Whether bad examples are replaced, in an evaluation left out, and listed. Else they raise.
        max_share (`float`): The share of bad examples above which the run stops.

    Raises:
        ValueError: Bad examples are to be skipped, and the collator cannot prepare any.
    """

    def __init__(self, collator: Any, args: TrainingArguments, skips: bool, max_share: float):
        self.args, self.collator, self.skips, self.max_share = args, collator, skips, max_share
        self.list = BadExampleList(args.output_dir or "", args.process_index)
        self._checked: list[tuple[Any, str, Dataset]] = []
        self._is_running = False
        self._count: int | None = None  # of the training data
        self._collator: FromageDataCollator | None = collator if takes_common_examples(collator) else None
        if skips and self._collator is None:
            raise ValueError(
                f"`on_bad_example=skip` needs a FromageDataCollator, got {type(collator).__name__}, which cannot say "
                "what is bad before it has a whole batch. Override its `prepare`, not its `__call__`."
            )

    def for_run(self, args: TrainingArguments) -> "DirtyData":
        """The same for a run with other arguments, whose list is in its own folder."""
        return DirtyData(self.collator, args, self.skips, self.max_share)

    def reading(self, dataset: Any, split: str) -> Any:
        """`dataset`, its examples prepared. `split` is `"train"`, or the name of an evaluation."""
        collator = self._collator
        if collator is None or dataset is None:
            return dataset
        is_training = split == "train"
        noted = self.list if self.skips else None
        reader = ExampleReader(collator.prepare, noted, split, self.max_share if is_training else 1.0)
        if isinstance(dataset, IterableDataset):
            return self._stream(collator, dataset, reader, is_training) if self.skips else dataset
        good = GoodExamples(dataset, reader, self.args.seed, self.args.world_size)
        self._count = len(good) if is_training else self._count
        return good if is_training or not self.skips else self._only_good(collator, good, split)

    def reading_evaluation(self, sets: Any) -> Any:
        """[`reading`] of an evaluation set, or of each of several by name."""
        if isinstance(sets, dict):
            return {name: self.reading(dataset, name) for name, dataset in sets.items()}
        return self.reading(sets, "eval")

    @staticmethod
    def as_given(dataset: Any) -> Any:
        """The user's own data set behind [`reading`], for samplers that know its columns."""
        if isinstance(dataset, GoodExamples):
            return dataset.dataset
        if isinstance(dataset, Subset) and isinstance(dataset.dataset, GoodExamples):
            given: Any = dataset.dataset.dataset
            return given.select(dataset.indices) if hasattr(given, "select") else dataset
        return dataset

    def _stream(
        self, collator: FromageDataCollator, dataset: Any, reader: ExampleReader, is_training: bool
    ) -> GoodStream:
        check = partial(_process, collator)
        stream = good_stream(
            dataset, reader=reader, check=check, process_index=self.args.process_index, leaves_out=not is_training
        )
        too_few = getattr(stream, "n_shards", 0) < self.args.world_size  # then accelerate has all read all
        if self.args.world_size > 1 and too_few:
            raise ValueError(
                f"`on_bad_example=skip` on a {type(dataset).__name__} in {self.args.world_size} processes would have "
                "each of them read all of it. Give a data set with a length, or a stream of `datasets` with a shard "
                "for each process."
            )
        return stream

    def _only_good(self, collator: FromageDataCollator, good: GoodExamples, split: str) -> Dataset:
        """The good examples of an evaluation set, which is checked once."""
        for dataset, name, found in self._checked:
            if dataset is good.dataset and name == split:
                return found
        rank, world_size, workers = self.args.process_index, self.args.world_size, self.args.dataloader_num_workers
        numbers = range(rank, len(good), world_size)
        # With a generator of its own: a run that resumes later checks later, and its draws are to be the same.
        loader = DataLoader(_Checks(good, partial(_process, collator)), batch_size=64, sampler=numbers,
                            num_workers=workers, collate_fn=list, generator=torch.Generator())  # fmt: skip
        is_good = itertools.chain.from_iterable(loader)
        kept = sorted(self.list.gather([number for number, fine in zip(numbers, is_good, strict=True) if fine]))
        self._merge(write=True)
        if not kept and len(good):
            raise TooManyBadExamplesError(
                f"All {len(good):,} examples of the {split} data are bad:\n{self.list.table(split)}\nThey are listed "
                f"in {self.list.path}."
            )
        if len(kept) < len(good) and self.args.process_index == 0:
            logger.warning("%d of the %d examples of the %s data are bad and left out of every evaluation:\n%s",
                           len(good) - len(kept), len(good), split, self.list.table(split))  # fmt: skip
        found = Subset(good, kept)
        self._checked.append((good.dataset, split, found))
        return found

    @contextmanager
    def run(self, keep: bool) -> Iterator[None]:
        """A training run. With `keep` it is resumed, and so is its list. Errors are told in the words of the example
        rather than those of the worker that has come across it."""
        if self.skips:
            self.list.begin(keep)
        self._is_running = True
        try:
            yield
        except TooManyBadExamplesError as error:
            self.list.read_parts()
            raise TooManyBadExamplesError(self.list.why_stopped(_own_words(error))) from None
        except BadExampleError as error:
            if (told := _own_words(error)) == str(error):
                raise
            raise BadExampleError(told) from None
        finally:
            self._is_running = False
        self._merge(write=True)

    def logged(self, logs: dict[str, Any]) -> dict[str, Any]:
        """`logs` with the number of bad examples so far. The processes call this together."""
        if not self.skips:
            return logs
        new, reasons = self._merge(), self.list.reasons()
        if new and self.args.process_index == 0:
            told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            logger.warning("%d more bad examples; so far %s. %s lists them.", len(new), told, self.list.path)
        bad = reasons.total()
        if self._count:  # whatever the rest may be; in all processes alike
            refuse_too_many(bad, self._count, self.max_share, self._count, "examples of the train data")
        return {**logs, "bad_examples": bad}

    def metrics(self) -> dict[str, int]:
        """How many examples were bad, and for which reasons."""
        return self.list.metrics() if self.skips else {}

    def save(self) -> None:
        """Write the list. The processes call this together."""
        if self.skips:
            self._merge(write=True)

    def _merge(self, write: bool = False) -> list[Any]:
        if not self.skips:
            return []
        new = self.list.merge(write)
        if not self._is_running:
            self.list.end()
        return new


class _Checks(Dataset):
    """Of each example, whether it is good. Runs in a loader's workers."""

    def __init__(self, good: GoodExamples, check: Any):
        self.good, self.check = good, check

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> bool:
        return self.good.is_good(index, self.check)


def _process(collator: FromageDataCollator, example: PreparedExample) -> None:
    collator.image_inputs([example])


def _own_words(error: Exception) -> str:
    """An error's message without the traceback that torch puts before it where a worker has raised it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


__all__ = ["DirtyData"]
