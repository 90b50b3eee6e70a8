"""Exact search: a matrix product and a top-k of some shards at a time.

Axes: N images, n of them in a shard, Q queries, k results a query, q the width of the shared image-text space.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..folder import ListedFile
from ..shards import Shard
from .base import Hits, SearchRequest
from .ranking import ROUNDING, rows_at, search_by_position, top_k_in_order

if TYPE_CHECKING:
    from ..metadata_store import MetadataStore
    from ..snapshot import Snapshot

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_TRIALS, _TRIAL_ROWS = 5, 1 << 16
_NUMBERS_AT_A_TIME = 1 << 19  # that are converted to fp32 for a query: 2 MB
_MOST_PIECES = 8  # of so many at once for several queries
_SCORES_AT_A_TIME = 1 << 20
_FEW = 16  # where a filter leaves at most one row in so many, a copy of these is sooner done than the product of all


class FlatBackend:
    """Exact search in the index's own embeddings: it needs nothing beside them, and has no options."""

    name = "flat"

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def set_options(self, **options: Any) -> None:
        if options:
            raise ValueError(f"The flat backend takes no options, got {sorted(options)}.")

    def build(self, snapshot: "Snapshot", dim: int, entries: "MetadataStore") -> None:
        pass

    def add(self, rows: torch.Tensor, entries: Sequence[tuple[str, str]]) -> None:
        pass

    def delete(self, ids: Sequence[str]) -> None:
        pass

    def restore(self, shards: Sequence[Shard]) -> None:
        pass

    def search(self, request: SearchRequest) -> Hits:
        return search_by_position(request, search_flat)

    def copy(self) -> "FlatBackend":
        return self

    def save(self, path: Path, snapshot: "Snapshot", dim: int) -> bool:
        return False

    def load(self, file: ListedFile, count: int, dim: int) -> None:
        raise file.error("the flat backend has no file")


