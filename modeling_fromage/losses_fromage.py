"""FROMAGe's training losses (section 3.3), as functions of logits and embeddings."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch.nn import functional as F


def token_loss(logits: torch.Tensor, targets: torch.Tensor, across_processes: bool = False) -> torch.Tensor:
    """Mean cross-entropy of `logits` (M, V) against `targets` (M,), in fp32 or better; 0 where there is no target.

    With `across_processes` the mean is over the targets of all ranks: DDP averages gradients over ranks, so each
    rank's sum is scaled by world size / global count.
    """
    return _global_mean(F.cross_entropy(_at_least_fp32(logits), targets, reduction="none"), across_processes)


def ret_token_loss(
    frozen: torch.Tensor, ret: torch.Tensor, targets: torch.Tensor, ret_token_id: int, across_processes: bool = False
) -> torch.Tensor:
    """[`token_loss`] of constant logits (M, columns) and the `[RET]` columns' (M, R), the only ones with a gradient.

    The cross-entropy is logsumexp(logsumexp(frozen), ret) - target logit, so no (M, V) gradient is ever held.
    """
    frozen, ret = _at_least_fp32(frozen), _at_least_fp32(ret)
    normalizer = torch.cat([frozen.logsumexp(-1, keepdim=True), ret], dim=-1).logsumexp(-1)
    is_ret = targets >= ret_token_id
    from_frozen = frozen.gather(-1, targets.masked_fill(is_ret, 0)[:, None])[:, 0]
    from_ret = ret.gather(-1, (targets - ret_token_id).clamp(min=0)[:, None])[:, 0]
    return _global_mean(normalizer - torch.where(is_ret, from_ret, from_frozen), across_processes)


def _global_mean(losses: torch.Tensor, across_processes: bool) -> torch.Tensor:
    total, count = losses.sum(), torch.tensor(losses.numel(), device=losses.device, dtype=losses.dtype)
    if across_processes:
        dist.all_reduce(count)
        total = total * dist.get_world_size()
    return total / count.clamp(min=1)


def contrastive_loss(logits_per_image: torch.Tensor, duplicates: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the image-to-text and text-to-image InfoNCE losses of (N, N) logits whose diagonal pairs match.

    `duplicates` (N, N), True where two different rows hold the same image, masks those as negatives.
    """
    logits_per_image = _at_least_fp32(logits_per_image)
    if duplicates is not None:
        logits_per_image = logits_per_image.masked_fill(duplicates, float("-inf"))
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_image.t(), targets)) / 2


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def duplicate_mask(image_features: torch.Tensor) -> torch.Tensor:
    """(N, N), True off the diagonal where two rows of `image_features` (N, width) are equal."""
    equal = (image_features[:, None] == image_features[None]).all(-1)
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
