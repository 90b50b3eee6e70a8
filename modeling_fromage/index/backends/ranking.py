"""What backends share that know images by their positions: a search from request to hits, and exact ranking.

Axes: N images, n of them in a shard, Q queries, k results a query, q the width of the shared image-text space.
"""

from collections.abc import Callable, Sequence

import torch

from ..shards import Shard
from .base import Hits, SearchRequest

_QUERIES_AT_A_TIME = 256
# More than two of a matrix product's cosines are off by together. In fp16 each is off by up to 2**-11 for the query's
# rounding and 2**-11 for its own.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.1e-3}
SPARE = 8  # candidates beyond k
_NUMBERS_AT_A_TIME = 1 << 24

# Cosines and positions (Q, k) for unit-norm queries (Q, q), k, the excluded positions of each query, and the mask (N,)
# of allowed positions, `None` for all.
FindPositions = Callable[
    [Sequence[Shard], torch.Tensor, int, Sequence[torch.Tensor], torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]

RowsOf = Callable[[torch.Tensor], torch.Tensor]  # from numbers of rows (Q, c) to the rows (Q, c, q), in fp32 on the CPU


def search_by_position(request: SearchRequest, find: FindPositions) -> Hits:
    """Answer a request with what `find` finds, some queries at a time.

    Raises:
        ValueError: `top_k` is less than 1 or, without `where`, more than the number of images left.
    """
    now, queries, excluded, top_k = request.snapshot, request.queries, request.excluded_positions, request.top_k
    allowed = request.allowed()
    counts = [len(rows) if allowed is None else int(allowed[rows].sum()) for rows in excluded]
    available = int(allowed.sum()) if request.where and allowed is not None else now.count - now.removed
    fewest = available - max(counts, default=0)
    if top_k < 1 or (top_k > fewest and not request.where):
        raise ValueError(
            f"`top_k` is {top_k}, but the index has {max(fewest, 0)} images to choose from "
            f"(of {now.count - now.removed})."
        )
    top_k = min(top_k, available - min(counts, default=0))
    scores, positions = [torch.empty(0, top_k)], []
    for start in range(0, len(queries) if top_k else 0, _QUERIES_AT_A_TIME):
        piece = slice(start, start + _QUERIES_AT_A_TIME)
        found_scores, found = find(now.shards, queries[piece], top_k, excluded[piece], allowed)
        scores.append(found_scores)
        positions += found.tolist()
    if request.where:  # which may leave a query fewer than `top_k`
        lengths = (available - count for count in counts)
        positions = [row[:length] for row, length in zip(positions or [[]] * len(queries), lengths, strict=True)]
    entries = request.entries.at(sorted({position for row in positions for position in row}))
    return Hits(
        [[entries[position][0] for position in row] for row in positions],
        torch.cat(scores) if top_k else torch.empty(len(queries), 0),
        [[entries[position][1] for position in row] for row in positions],
    )


def rows_at(shards: Sequence[Shard], positions: torch.Tensor) -> torch.Tensor:
    """Embeddings (P, q) in fp32 at `positions` (P,)."""
    ends = torch.tensor([shard.count for shard in shards]).cumsum(0)
    ordered, order = positions.sort()
    pieces = []
    numbers, counts = torch.bucketize(ordered, ends, right=True).unique_consecutive(return_counts=True)
    for number, here in zip(numbers.tolist(), ordered.split(counts.tolist()), strict=True):
        shard = shards[number]
        rows, start = shard.rows(), int(ends[number]) - shard.count
        pieces.append(rows[(here - start).to(rows.device)].float().cpu())
    return torch.cat(pieces)[order.argsort()]


def top_k_in_order(
    scores: torch.Tensor, rows_of: RowsOf, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest cosines of each query with n rows and the rows' numbers, both (Q, k). Of equal ones the first rows
    count.

    A matrix product rounds the cosine of one pair of vectors differently in different places of the matrix. So the
    product, `scores` (Q, n), only tells which rows come close. Their cosines are computed again, the same way in every
    place.

    Args:
        scores: -inf for rows that are not to be found. Their dtype says how exact the others are.
        rows_of: Returns the rows of numbers (Q, c), in fp32.
    """
    rounding, scores = ROUNDING[scores.dtype], scores.float()
    values, columns = scores.topk(min(k + SPARE, scores.shape[1]))
    threshold = (values[:, k - 1] - rounding).clamp(min=torch.finfo(values.dtype).min)  # -inf is not close to anything
    best, found = _rank(values, columns, rows_of, queries, k)
    for row in (values[:, -1] >= threshold).nonzero()[:, 0].tolist():  # perhaps there are more as close
        close = int((scores[row] >= threshold[row]).sum())
        if close > values.shape[1]:  # many images alike
            near, one = scores[row : row + 1].topk(close), slice(row, row + 1)
            best[one], found[one] = _rank(*near, rows_of, queries[one], k)
    return best, found


def _rank(
    values: torch.Tensor, columns: torch.Tensor, rows_of: RowsOf, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of the candidates `columns` (Q, c) by their exact cosines, without those whose `values` are -inf."""
    best, found = [], []
    step = max(1, _NUMBERS_AT_A_TIME // (columns.shape[1] * queries.shape[1]))
    columns, order = columns.sort(dim=-1)
    values = values.gather(-1, order).cpu()
    for some, near, numbers in zip(queries.split(step), values.split(step), columns.split(step), strict=True):
        exact = cosines(some, rows_of(numbers)).masked_fill(near == -torch.inf, -torch.inf)
        exact, order = exact.sort(dim=-1, descending=True, stable=True)
        best.append(exact[:, :k])
        found.append(numbers.cpu().gather(-1, order[:, :k]))
    return torch.cat(best), torch.cat(found)


def cosines(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosines (Q, n) of unit-norm `queries` (Q, q) with their `rows` (Q, n, q), whatever the place of a pair."""
    return (queries[:, None] * rows).sum(-1, dtype=torch.float64).float()
