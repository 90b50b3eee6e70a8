"""Data with errors in it: what a bad example is replaced by, when a run stops, and what stops it.

Whether an example is bad is for [`FromageDataCollator.prepare`] to say, and for the data set that is to give it.
"""

import functools
import itertools
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from ..images_fromage import UnreadableImageError, printable
from .bad_example_list import BadExampleList
from .draws import drawn_number
from .row_contents import contents_of

ENOUGH = 256  # examples to judge by how many are bad
_NEIGHBOURS, _ATTEMPTS = 64, 512  # substitutes that are tried: those that the data set names, and all
_ADVICE = "Correct it or take it out, or set `on_bad_example=skip`, which trains on another one for it."


class BadExampleError(ValueError):
    """An example that cannot be used.

    Args:
        reason (`str`): A few words, the same for the same cause: they are counted.
        detail (`str`, *optional*): Of this example alone.
        where (`str`, *optional*): Which one it is.
    """

    def __init__(self, reason: str, detail: str = "", where: str | None = None):
        self.reason, self.detail, self.where = reason, detail, where
        super().__init__(": ".join(part for part in (printable(where or ""), reason, printable(detail)) if part))


class TooManyBadExamplesError(ValueError):
    """More examples are bad than `max_bad_share` allows."""


class PreparedExample(dict[str, Any]):
    """An example whose image is decoded and whose captions are checked.

    Attributes:
        substitute (`Callable[[BadExampleError], PreparedExample]`, *optional*): Gives another example for this one, in
            which a later step has found a fault, or raises.
    """

    substitute: Callable[[BadExampleError], "PreparedExample"] | None = None

    def replaced(self, error: BadExampleError) -> "PreparedExample":
        if self.substitute is None:
            raise error
        return self.substitute(error)


Prepare = Callable[[dict[str, Any]], PreparedExample]


class ExampleReader:
    """Reads the examples of a data set, and notes bad ones.

    Args:
        prepare (`Callable`): [`FromageDataCollator.prepare`].
        noted (`BadExampleList`, *optional*): Where bad examples are noted. Without it they raise.
        split (`str`, defaults to `"train"`): What the list and messages call this data.
        max_share (`float`, defaults to 1.0): The share of bad examples above which a process stops: see
            [`are_too_many`].
    """

    def __init__(
        self, prepare: Prepare, noted: BadExampleList | None = None, split: str = "train", max_share: float = 1.0
    ):
        self.prepare, self.noted, self.split, self.max_share = prepare, noted, split, max_share
        self._pid, self.visited, self.bad = os.getpid(), 0, 0
        self._copies: Counter[str] = Counter()  # of bad examples without a number, in this pass

    def begin_pass(self) -> None:
        """Begin with the first example of a stream."""
        self._copies.clear()

    def read(
        self,
        get: Callable[[], Any],
        number: int | None,
        place: str | None = None,
        check: Callable[[PreparedExample], Any] | None = None,
    ) -> PreparedExample:
        """The example that `get` gives, prepared.

        Args:
            number (`int`, *optional*): Its number, if it has one.
            place (`str`, *optional*): Where it stands, if it does not say itself.
            check (`Callable`, *optional*): Raises for an example that a later step would refuse.

        Raises:
            BadExampleError: It is bad. This is noted, or else the error says where it is.
        """
        row: Any = {}
        try:
            row = get()
            example = self.prepare(row)
            if self.noted is not None:
                _check_features(example)
            if check is not None:
                check(example)
        except Exception as error:  # whatever a data set or a decoder raises for this row says nothing about others
            raise self.told(as_bad(error), row, number, place) from error
        return example

    def told(self, error: BadExampleError, row: Any, number: int | None, place: str | None = None) -> BadExampleError:
        """`error`, noted or with the place of the example."""
        place = example_place(row) or error.where or place
        if self.noted is None:
            where = f"the {self.split} data" if number is None else f"example {number} of the {self.split} data"
            where = f"Cannot use {where}{f' ({place})' if place else ''}"
            detail = f"{error.detail.rstrip('.')}. {_ADVICE}" if error.detail else _ADVICE
            return BadExampleError(error.reason, detail, where)
        more = {"source": row["source"]} if isinstance(row, dict) and isinstance(row.get("source"), str) else {}
        if number is None:
            more["contents"] = contents = contents_of(row)
            self._copies[contents] += 1
            more["copy"] = self._copies[contents]
        entry = {"split": self.split, "number": number, "place": place, "reason": error.reason, "detail": error.detail}
        self.noted.note({**entry, **more})
        return error

    def visit(self) -> None:
        if self._pid != os.getpid():  # a worker that was forked counts its own
            self._pid, self.visited, self.bad = os.getpid(), 0, 0
        self.visited += 1

    def count_bad(self, whole: float) -> None:
        """Count the example that is visited as a bad one, of `whole` that this process is to visit.

        Raises:
            TooManyBadExamplesError: Too many were.
        """
        self.bad += 1
        what = f"examples of the {self.split} data that this process has visited"
        refuse_too_many(self.bad, self.visited, self.max_share, whole, what)


def refuse_too_many(bad: int, seen: int, max_share: float, whole: float, what: str) -> None:
    """
    Raises:
        TooManyBadExamplesError: [`are_too_many`] of `seen` examples, which `what` says in words, are bad.
    """
    if are_too_many(bad, seen, max_share, whole):
        raise TooManyBadExamplesError(
            f"{bad:,} of the {seen:,} {what} are bad, more than `max_bad_share={max_share:g}` of them."
        )