def search_flat(
    shards: Sequence[Shard],
    queries: torch.Tensor,
    top_k: int,
    excluded_positions: Sequence[torch.Tensor],
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and positions (Q, k) of the nearest images of unit-norm `queries` (Q, q), exactly, some shards at a
    time, on the shards' device; -inf where a query may not find as many.

    Args:
        top_k: At most the number of positions that may be found.
        excluded_positions: Positions that are not to be found, for each query.
        allowed (`torch.BoolTensor` of shape `(N,)`, *optional*): Positions that may be found.
    """
    best = torch.empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.long)
    excluding = [(row, excluded) for row, excluded in enumerate(excluded_positions) if len(excluded)]
    start = 0
    for group in _groups(shards, _SCORES_AT_A_TIME // max(1, len(queries))):
        first, start = start, start + sum(shard.count for shard in group)
        scores, numbers = _scores(group, queries, None if allowed is None else allowed[first:start])
        if not scores.shape[1]:
            continue
        for row, excluded in excluding:
            places = excluded[(excluded >= first) & (excluded < start)] - first
            if numbers is not None:
                places = torch.isin(numbers, places).nonzero()[:, 0]
            scores[row, places.to(scores.device)] = -torch.inf
        if best.shape[1] == top_k and (scores.amax(-1).cpu() < best[:, -1] - ROUNDING[scores.dtype]).all():
            continue  # nothing here is as near as what was found

        def rows_of(
            columns: torch.Tensor, group: list[Shard] = group, numbers: torch.Tensor | None = numbers
        ) -> torch.Tensor:
            places = columns.cpu() if numbers is None else numbers[columns.cpu()]
            return rows_at(group, places.flatten()).view(*places.shape, -1)

        found, places = top_k_in_order(scores, rows_of, queries, min(top_k, scores.shape[1]))
        places = places if numbers is None else numbers[places]
        best, positions = torch.cat([best, found], 1), torch.cat([positions, places + first], 1)
        order = best.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        best, positions = best.gather(-1, order), positions.gather(-1, order)
    return best, positions


def _groups(shards: Sequence[Shard], rows: int) -> list[list[Shard]]:
    """Consecutive shards, of at most so many rows together if they are several. Their cosines are ranked together:
    each step on few numbers would take longer to divide among threads than to do."""
    groups: list[list[Shard]] = []
    for shard in shards:
        if not groups or sum(each.count for each in groups[-1]) + shard.count > rows:
            groups.append([])
        groups[-1].append(shard)
    return groups


def _scores(
    shards: Sequence[Shard], queries: torch.Tensor, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Nearly the cosines (Q, n) of the shards' rows that are `allowed` (N,), and the numbers (n,) of these rows, `None`
    for all. Rows that are not allowed may be among them, with -inf."""
    if allowed is None:
        joined = _joined(shard.rows() for shard in shards)
        return _side_by_side([_products(some, queries.to(some.device)) for some in joined]), None
    pieces, numbers, start = [torch.empty(len(queries), 0)], [torch.empty(0, dtype=torch.long)], 0
    for shard in shards:
        here = allowed[start : start + shard.count]
        count = int(here.sum())
        if count:
            few = count * _FEW <= shard.count
            rows, places = shard.rows(), here.nonzero()[:, 0] if few else torch.arange(shard.count)
            scores = _products(rows[places.to(rows.device)] if few else rows, queries.to(rows.device))
            pieces.append(scores if few else scores.masked_fill_(~here.to(rows.device), -torch.inf))
            numbers.append(places + start)
        start += shard.count
    return _side_by_side(pieces[1:] or pieces), torch.cat(numbers)


def _side_by_side(scores: list[torch.Tensor]) -> torch.Tensor:
    """As one tensor. If some are in fp16, so are all: their dtype says how exact they are."""
    if len(scores) == 1:
        return scores[0]
    half = any(some.dtype == torch.float16 for some in scores)
    return torch.cat([some.half() if half else some for some in scores], 1)


def _joined(pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same rows, those as one that follow one another in memory, as after one call of `add`. Threads that share a
    product wait for each other at its end; on a busy machine, so many products take several times as long as one."""
    last: torch.Tensor | None = None
    for rows in pieces:
        if last is not None and _follows(rows, last):
            last = last.as_strided((len(last) + len(rows), rows.shape[1]), rows.stride())
        else:
            if last is not None:
                yield last
            last = rows
    if last is not None:
        yield last


def _follows(rows: torch.Tensor, before: torch.Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.is_contiguous()
        and before.is_contiguous()
        and rows.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        and rows.storage_offset() == before.storage_offset() + before.numel()
    )


def _products(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Inner products (Q, n) of `queries` (Q, q) with `rows` (n, q), off by what `ROUNDING` has for their dtype."""
    if rows.device.type != "cpu":
        return (_doubled if len(queries) == 1 else _plain)(rows.float(), queries).contiguous()
    if len(queries) > 1:
        return (_plain if rows.dtype == torch.float32 else _converted(_plain))(rows, queries).contiguous()
    kind = (rows.shape[1], min(len(rows), _TRIAL_ROWS).bit_length(), torch.get_num_threads())
    return _one_query_products[rows.dtype](kind, rows, queries)


def _plain(matrix: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return (matrix @ queries.t()).t()


def _doubled(matrix: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """As a matrix-matrix product with the query in two columns."""
    return (matrix @ query.repeat(2, 1).t())[:, :1].t().contiguous()


def _half(rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """In fp16, as the rows are. PyTorch adds up in fp32."""
    return (rows @ query[0].half())[None]


def _converted(product: Product) -> Product:
    """`product` of fp16 rows in fp32: of pieces that are converted into one buffer, which stays in the processor's
    cache. A new copy of the whole shard takes several times as long."""

    def product_of_pieces(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        step = max(1, _NUMBERS_AT_A_TIME * min(len(queries), _MOST_PIECES) // rows.shape[1])
        matrix, scores = torch.empty(min(step, len(rows)), rows.shape[1]), torch.empty(len(queries), len(rows))
        for piece, out in zip(rows.split(step), scores.split(step, dim=1), strict=True):
            out.copy_(product(matrix[: len(piece)].copy_(piece), queries))
        return scores

    return product_of_pieces


class FasterProduct:
    """The fastest of several ways to compute one product, found by timing the calls of each kind.

    CPU libraries differ: their matrix-vector product reads memory at half the speed of their matrix product on one
    processor, and more than twice as fast on another. At the first call all ways take turns at pieces of the matrix,
    `_TRIALS` each, and the one with the least median is used. Timed is the process's own CPU time, which other
    processes hardly change: with 15 of them on two cores the clock was wrong in a third of such choices, and this in
    none. Each way has one more timing at every call whose number is a power of two, and the last `_TRIALS` count, so no
    mistake is for ever. It needs no lock: calls at the same time at most try once more.
    """

    def __init__(self, *ways: Product):
        self._ways = ways
        self._calls: Counter[Hashable] = Counter()
        self._seconds: dict[Hashable, list[deque[float]]] = {}  # the last timings of each way

    def __call__(self, kind: Hashable, matrix: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        seconds = self._seconds.setdefault(kind, [deque(maxlen=_TRIALS) for _ in self._ways])
        calls = self._calls[kind] = self._calls[kind] + 1
        rounds = _TRIALS if calls == 1 else int(calls & (calls - 1) == 0)
        for trial in range(rounds * len(self._ways)):
            # None is to find in the processor's cache what another has just read.
            first = trial * _TRIAL_ROWS % max(1, len(matrix) - _TRIAL_ROWS + 1)
            piece, way = matrix[first : first + _TRIAL_ROWS], trial % len(self._ways)
            start = time.process_time()
            self._ways[way](piece, query)
            seconds[way].append(time.process_time() - start)
        medians = [statistics.median(list(timings) or [0]) for timings in seconds]
        return self._ways[medians.index(min(medians))](matrix, query)


# For the whole process, by the dtype of the rows.
_one_query_products = {
    torch.float32: FasterProduct(_plain, _doubled),
    torch.float16: FasterProduct(_half, _converted(_plain)),
}
