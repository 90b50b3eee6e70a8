"""Sequence packing: several sequences share a row of the language model, and texts the tokens that they begin with.

Axes: B sequences of up to L tokens, T tokens without padding, R rows of C positions, S sequences a row at most.
"""

import math

import torch

ROW_LENGTH = 64  # about how many tokens a row takes: attention within a row costs more with its square


class PackedRows:
    """Packs B padded sequences (B, L) into R rows of C positions.

    The longest sequences are dealt first, and the rows in turn from left to right and back, so that they fill evenly.

    Args:
        mask (`torch.Tensor` of shape `(B, L)`): 1 for tokens, 0 for padding on either side.
        window (`float`): Tokens that the LM's attention reaches back. A row and its queries are no longer.
        queries (`int`, defaults to 1): Tokens that each sequence goes on with behind its row.

    Attributes:
        flat_positions (`torch.Tensor` of shape `(T,)`): Position of each token in the flattened rows.
        sequence (`torch.Tensor` of shape `(R, C)`): Which sequence a position belongs to; -1 where it is empty.
        position_ids (`torch.Tensor` of shape `(R, C)`): Position within the sequence.
        row, slot (`torch.Tensor` of shape `(B,)`): The row of a sequence, and its number within the row.
        lengths (`torch.Tensor` of shape `(B,)`): Tokens of each sequence.
    """

    def __init__(self, mask: torch.Tensor, window: float = math.inf, queries: int = 1):
        mask, device = mask.bool(), mask.device
        count, self.queries = len(mask), queries
        self.lengths = mask.sum(-1)
        order = self.lengths.argsort(descending=True, stable=True)
        longest, total = int(self.lengths[order[0]]), int(self.lengths.sum())
        self.rows = min(count, math.ceil(total / max(longest, min(ROW_LENGTH, window))))
        deal = torch.arange(count, device=device)
        while True:
            self.slots = math.ceil(count / self.rows)
            slot, column = deal // self.rows, deal % self.rows
            row = torch.where(slot % 2 == 0, column, self.rows - 1 - column)
            lengths = torch.zeros(self.slots, self.rows, dtype=torch.long, device=device)
            lengths[slot, row] = self.lengths[order]
            self.length = int(lengths.sum(0).max())  # C
            if self.length + self.slots * queries <= window or self.rows == count:
                break
            self.rows += 1
        starts = lengths.cumsum(0) - lengths
        self.row, self.slot, start = (torch.empty(count, dtype=torch.long, device=device) for _ in range(3))
        self.row[order], self.slot[order], start[order] = row, slot, starts[slot, row]

        position = mask.long().cumsum(-1) - 1  # (B, L)
        self._tokens = mask.flatten().nonzero()[:, 0]
        self.flat_positions = ((self.row * self.length + start)[:, None] + position).flatten()[self._tokens]
        sequence = torch.arange(count, device=device)[:, None].expand_as(mask)
        self.sequence = self.lay(sequence, -1)
        self.position_ids = self.lay(position, 0)

    def lay(self, padded: torch.Tensor, empty: float = 0) -> torch.Tensor:
        """(B, L, ...) -> (R, C, ...)."""
        flat = padded.flatten(0, 1)[self._tokens]
        rows = flat.new_full((self.rows * self.length, *flat.shape[1:]), empty)
        return rows.index_copy(0, self.flat_positions, flat).unflatten(0, (self.rows, self.length))

    def at_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, C, ...) -> (T, ...), batch row by batch row."""
        return rows.flatten(0, 1)[self.flat_positions]

    def lay_queries(self, values: torch.Tensor) -> torch.Tensor:
        """Values of each sequence's next tokens (B, queries) -> (R, S * queries): behind its row."""
        slots = values.new_zeros(self.rows, self.slots, self.queries)
        return slots.index_put((self.row, self.slot), values).flatten(1)

    def at_queries(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, S * queries, ...) -> (B, queries, ...)."""
        return rows.unflatten(1, (self.slots, self.queries))[self.row, self.slot]

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask (R, 1, C, C): causal, within a sequence."""
        same = self.sequence[:, :, None] == self.sequence[:, None, :]
        return additive_mask(same.tril(), dtype)

    def query_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask (R, 1, S * queries, C + S * queries): a query sees its own sequence, those of its queries that
        come before, and itself."""
        count = len(self.row)
        sequences = torch.arange(1, count + 1, device=self.row.device)[:, None].expand(-1, self.queries)
        query = self.lay_queries(sequences) - 1  # (R, S * queries); -1 where there is none
        own = (query[:, :, None] == self.sequence[:, None, :]) & (query[:, :, None] >= 0)
        slot = torch.arange(query.shape[1], device=own.device) // self.queries
        itself = (slot[:, None] == slot).tril().expand(self.rows, -1, -1)
        return additive_mask(torch.cat([own, itself], dim=-1), dtype)


class PrefixTree:
    """Packs B texts (B, L), padded on the right, into R rows of C positions; what texts begin with alike is there once.

    A token's hidden states depend on what stands before it alone. So texts are sorted, and each takes only the tokens
    that it does not share with the one before it in its row.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`): Token ids.
        mask (`torch.Tensor` of shape `(B, L)`): 1 for tokens.
        window (`float`): Tokens that the LM's attention reaches back. No row is longer.

    Attributes:
        input_ids (`torch.Tensor` of shape `(R, C)`): Token ids, 0 where a position is empty.
        position_ids (`torch.Tensor` of shape `(R, C)`): Position within the text.
        row (`torch.Tensor` of shape `(B,)`): The row of each text.
        path (`torch.Tensor` of shape `(B, L)`): The columns of its tokens, -1 at padding.
    """

    def __init__(self, input_ids: torch.Tensor, mask: torch.Tensor, window: float = math.inf):
        texts = [ids[:n] for ids, n in zip(input_ids.tolist(), mask.sum(-1).tolist(), strict=True)]
        longest = int(min(window, max(2 * ROW_LENGTH, input_ids.shape[1])))
        rows: list[list[int]] = []
        places: list[tuple[int, list[int]]] = [(0, [])] * len(texts)
        text: list[int] = []
        path: list[int] = []
        for number in sorted(range(len(texts)), key=texts.__getitem__):
            before, text = text, texts[number]
            shared = 0
            while shared < min(len(before), len(text)) and before[shared] == text[shared]:
                shared += 1
            if not rows or len(rows[-1]) + len(text) - shared > longest:
                rows.append([])
                shared = 0
            start = len(rows[-1])
            rows[-1] += text[shared:]
            path = path[:shared] + list(range(start, len(rows[-1])))
            places[number] = len(rows) - 1, path
        device, width = input_ids.device, max(map(len, rows))
        self.input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        self.row = torch.tensor([row for row, _ in places], device=device)
        paths = [path + [-1] * (input_ids.shape[1] - len(path)) for _, path in places]
        self.path = torch.tensor(paths, device=device)
        columns = torch.arange(input_ids.shape[1], device=device).expand_as(self.path)
        at = self._flat_positions()
        positions = torch.zeros(self.input_ids.numel(), dtype=torch.long, device=device)
        self.position_ids = positions.index_copy(0, at, columns[self.path >= 0]).view_as(self.input_ids)

    def _flat_positions(self) -> torch.Tensor:
        """Where each text's tokens are in the flattened rows, (T,); shared tokens once for each text."""
        return (self.row[:, None] * self.input_ids.shape[1] + self.path)[self.path >= 0]

    def at_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, C, ...) -> (T, ...), text by text."""
        return rows.flatten(0, 1)[self._flat_positions()]

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask (R, 1, C, C): a token sees the tokens of its text up to itself."""
        (rows, width), length = self.input_ids.shape, self.path.shape[1]
        row, query, key = torch.broadcast_tensors(self.row[:, None, None], self.path[:, :, None], self.path[:, None])
        seen = (query >= 0) & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        allowed = torch.zeros(rows, width, width, dtype=torch.bool, device=query.device)
        allowed[row[seen], query[seen], key[seen]] = True
        return additive_mask(allowed, dtype)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(R, Q, K), True where a query sees a key -> (R, 1, Q, K), 0 or the dtype's minimum."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def positions(mask: torch.Tensor) -> torch.Tensor:
    """(B, L), 1 for tokens -> their positions, 0 at padding on the left."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def next_tokens(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, embeds: torch.Tensor
) -> torch.Tensor | None:
    """The target (B, L) of each of `embeds` (B, L, D), -100 where it has none: `shift_labels`, or `labels` shifted."""
    targets = shift_labels
    if targets is None and labels is not None:
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if targets is None:
        return None
    if targets.shape != embeds.shape[:2]:
        raise ValueError(f"Expected one label a token, {tuple(embeds.shape[:2])}, got {tuple(targets.shape)}.")
    return targets


def padding_side(mask: torch.Tensor | dict | None, embeds: torch.Tensor) -> str | None:
    """Where a whole batch (B, L, D) has padding by its mask: `"left"`, `"right"`, or nowhere (`None`)."""
    if not isinstance(mask, torch.Tensor) or mask.shape != embeds.shape[:2] or embeds.shape[1] == 1:
        return None  # a mask of tokens that a cache holds, too, or of attention
    is_padding = mask == 0
    if bool(is_padding[:, 0].any()):
        return "left"
    return "right" if bool(is_padding.any()) else None


def tokens_first(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> the order of the columns, (B, L), that puts each row's padding on the right."""
    return (~mask.bool()).long().argsort(dim=-1, stable=True)


def groups_of_one_length(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Indices of sequences (B,) of the same length, for LMs that take no padding."""
    order = lengths.argsort(stable=True)
    return list(order.split(lengths[order].unique_consecutive(return_counts=True)[1].tolist()))


def length_groups(lengths: torch.Tensor, size: int = 8, most: int = 4) -> list[torch.Tensor]:
    """Indices of sequences (B,) of like length, in at most `most` groups of at least `size`, for LMs that take no
    packed rows."""
    groups = max(1, min(most, len(lengths) // size))
    return list(lengths.argsort(stable=True).tensor_split(groups))