def are_too_many(bad: int, seen: int, max_share: float, whole: float) -> bool:
    """Whether a share of more than `max_share` of `whole` is bad, judged by those that were seen: from 256 on, or all.
    Until all are seen, by three standard deviations, so that chance does not stop a run."""
    if seen < min(ENOUGH, whole):
        return False
    deviation = 0.0 if seen >= whole else math.sqrt(seen * max_share * (1 - max_share))
    return bad > seen * max_share + 3 * deviation


class GoodExamples(Dataset):
    """A map-style data set whose examples are prepared, and which gives others for bad ones.

    Example `j` for example `i` is the first good one of those that the data set's method `substitutes(i)` names, if it
    has one, then of those that a hash of the seed and `i` names: the same in every process and run.

    Args:
        dataset: Has `__len__` and `__getitem__`.
        reader ([`ExampleReader`]): Prepares examples, and notes bad ones. One without a list raises a
            [`BadExampleError`] instead.
        seed (`int`, defaults to 0): Seed of the substitutes.
        world_size (`int`, defaults to 1): Number of processes that share the data.

    Raises:
        BadExampleError: When an example is read, without a list.
        TooManyBadExamplesError: When an example is read.
    """

    def __init__(self, dataset: Any, reader: ExampleReader, seed: int = 0, world_size: int = 1):
        self.dataset, self.reader, self.seed, self.world_size = dataset, reader, seed, world_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("epoch_order", "set_epoch", "substitutes"):  # what a data set may have besides
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def __getitem__(self, index: int) -> PreparedExample:
        return self._visit(index, lambda: self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[PreparedExample]:
        rows: Any = None
        if hasattr(self.dataset, "__getitems__"):
            try:
                rows = self.dataset.__getitems__(indices)
            except Exception:  # one of them; which one is found out below
                rows = None
        if rows is None:
            return [self[index] for index in indices]
        return [self._visit(index, functools.partial(operator.getitem, rows, row)) for row, index in enumerate(indices)]

    def is_good(self, index: int, check: Callable[[PreparedExample], Any]) -> bool:
        """Whether an example can be read and `check` finds no fault in it; else it is noted."""
        try:
            self.reader.read(lambda: self.dataset[index], index, check=check)
        except BadExampleError:
            return False
        return True

    def _visit(self, index: int, get: Callable[[], Any]) -> PreparedExample:
        self.reader.visit()
        return self._first_good(index, itertools.chain([index], self._substitutes(index)), get)

    def _first_good(self, index: int, numbers: Iterator[int], get: Callable[[], Any] | None = None) -> PreparedExample:
        """The first of `numbers` that is good. `get` gives the first of them."""
        for number in numbers:
            try:
                example = self.reader.read(get or functools.partial(self.dataset.__getitem__, number), number)
            except BadExampleError as error:
                self._pass_over(index, number, error)
                get = None
            else:
                example.substitute = functools.partial(self._next_good, index, number, numbers, example)
                return example
        raise TooManyBadExamplesError(
            f"Example {index} of the {self.reader.split} data is bad, and so are all that were tried in its place."
        )

    def _next_good(
        self, index: int, number: int, numbers: Iterator[int], example: PreparedExample, error: BadExampleError
    ) -> PreparedExample:
        self._pass_over(index, number, self.reader.told(error, example, number))
        return self._first_good(index, numbers)

    def _pass_over(self, index: int, number: int, error: BadExampleError) -> None:
        if self.reader.noted is None:
            raise error
        if number == index:
            worker = get_worker_info()
            readers = self.world_size * (1 if worker is None else worker.num_workers)
            # One that reads a part of the data alone sees a sample.
            self.reader.count_bad(whole=len(self) if readers == 1 else math.inf)

    def _substitutes(self, index: int) -> Iterator[int]:
        """The numbers of what may stand in for an example."""
        if hasattr(self.dataset, "substitutes"):
            yield from itertools.islice(self.dataset.substitutes(index), _NEIGHBOURS)
        for attempt in range(_ATTEMPTS):
            number = drawn_number(self.seed, "substitute", index, attempt) % len(self)
            if number != index:
                yield number


def as_bad(error: Exception) -> BadExampleError:
    """An error of reading an example, with the reason that is counted."""
    if isinstance(error, BadExampleError):
        return error
    if isinstance(error, UnreadableImageError):
        return BadExampleError(error.reason, f"{error.name}: {error.detail}" if error.detail else error.name)
    return BadExampleError(f"reading raises {type(error).__name__}", str(error))


def _check_features(example: PreparedExample) -> None:
    features = example.get("pooled_image_features")
    if features is not None and not torch.as_tensor(features).isfinite().all():
        raise BadExampleError("features not finite")


def example_place(row: Any) -> str | None:
    """Where an example stands: as it says itself, else the file or address of its image."""
    if not isinstance(row, dict):
        return None
    image = row.get("image")
    found = row.get("place") or (image.get("path") if isinstance(image, dict) else image)
    return found if isinstance(found, str) else None


__all__ = [
    "BadExampleError",
    "ExampleReader",
    "GoodExamples",
    "PreparedExample",
    "TooManyBadExamplesError",
    "are_too_many",
    "as_bad",
    "example_place",
    "refuse_too_many",
]
