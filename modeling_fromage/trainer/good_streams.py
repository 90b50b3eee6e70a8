"""Streams with errors in them."""

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import is_datasets_available

from .bad_examples import BadExampleError, ExampleReader, PreparedExample, TooManyBadExamplesError


class GoodStream(IterableDataset):
    """A stream whose examples are prepared. For a bad one the next good one is given, which is given again as itself;
    for the last ones, the last good one. So there are as many as in the stream.

    Args:
        dataset (`IterableDataset`): Of torch. A stream of `datasets` is for [`good_stream`].
        reader ([`ExampleReader`]): Prepares examples and notes bad ones.
        check (`Callable[[PreparedExample], Any]`): Raises for an example that a later step would refuse.
        process_index (`int`): Of this process among those that train.
        leaves_out (`bool`, defaults to `False`): Bad examples are not replaced but left out, as an evaluation must.
    """

    def __init__(
        self,
        dataset: Any,
        reader: ExampleReader,
        check: Callable[[PreparedExample], Any],
        process_index: int,
        leaves_out: bool = False,
    ):
        self.dataset, self.reader, self.check = dataset, reader, check
        self.process_index, self.leaves_out = process_index, leaves_out

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        if self.leaves_out:
            raise TypeError("How many examples are good is not known.")
        return len(self.dataset)

    def __iter__(self) -> Iterator[PreparedExample]:
        last, owed = None, 0
        for example in self._prepared():
            if example is None:
                owed += not self.leaves_out
                continue
            yield from [example] * (owed + 1)
            last, owed = example, 0
        if owed and last is None:
            raise TooManyBadExamplesError(f"All {owed:,} examples of this stream are bad.")
        yield from [last] * owed if last is not None else ()

    def _prepared(self) -> Iterator[PreparedExample | None]:
        """Each example; `None` for a bad one."""
        worker = get_worker_info()
        where = f"process {self.process_index}, worker {0 if worker is None else worker.id}"
        self.reader.begin_pass()
        for number, row in enumerate(self.dataset):
            self.reader.visit()
            try:
                yield self.reader.read(
                    partial(operator.getitem, [row], 0), None, f"{where}, example {number}", self.check
                )
            except BadExampleError:
                self.reader.count_bad(whole=math.inf)
                yield None


def good_stream(dataset: Any, **kwargs: Any) -> GoodStream:
    """A [`GoodStream`] of a stream of torch or `datasets`; accelerate shares the shards of the latter out to the
    processes that train, so that each reads its own."""
    if not is_datasets_available():
        return GoodStream(dataset, **kwargs)
    import datasets

    if not isinstance(dataset, datasets.IterableDataset):
        return GoodStream(dataset, **kwargs)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:  # the reader decodes, which knows what to do then
            dataset = dataset.cast_column(name, datasets.Image(decode=False))

    class ShardedGoodStream(GoodStream, datasets.IterableDataset):  # by this type accelerate knows it
        @property
        def n_shards(self) -> int:
            return self.dataset.n_shards

        def shard(self, *args: Any, **options: Any) -> GoodStream:
            return good_stream(self.dataset.shard(*args, **options), **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:  # for a worker that is spawned
            return partial(good_stream, **kwargs), (self.dataset,)

    return ShardedGoodStream(dataset, **kwargs)


__all__ = ["GoodStream", "good_stream"]
