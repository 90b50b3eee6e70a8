"""Map-style datasets of examples: parts of others, several as one, and the order of an epoch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset


class Examples(TorchDataset):
    """Examples by their number, with those methods of `datasets.Dataset` that are used here.

    A subclass has `__len__` and `read`; `column_names` says what an example has.
    """

    column_names: Sequence[str] = ("image", "caption")

    def read(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """An example, or these columns of it."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self.select_columns([key])]
        number = int(key) + (len(self) if key < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(f"There is no example {key}: there are {len(self)}.")
        return self.read(number)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Batches of examples, as lists by column."""
        rows = iter(self)
        while batch := list(islice(rows, batch_size)):
            yield {name: [row[name] for row in batch] for name in batch[0]}

    def select(self, numbers: Iterable[int]) -> "Selected":
        return Selected(self, numbers)

    def select_columns(self, columns: Sequence[str]) -> "Selected":
        return Selected(self, range(len(self)), columns)


class Selected(Examples):
    """Some examples of a dataset, in the order of the dataset's epochs.

    Args:
        dataset: Any map-style dataset.
        numbers: The numbers of these examples there, each once.
        columns: The columns to read; by default all.
    """

    def __init__(self, dataset: Any, numbers: Iterable[int], columns: Sequence[str] | None = None):
        self.dataset, self.columns = dataset, columns
        self.numbers = numbers if isinstance(numbers, range) else np.fromiter(numbers, dtype=np.int64)
        ascending = isinstance(self.numbers, range) or bool(np.all(self.numbers[1:] > self.numbers[:-1]))
        self._sorter = None if ascending else np.argsort(self.numbers)
        self.column_names = columns or getattr(dataset, "column_names", Examples.column_names)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        return _row(self.dataset, int(self.numbers[number]), columns or self.columns)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        positions = self._positions()[epoch_order(self.dataset, seed, epoch)]
        return positions[positions >= 0]

    def substitutes(self, number: int) -> Iterator[int]:
        found = map(self._position, substitutes(self.dataset, int(self.numbers[number])))
        return (position for position in found if position is not None)

    def _position(self, number: int) -> int | None:
        """The number here of an example of the dataset, `None` where it is not here."""
        if isinstance(self.numbers, range):
            return self.numbers.index(int(number)) if int(number) in self.numbers else None
        place = int(np.searchsorted(self.numbers, number, sorter=self._sorter))
        if place == len(self.numbers):
            return None
        position = place if self._sorter is None else int(self._sorter[place])
        return position if self.numbers[position] == number else None

    def _positions(self) -> np.ndarray:
        """By its number in the dataset, the number of an example here; -1 where it is not here."""
        positions = np.full(len(self.dataset), -1, dtype=np.int64)
        positions[np.asarray(self.numbers)] = np.arange(len(self))
        return positions


class Mixture(Examples):
    """Several datasets as one, each seen as often as its weight says.

    Its length and its numbers are those of all examples, one dataset after the other. An epoch has `weight` times as
    many examples of a dataset as that has: with 2 each is seen twice, with 0.5 half of them are, the others in the next
    epoch. No example is seen again before all others of its dataset have been seen.

    Args:
        datasets: Map-style datasets.
        weights: How often each is seen in an epoch. Defaults to once.

    Raises:
        ValueError: A weight is not a positive number, or none is seen at all.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float] | None = None):
        self.datasets, self.weights = list(datasets), list(weights or [1.0] * len(datasets))
        for weight in self.weights:
            if not 0 < weight < float("inf"):
                raise ValueError(f"`weight` is how often a source is seen in an epoch: more than 0, got {weight}.")
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        names = (getattr(dataset, "column_names", Examples.column_names) for dataset in self.datasets)
        self.column_names = list(dict.fromkeys(name for own in names for name in own))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, number: int) -> tuple[int, int]:
        """Of which dataset an example is, and the number of that dataset's first here."""
        source = int(np.searchsorted(self._ends, number, side="right"))
        return source, int(self._ends[source - 1]) if source else 0

    def read(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        source, first = self._place(number)
        return _row(self.datasets[source], number - first, columns)

    def substitutes(self, number: int) -> Iterator[int]:
        source, first = self._place(number)
        return (first + other for other in substitutes(self.datasets[source], number - first))

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        parts = []
        for source, (dataset, weight) in enumerate(zip(self.datasets, self.weights, strict=True)):
            first, count = int(self._ends[source]) - len(dataset), max(1, round(weight * len(dataset)))
            parts.append(first + _visits(dataset, (seed, source), epoch * count, count) if len(dataset) else [])
        labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        np.random.default_rng([seed, epoch, 1]).shuffle(labels)
        order = np.empty(len(labels), dtype=np.int64)
        for source, part in enumerate(parts):
            order[labels == source] = part
        return order


def _row(dataset: Any, number: int, columns: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(dataset, Examples):
        return dataset.read(number, columns)
    row = dataset[number]
    return row if columns is None else {name: row[name] for name in columns}


def _visits(dataset: Any, seed: tuple[int, int], first: int, count: int) -> np.ndarray:
    """Visits `first` to `first + count` of a dataset that is gone through in one order after the other."""
    own_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    lap, found = first // len(dataset), []
    end = first + count
    while lap * len(dataset) < end:
        start = lap * len(dataset)
        found.append(epoch_order(dataset, own_seed, lap)[max(first - start, 0) : end - start])
        lap += 1
    return np.concatenate(found)


def epoch_order(dataset: Any, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: the dataset's own, or a permutation."""
    if hasattr(dataset, "epoch_order"):
        return dataset.epoch_order(seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(len(dataset))


def substitutes(dataset: Any, number: int) -> Iterator[int]:
    """The examples that may stand for one, nearest first: the dataset's own, or those that follow, then the first."""
    if hasattr(dataset, "substitutes"):
        return dataset.substitutes(number)
    return (other % len(dataset) for other in range(number + 1, number + len(dataset)))


def hold_out(dataset: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """A dataset without a share of its examples, and these: each by a hash of its number and `seed`, so that it stays
    on its side when others are added behind it."""
    numbers = np.arange(len(dataset))
    held = _hash(numbers.astype(np.uint64), seed) < fraction
    return _part(dataset, numbers[~held]), _part(dataset, numbers[held])


def _part(dataset: Any, numbers: np.ndarray) -> Any:
    return dataset.select(numbers) if isinstance(dataset, Dataset) else Selected(dataset, numbers)


def _hash(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [0, 1) that are functions of `numbers` and `seed` (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        x = numbers + np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


__all__ = ["Examples", "Mixture", "Selected", "epoch_order", "hold_out", "substitutes"]
