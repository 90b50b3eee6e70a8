"""Exact search: one matrix product and one top-k a shard.

Axes: N images, n of them in a shard, Q queries, k results a query, q the width of the shared image-text space.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..folder import ListedFile
from ..shards import Shard
from .base import Hits, SearchRequest
from .ranking import search_by_position, top_k_in_order

if TYPE_CHECKING:
    from ..metadata_store import MetadataStore
    from ..snapshot import Snapshot

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_TRIALS = 5


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
    """Cosines and positions (Q, k) of the nearest images of unit-norm `queries` (Q, q), exactly, one shard at a time,
    on the shards' device; -inf where a query may not find as many.

    Args:
        excluded_positions: Positions that are not to be found, for each query.
        allowed (`torch.BoolTensor` of shape `(N,)`, *optional*): Positions that may be found.
    """
    best = torch.empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.long)
    excluding = [(row, excluded) for row, excluded in enumerate(excluded_positions) if len(excluded)]
    start = 0
    for shard in shards:
        rows, stop = shard.rows(), start + shard.count
        scores = _products(rows, queries.to(rows.device))  # (Q, n), nearly the cosines
        if allowed is not None:
            scores.masked_fill_(~allowed[start:stop].to(rows.device), -torch.inf)
        for row, excluded in excluding:
            here = excluded[(excluded >= start) & (excluded < stop)]
            if len(here):
                scores[row, (here - start).to(rows.device)] = -torch.inf
        found, places = top_k_in_order(scores, rows, queries, min(top_k, shard.count))
        best, positions = torch.cat([best, found], 1), torch.cat([positions, places + start], 1)
        order = best.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        best, positions = best.gather(-1, order), positions.gather(-1, order)
        start = stop
    return best, positions


def _products(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Inner products (Q, n) of `queries` (Q, q) with `rows` (n, q), contiguous."""
    matrix = rows.float()
    if len(queries) > 1:
        return (matrix @ queries.t()).t().contiguous()
    if matrix.device.type != "cpu":
        return _doubled(matrix, queries)
    kind = (rows.dtype, rows.shape[1], len(rows).bit_length(), torch.get_num_threads())
    return _one_query_product(kind, matrix, queries)


def _plain(matrix: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return (matrix @ query.t()).t()


def _doubled(matrix: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """As a matrix-matrix product with the query in two columns."""
    return (matrix @ query.repeat(2, 1).t())[:, :1].t().contiguous()


class FasterProduct:
    """The faster of several ways to compute one product, found by timing the first calls of each kind.

    CPU libraries differ: their matrix-vector product reads memory at half the speed of their matrix product on one
    processor, and more than twice as fast on another. The ways take turns until each has `_TRIALS` timings, and the one
    with the shortest timing stays. Other work on the machine only makes timings longer, so one noisy timing decides
    nothing. It needs no lock: calls at the same time at most time a way once more.
    """

    def __init__(self, *ways: Product):
        self._ways = ways
        self._seconds: dict[Hashable, tuple[list[float], ...]] = {}
        self._fastest: dict[Hashable, Product] = {}

    def __call__(self, kind: Hashable, matrix: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        fastest = self._fastest.get(kind)
        if fastest is not None:
            return fastest(matrix, query)
        timings = self._seconds.setdefault(kind, tuple([] for _ in self._ways))
        turn = min(range(len(timings)), key=lambda way: len(timings[way]))
        start = time.perf_counter()
        product = self._ways[turn](matrix, query)
        timings[turn].append(time.perf_counter() - start)
        if min(map(len, timings)) >= _TRIALS:
            self._fastest[kind] = self._ways[min(range(len(timings)), key=lambda way: min(timings[way]))]
        return product


_one_query_product = FasterProduct(_plain, _doubled)  # for the whole process
