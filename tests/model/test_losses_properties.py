"""The losses against torch's own on whole logits, and against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_fromage import losses_fromage
from modeling_fromage.losses_fromage import ChunkedTokenLoss, contrastive_loss, duplicate_mask, token_losses

WIDTH = 3
SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@st.composite
def problems(draw):
    """Hidden states, the head of `columns` tokens, the `[RET]` rows and targets among both."""
    tokens, columns, rets = draw(SIZES), draw(SIZES), draw(st.integers(1, 2))
    tensors = normal(draw(SEEDS), (tokens, WIDTH), (columns, WIDTH), (rets, WIDTH))
    targets = draw(st.lists(st.integers(0, columns + rets - 1), min_size=tokens, max_size=tokens))
    return *tensors, torch.tensor(targets)


@given(problems(), st.booleans())
def test_token_losses_are_cross_entropies_of_the_joined_logits(problem, ret_alone_is_trained):
    hidden, head, rows, targets = problem
    frozen, ret = hidden @ head.t(), (hidden @ rows.t()).requires_grad_()
    frozen.requires_grad_(not ret_alone_is_trained)
    inputs = [tensor for tensor in (frozen, ret) if tensor.requires_grad]
    losses = token_losses(frozen, ret, targets, len(head))
    expected = F.cross_entropy(torch.cat([frozen, ret], dim=-1), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (losses, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@given(problems(), st.integers(0, 3))
def test_token_losses_where_the_vocabulary_is_shorter_than_the_ret_token(problem, gap):
    """`[RET]` may lie past the LM's last column: ids between them are no token's."""
    hidden, head, rows, targets = problem
    moved = torch.where(targets >= len(head), targets + gap, targets)
    frozen, ret = hidden @ head.t(), hidden @ rows.t()
    expected = token_losses(frozen, ret, targets, len(head))
    assert torch.equal(token_losses(frozen, ret, moved, len(head) + gap), expected)


@given(problems(), st.integers(1, 40), st.floats(-2, 2))
def test_chunked_loss_has_the_gradient_of_autograd(problem, logits_at_a_time, factor):
    """For chunks of any size, and a loss that is scaled."""
    hidden, head, rows, targets = problem
    inputs = hidden.requires_grad_(), rows.requires_grad_()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(losses_fromage, "LOGITS_AT_A_TIME", logits_at_a_time)
        logits_of = lambda hidden, rows: (hidden @ head.t(), hidden @ rows.t())  # noqa: E731
        loss = ChunkedTokenLoss.apply(hidden, rows, targets, logits_of, len(head) + len(rows), len(head))
    expected = F.cross_entropy(hidden @ torch.cat([head, rows]).t(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(factor * x, inputs) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), SEEDS)
def test_contrastive_loss_by_brute_force(images, seed):
    """Each image against all texts, and each text against all images, but for other rows of the same image."""
    (logits,) = normal(seed, (len(images), len(images)))
    duplicates = duplicate_mask(torch.tensor(images)[:, None])
    total = 0.0
    for matrix in (logits.tolist(), logits.t().tolist()):
        for i, row in enumerate(matrix):
            kept = [value for j, value in enumerate(row) if j == i or images[j] != images[i]]
            total += torch.tensor(kept, dtype=torch.float64).logsumexp(0).item() - row[i]
    expected = total / (2 * len(images))
    assert contrastive_loss(logits, duplicates).item() == pytest.approx(expected, abs=1e-12)
    assert contrastive_loss(logits.t(), duplicates).item() == pytest.approx(expected, abs=1e-12)
    if len(set(images)) == len(images):
        assert not duplicates.any() and torch.equal(contrastive_loss(logits), contrastive_loss(logits, duplicates))


@given(st.integers(1, 6), st.floats(-5, 5), SEEDS)
def test_contrastive_loss_of_shifted_logits(count, shift, seed):
    """What is added to all logits of a batch cancels out."""
    (logits,) = normal(seed, (count, count))
    torch.testing.assert_close(contrastive_loss(logits + shift), contrastive_loss(logits))
