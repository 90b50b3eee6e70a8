"""Sequence packing and the order of batches, for any lengths, padding and window."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_fromage.packing_fromage import (
    PackedRows,
    PrefixTree,
    groups_of_one_length,
    length_groups,
    next_tokens,
    padding_side,
    positions,
    tokens_first,
)

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=10)
SIDES = st.sampled_from(["left", "right"])


@st.composite
def masks(draw, sides=SIDES) -> torch.Tensor:
    """(B, L), 1 for tokens; the side of the padding is drawn for every row, and a column may be all padding."""
    lengths = draw(LENGTHS)
    mask = torch.zeros(len(lengths), max(lengths) + draw(st.integers(0, 2)), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        start = 0 if draw(sides) == "right" else len(row) - length
        row[start : start + length] = 1
    return mask


def numbered(mask: torch.Tensor) -> torch.Tensor:
    """Every token's own number, 100 * sequence + position; 0 at padding."""
    return (100 * torch.arange(1, len(mask) + 1)[:, None] + positions(mask)) * mask


@given(masks())
def test_packing_round_trip(mask):
    packed, tokens = PackedRows(mask), numbered(mask)
    rows = packed.lay(tokens, -1)
    assert torch.equal(packed.at_tokens(rows), tokens[mask.bool()])
    assert sorted(rows[rows >= 0].tolist()) == sorted(tokens[mask.bool()].tolist())  # each token once
    assert torch.equal(packed.position_ids[rows >= 0], rows[rows >= 0] % 100)
    vectors = torch.stack([tokens, -tokens], dim=-1).double()
    assert torch.equal(packed.at_tokens(packed.lay(vectors)), vectors[mask.bool()])


@given(masks(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_packed_tokens_see_their_own_past(mask, dtype):
    packed = PackedRows(mask)
    rows = packed.lay(numbered(mask), -1)
    additive = packed.attention_mask(dtype)
    assert additive.dtype == dtype and set(additive.unique().tolist()) <= {0.0, torch.finfo(dtype).min}
    for row, allowed in zip(rows, additive[:, 0] == 0, strict=True):
        for place, token in enumerate(row.tolist()):
            if token >= 0:
                sequence = token // 100 * 100
                assert row[allowed[place]].tolist() == list(range(sequence, token + 1))


@given(masks(), st.integers(1, 3))
def test_packed_queries_see_their_sequence_and_themselves(mask, each):
    packed = PackedRows(mask, queries=each)
    rows, count = packed.lay(numbered(mask), -1), len(mask)
    queries = packed.lay_queries(torch.arange(1, count + 1)[:, None].expand(-1, each))
    assert sorted(queries[queries > 0].tolist()) == [number for number in range(1, count + 1) for _ in range(each)]
    allowed = packed.query_mask(torch.float32)[:, 0] == 0  # (R, queries, C + queries)
    width = rows.shape[1]
    for row, row_queries, row_allowed in zip(rows, queries, allowed, strict=True):
        for place, sequence in enumerate(row_queries.tolist()):
            own = list(range(place - place % each, place + 1))
            assert row_allowed[place, width:].nonzero().flatten().tolist() == own
            length = int(mask[sequence - 1].sum()) if sequence else 0
            seen = row[row_allowed[place, :width]].tolist()
            assert seen == [100 * sequence + position for position in range(length)]


@given(masks(), st.integers(2, 30))
def test_packed_rows_fit_the_window(mask, window):
    """Where one sequence alone is too long, each has a row of its own."""
    packed = PackedRows(mask, window)
    rows, queries = packed.attention_mask(torch.float32).shape[0], packed.query_mask(torch.float32).shape[-1]
    assert queries <= window or rows == len(mask)
    assert rows <= len(mask)
    assert PackedRows(mask, math.inf).attention_mask(torch.float32).shape[0] <= rows


@given(masks())
def test_tokens_first(mask):
    order = tokens_first(mask)
    assert torch.equal(order.sort(-1).values, torch.arange(mask.shape[1]).expand_as(mask))
    tokens = numbered(mask)
    for row, moved in zip(tokens, tokens.gather(1, order), strict=True):
        kept = row[row > 0]
        assert torch.equal(moved[: len(kept)], kept) and not moved[len(kept) :].any()


@given(LENGTHS, st.integers(1, 4), st.integers(1, 5))
def test_length_groups(lengths, size, most):
    lengths = torch.tensor(lengths)
    groups = length_groups(lengths, size, most)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(lengths)))
    assert len(groups) <= most and (len(groups) == 1 or min(map(len, groups)) >= size)
    for shorter, longer in zip(groups, groups[1:], strict=False):
        assert lengths[shorter].max() <= lengths[longer].min()
    groups = groups_of_one_length(lengths)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(lengths)))
    assert [lengths[group].unique().numel() for group in groups] == [1] * lengths.unique().numel()


@given(LENGTHS, SIDES)
def test_padding_side(lengths, side):
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(0, length) if side == "right" else slice(len(row) - length, None)] = 1
    expected = None if len(set(lengths)) == 1 else side
    assert padding_side(mask, torch.zeros(*mask.shape, 2)) == (None if mask.shape[1] == 1 else expected)


@given(masks())
def test_targets_are_the_next_labels(mask):
    labels = numbered(mask).masked_fill(mask == 0, -100)
    embeds = torch.zeros(*mask.shape, 2)
    targets = next_tokens(labels, None, embeds)
    assert torch.equal(targets[:, :-1], labels[:, 1:]) and (targets[:, -1] == -100).all()
    assert next_tokens(labels, targets, embeds) is targets
    assert next_tokens(None, None, embeds) is None


TEXTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=60)


@given(TEXTS, st.integers(10, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_prefix_tree_holds_what_texts_share_once(texts, window, dtype):
    mask = torch.arange(9) < torch.tensor([[len(text)] for text in texts])
    ids = torch.tensor([text + [0] * (9 - len(text)) for text in texts])
    tree = PrefixTree(ids, mask.long(), window)
    assert torch.equal(tree.at_tokens(tree.input_ids), ids[mask])
    assert torch.equal(tree.at_tokens(tree.position_ids), positions(mask)[mask])
    assert tree.input_ids.shape[1] <= window
    prefixes = {tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)}
    count = int((tree.input_ids > 0).sum())
    assert len(prefixes) <= count <= len(prefixes) + 9 * (len(tree.input_ids) - 1)  # a row begins anew
    additive = tree.attention_mask(dtype)
    assert additive.dtype == dtype and set(additive.unique().tolist()) <= {0.0, torch.finfo(dtype).min}
    for text, row, path in zip(texts, tree.row, tree.path, strict=True):
        for n in range(1, len(text) + 1):
            assert (additive[row, 0, path[n - 1]] == 0).nonzero()[:, 0].tolist() == sorted(path[:n].tolist())
