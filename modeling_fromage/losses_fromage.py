"""FROMAGe's training losses (section 3.3), as functions of logits and embeddings."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

LOGITS_AT_A_TIME = 1 << 24  # elements of a chunk's logits


def token_losses(
    frozen: torch.Tensor, ret: torch.Tensor, targets: torch.Tensor, ret_token_id: int, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropies (M,) in fp32 or better, of the LM's logits (M, columns) and the `[RET]` columns' (M, R).

    With targets (M,), this is logsumexp(logsumexp(frozen), ret) - target logit: the two are never joined, and where
    the first has no gradient only the second's columns are differentiated.

    Args:
        smoothing: The share of a target that is spread evenly over all columns, as `label_smoothing` in torch.
    """
    frozen = _at_least_fp32(frozen)
    log_normalizer = frozen.logsumexp(-1)
    losses = split_token_losses(log_normalizer, target_logits(frozen, targets), ret, targets, ret_token_id)
    if not smoothing:
        return losses
    return _smoothed(losses, _joint_normalizer(log_normalizer, _at_least_fp32(ret)), frozen, ret, smoothing)


def _smoothed(
    losses: torch.Tensor, joint: torch.Tensor, frozen: torch.Tensor, ret: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Token losses (M,) with smoothed labels, of those without: the rest is the mean loss over all columns."""
    mean = (frozen.sum(-1) + _at_least_fp32(ret).sum(-1)) / (frozen.shape[-1] + ret.shape[-1])
    return (1 - smoothing) * losses + smoothing * (joint - mean)


def target_logits(frozen: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(M,) of (M, columns); whatever it is where the target is a `[RET]`, past the last column."""
    return frozen.gather(-1, targets.clamp(max=frozen.shape[-1] - 1)[:, None])[:, 0]


def split_token_losses(
    log_normalizer: torch.Tensor, from_frozen: torch.Tensor, ret: torch.Tensor, targets: torch.Tensor, ret_token_id: int
) -> torch.Tensor:
    """[`token_losses`] of the frozen logits' logsumexp (M,) and target logits (M,)."""
    ret = _at_least_fp32(ret)
    normalizer = _joint_normalizer(log_normalizer, ret)
    from_ret = ret.gather(-1, (targets - ret_token_id).clamp(min=0)[:, None])[:, 0]
    return normalizer - torch.where(targets >= ret_token_id, from_ret, from_frozen)


def _joint_normalizer(log_normalizer: torch.Tensor, ret: torch.Tensor) -> torch.Tensor:
    """logsumexp (M,) over all columns, of the frozen ones' (M,) and the `[RET]` logits (M, R)."""
    return torch.cat([log_normalizer[:, None], ret], dim=-1).logsumexp(-1)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _losses_and_gradients(
    frozen: torch.Tensor, ret: torch.Tensor, targets: torch.Tensor, ret_token_id: int, smoothing: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """[`token_losses`] and their gradients, probability less one at the target (or less its smoothed label), with one
    copy of the logits."""
    probabilities = frozen.to(torch.promote_types(frozen.dtype, torch.float32), copy=True)
    log_normalizer = probabilities.logsumexp(-1)
    from_frozen = target_logits(probabilities, targets)
    losses = split_token_losses(log_normalizer, from_frozen, ret, targets, ret_token_id)
    joint = _joint_normalizer(log_normalizer, _at_least_fp32(ret))[:, None]
    if smoothing:
        losses = _smoothed(losses, joint[:, 0], probabilities, ret, smoothing)
    probabilities.sub_(joint).exp_()
    is_ret = targets >= ret_token_id
    own = (1 - smoothing) * (is_ret.to(probabilities)[:, None] - 1)
    probabilities.scatter_add_(-1, targets.masked_fill(is_ret, 0)[:, None], own)
    ret_gradient = (_at_least_fp32(ret) - joint).exp()
    ret_places = torch.arange(ret.shape[-1], device=ret.device) == (targets - ret_token_id)[:, None]
    ret_gradient -= (1 - smoothing) * ret_places.to(ret_gradient)
    if smoothing:
        for gradient in (probabilities, ret_gradient):
            gradient.sub_(smoothing / (frozen.shape[-1] + ret.shape[-1]))
    return losses, (probabilities.to(frozen.dtype), ret_gradient.to(ret.dtype))


class ChunkedTokenLoss(torch.autograd.Function):
    """Sum of [`token_losses`] over hidden states (T, H), a chunk of tokens at a time.

    Each chunk's gradient is taken while its logits exist, so that no (T, V) tensor ever does. For heads without
    trained parameters: only `hidden` and `ret_rows` (R, H) get a gradient. `logits_of` calls the head, where torch's
    `linear_cross_entropy` takes its weight: a quantised or offloaded head has none, and some scale or cap its output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        ret_rows: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        columns: int,
        ret_token_id: int,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        total, grads, grad_rows = torch.zeros((), device=hidden.device), [], torch.zeros_like(ret_rows)
        size = max(1, LOGITS_AT_A_TIME // columns)
        for chunk, chunk_targets in zip(hidden.split(size), targets.split(size), strict=True):
            # Hooks of its own: those of an enclosing checkpoint would recompute the branch for this small graph.
            with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                chunk, rows = chunk.detach().requires_grad_(), ret_rows.detach().requires_grad_()
                frozen, ret = logits_of(chunk, rows)
            logits = frozen.detach(), ret.detach()
            losses, gradients = _losses_and_gradients(*logits, chunk_targets, ret_token_id, smoothing)
            torch.autograd.backward((frozen, ret), gradients, inputs=(chunk, rows))
            total = total + losses.sum()
            leaves: Any = (chunk, rows)  # which have a gradient now
            grads.append(leaves[0].grad)
            grad_rows += leaves[1].grad
        ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden), grad_rows)
        return total if grads else _at_least_fp32(hidden.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_rows = ctx.saved_tensors
        grads = (grad * grad_output.to(grad) for grad in (grad_hidden, grad_rows))
        return *grads, None, None, None, None, None


def mean_over_targets(total: torch.Tensor, count: torch.Tensor, across_processes: bool = False) -> torch.Tensor:
    """The mean of `count` losses that sum to `total`; 0 where there is none.

    With `across_processes` the mean is over the targets of all ranks: DDP averages gradients over ranks, so each
    rank's sum is scaled by world size / global count.
    """
    count = count.to(total)
    if across_processes:
        dist.all_reduce(count)
        total = total * dist.get_world_size()
    return total / count.clamp(min=1)


def contrastive_loss(
    logits_per_image: torch.Tensor,
    duplicates: torch.Tensor | None = None,
    matches: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean of the text-to-image and image-to-text InfoNCE losses of (N, M) logits of N images and M texts.

    Args:
        duplicates (`torch.Tensor` of shape `(N, N)`, *optional*): True where two different rows hold the same image,
            which is no negative then.
        matches (`torch.LongTensor` of shape `(M,)`, *optional*): The image that each text is to find; by default text i
            finds image i. Images that no text is to find are negatives alone. Without texts the loss is 0.
        smoothing (`float`): The share of a target that is spread evenly over all candidates, itself included; other
            rows of the same image are no candidates.
    """
    logits_per_image = _at_least_fp32(logits_per_image)
    count = logits_per_image.shape[1]
    if not count:
        return logits_per_image.sum()
    if duplicates is not None:
        of_texts = duplicates if matches is None else duplicates[:, matches]
        logits_per_image = logits_per_image.masked_fill(of_texts, float("-inf"))
    texts = torch.arange(count, device=logits_per_image.device)
    own = logits_per_image if matches is None else logits_per_image[matches]
    to_images = _cross_entropy(logits_per_image.t(), texts if matches is None else matches, smoothing)
    return (_cross_entropy(own, texts, smoothing) + to_images) / 2


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """torch's, but that no label is smoothed over candidates whose logit is minus infinity."""
    if not smoothing:
        return F.cross_entropy(logits, targets)
    losses, is_candidate = -logits.log_softmax(-1), logits.isfinite()
    own = losses.gather(-1, targets[:, None])[:, 0]
    mean = losses.masked_fill(~is_candidate, 0).sum(-1) / is_candidate.sum(-1)
    return ((1 - smoothing) * own + smoothing * mean).mean()


def sigmoid_loss(
    logits_per_image: torch.Tensor, duplicates: torch.Tensor | None = None, matches: torch.Tensor | None = None
) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023) of (N, M) logits of N images and M texts: the binary cross-entropies of all
    pairs, summed and divided by the number of texts. Args are those of [`contrastive_loss`]."""
    logits_per_image = _at_least_fp32(logits_per_image)
    count = logits_per_image.shape[1]
    if not count:
        return logits_per_image.sum()
    matches = torch.arange(count, device=logits_per_image.device) if matches is None else matches
    is_pair = torch.arange(len(logits_per_image), device=matches.device)[:, None] == matches
    losses = F.binary_cross_entropy_with_logits(logits_per_image, is_pair.to(logits_per_image), reduction="none")
    if duplicates is not None:
        losses = losses.masked_fill(duplicates[:, matches], 0.0)
    return losses.sum() / count


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def duplicate_mask(image_features: torch.Tensor) -> torch.Tensor:
    """(N, N), True off the diagonal where two rows of `image_features` (N, width) are equal."""
    number = image_features.unique(dim=0, return_inverse=True)[1]
    equal = number[:, None] == number[None]
    return equal & ~torch.eye(len(image_features), dtype=torch.bool, device=image_features.device)


def gather_with_gradient(embeds: torch.Tensor) -> torch.Tensor:
    """Concatenate `embeds` (N_rank, ...) over all ranks, in rank order, with gradient to every rank's rows.

    N may differ between ranks. The authors' gather drops the gradient of remote rows.
    """
    size = torch.tensor([len(embeds)], device=embeds.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.cat([embeds, embeds.new_zeros(longest - len(embeds), *embeds.shape[1:])])
    gathered = dist_nn.all_gather(padded)
    return torch.cat([rows[: int(s)] for rows, s in zip(gathered, sizes, strict=True)])


def gather_numbers(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Concatenate over all ranks, in rank order, `numbers` (M_rank,) of a rank's own `count` rows, as numbers of the
    rows of all ranks."""
    counts = [torch.zeros(1, dtype=torch.long, device=numbers.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, numbers.new_tensor([count]))
    return gather_with_gradient(numbers + sum(int(c) for c in counts[: dist.get_rank()]))


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest `number` of all ranks, which must call this together."""
    tensor = torch.tensor(number, device=device, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
