"""Metadata by column, so that a filter compares numbers instead of decoding the JSON of every image.

Axes: N images.
"""

import sys
import threading
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Entries = Iterable[tuple[int, dict[str, Any]]]  # position and metadata
Scalar = str | int | float | bool | None
_ABSENT = object()
_ROWS_AT_A_TIME = 1024
_MOST_BYTES = 1 << 28  # of all columns of an index; a larger one is read anew for each filter
_MOST_NAMES = 10_000  # that are remembered; beyond, a filter by an unknown one reads all metadata
_BYTES_PER_VALUE = 120  # of a distinct value, in the dict of codes and beside its own


class MetadataColumns:
    """The columns that filters have asked for, built at their first use. Thread-safe.

    What stands at a position never changes, so a column serves every snapshot and only ever grows. The columns take
    at most `_MOST_BYTES`; the one that was not used for longest makes room for others.
    """

    def __init__(self) -> None:
        self._columns: dict[str, _Column | None] = {}  # the last was used last; `None` for one that is too large
        self._names: set[str] = set()  # of the metadata of the first `_num_named` positions
        self._num_named = 0
        self._lock = threading.Lock()

    def mask(self, where: dict[str, list[Scalar]], count: int, read: Callable[[int, int], Entries]) -> np.ndarray:
        """Mask of shape (`count`,) of the positions that have one of the wanted values of every name in `where`.

        Args:
            read (`Callable`): Returns the entries from a position to before another one, in order, perhaps with gaps.
        """
        mask = np.ones(count, dtype=bool)
        with self._lock:
            for name, wanted in where.items():
                values = {comparable(value) for value in wanted}
                mask &= self._mask_of(name, values, count, self._noting_names(read))
                if not mask.any():  # whatever else is asked for, which may be many names
                    break
        return mask

    def _noting_names(self, read: Callable[[int, int], Entries]) -> Callable[[int, int], Entries]:
        def noted(start: int, stop: int) -> Entries:
            entries = list(read(start, stop))
            if start <= self._num_named < stop and len(self._names) <= _MOST_NAMES:
                self._names.update(*(metadata for _, metadata in entries))
                self._num_named = stop
            return entries

        return noted

    def _mask_of(self, name: str, wanted: set[Any], count: int, read: Callable[[int, int], Entries]) -> np.ndarray:
        if name not in self._names and count <= self._num_named and len(self._names) <= _MOST_NAMES:
            return np.zeros(count, dtype=bool)
        column = self._columns.pop(name, _Column())
        if column is not None:
            for start in range(len(column), count, _ROWS_AT_A_TIME):
                column.extend(name, read(start, min(start + _ROWS_AT_A_TIME, count)), start)
                if column.nbytes > _MOST_BYTES:
                    column = None
                    break
            else:
                column.pad(count)
        self._columns[name] = column
        if column is not None:
            self._make_room()
            return column.mask(wanted)[:count]
        pieces = [np.zeros(0, dtype=bool)]
        for start in range(0, count, _ROWS_AT_A_TIME):
            stop, piece = min(start + _ROWS_AT_A_TIME, count), _Column()
            piece.extend(name, read(start, stop), start)
            piece.pad(stop - start)
            pieces.append(piece.mask(wanted))
        return np.concatenate(pieces)

    def _make_room(self) -> None:
        """Forget columns, the least recently used first, until the rest fits."""
        sizes = {name: column.nbytes for name, column in self._columns.items() if column is not None}
        for name in list(sizes)[:-1]:
            if sum(sizes.values()) <= _MOST_BYTES:
                break
            del self._columns[name]
            sizes[name] = 0


class _Column:
    """The values of one metadata name, each distinct one as a number. Items of lists are kept beside."""

    def __init__(self) -> None:
        self._codes: dict[Any, int] = {}
        self._rows = array("i")  # the code of each position, -1 for none
        self._item_rows, self._item_codes = array("q"), array("i")
        self._value_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return self._value_bytes + sum(
            len(part) * part.itemsize for part in (self._rows, self._item_rows, self._item_codes)
        )

    def extend(self, name: str, entries: Entries, start: int) -> None:
        """Append the values of `name` of entries from `start` on; `start` is the position after the column's last."""
        codes, shift = self._codes, len(self) - start
        for position, metadata in entries:
            row = position + shift
            if row > len(self._rows):
                self.pad(row)
            value = metadata.get(name, _ABSENT)
            if isinstance(value, list):
                items = [self._code(item) for item in value]
                self._item_rows.extend([row] * len(items))
                self._item_codes.extend(items)
                self._rows.append(-1)
            elif value is _ABSENT or isinstance(value, dict):
                self._rows.append(-1)
            else:
                code = codes.get(value)
                self._rows.append(self._code(value) if code is None else code)

    def pad(self, count: int) -> None:
        """Fill up to `count` positions."""
        self._rows.extend([-1] * (count - len(self._rows)))

    def _code(self, value: Any) -> int:
        """The number of a value; -1 for a list or a dict, which equals nothing."""
        if isinstance(value, (dict, list)):
            return -1
        value = comparable(value)
        code = self._codes.get(value)
        if code is None:
            code = self._codes[value] = len(self._codes)
            self._value_bytes += sys.getsizeof(value) + _BYTES_PER_VALUE
        return code

    def mask(self, wanted: set[Any]) -> np.ndarray:
        """Mask (N,) of the positions that have one of the values."""
        matches = np.zeros(len(self._codes) + 1, dtype=bool)  # by code; the last, for -1, stays False
        matches[[self._codes[value] for value in wanted if value in self._codes]] = True
        mask = matches[np.frombuffer(self._rows, dtype=np.intc)] if len(self) else np.zeros(0, dtype=bool)
        if len(self._item_rows):
            rows = np.frombuffer(self._item_rows, dtype=np.int64)
            mask[rows[matches[np.frombuffer(self._item_codes, dtype=np.intc)]]] = True
        return mask


def comparable(value: Any) -> Any:
    """A scalar as SQL compares it: True is 1, and whole numbers of more than 64 bits are real numbers."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value
