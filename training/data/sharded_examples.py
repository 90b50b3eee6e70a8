"""Examples of many shards, read in place in an order that suits disks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_fromage.io.shard_files import Shard
from modeling_fromage.io.tar_shards import TarShard
from modeling_fromage.trainer.documents import document_of

from .examples import Examples
from .parquet_shards import MOST_BYTES, ParquetShard, RowGroups
from .table_shards import TableShard

SHUFFLE_WINDOW = 10_000
_BLOCKS = 8  # in a window: as many places are read at a time
_KINDS: tuple[type[Shard], ...] = (TarShard, TableShard, ParquetShard)
SHARD_SUFFIXES = tuple(suffix for kind in _KINDS for suffix in kind.suffixes)


class ShardedExamples(Examples):
    """The examples of tar shards, tables and Parquet files, as they lie: nothing is copied or converted.

    Only an index of where each example lies is held, 24 to 48 bytes an example, in memory or in `index_dir`.

    Args:
        paths: The shards, of any kind in `SHARD_SUFFIXES`.
        image_column: Column of images, or their suffix in tar shards; found by its name by default.
        caption_column: Column of captions, or their key in the JSON of tar shards; found by its name by default.
        keep_problems: Whether a row that cannot be read is an example with `problem`, rather than an error.
        index_dir: Folder that keeps the indexes for later runs.
        shuffle_window: Rows that are permuted among each other in an epoch.

    Raises:
        ValueError: A shard cannot be indexed, lacks a column, or there are no examples; when an example is read, its
            row is malformed, or has no image or no caption.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        keep_problems: bool = False,
        index_dir: str | Path | None = None,
        shuffle_window: int = SHUFFLE_WINDOW,
    ):
        self.keep_problems, self.shuffle_window = keep_problems, shuffle_window
        index_dir = None if index_dir is None else Path(index_dir)
        self.shards = [_open_shard(Path(path), image_column, caption_column, index_dir) for path in paths]
        groups = RowGroups()  # of this source alone: a window of another, read in turns with it, would drive them out
        for shard in self.shards:
            if isinstance(shard, ParquetShard):
                shard.groups = groups
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        if any(shard.documents for shard in self.shards):
            self.column_names = ("document",)
        if not len(self):
            raise ValueError(f"{', '.join(map(str, paths[:3]))}{' ...' * (len(paths) > 3)} has no examples.")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, number: int) -> tuple[Shard, int]:
        """The shard of an example, and the number of its first here."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        return self.shards[place], int(self._ends[place - 1]) if place else 0

    def read(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        shard, first = self._place(number)
        example = shard.read(number - first, columns is None or "image" in columns)
        if not self.keep_problems and columns is None:
            _check(example)
        return example if columns is None else {name: example.get(name) for name in columns}

    def substitutes(self, number: int) -> Iterator[int]:
        """The examples that may stand for one: those that follow in its shard, then the shard's first."""
        shard, first = self._place(number)
        return (first + (number - first + step) % len(shard) for step in range(1, len(shard)))

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of an epoch: blocks of neighbouring rows are permuted, and then the rows of several blocks."""
        random = np.random.default_rng([seed, epoch])
        blocks, first = [], 0
        for shard in self.shards:
            for rows, size in shard.blocks(max(1, self.shuffle_window // _BLOCKS)):
                blocks.append((first, rows, size))
                first += rows
        order, window, held = [], [], 0
        for number in random.permutation(len(blocks)):
            start, rows, size = blocks[number]
            if window and (sum(map(len, window)) + rows > self.shuffle_window or held + size > MOST_BYTES):
                order.append(random.permutation(np.concatenate(window)))
                window, held = [], 0
            window.append(np.arange(start, start + rows))
            held += size
        return np.concatenate([*order, random.permutation(np.concatenate(window))])


def _open_shard(path: Path, *arguments: Any) -> Shard:
    kind = next((kind for kind in _KINDS if path.name.lower().endswith(kind.suffixes)), None)
    if kind is None:
        packed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".tgz", ".zip")
        advice = "Unpack it: images are compressed already" if packed else "Load it without streaming"
        raise ValueError(
            f"{path} cannot be read in place, as {', '.join(SHARD_SUFFIXES)} can. {advice}, or make shards of it: "
            "`fromage prepare`."
        )
    return kind(path, *arguments)


def _check(example: dict[str, Any]) -> None:
    if "problem" in example:
        advice = "Repair it, take it out, or skip such rows: on_bad_example=skip."
        raise ValueError(f"{example['place']}: {example['problem']}. {advice}")
    if document_of(example) is not None:
        return
    for name in ("image", "caption"):
        if example.get(name) is None:
            raise ValueError(
                f"{example['place']} has no {name}. Complete the row, take it out, or skip such rows: "
                "on_bad_example=skip."
            )


__all__ = ["SHARD_SUFFIXES", "SHUFFLE_WINDOW", "ShardedExamples"]
