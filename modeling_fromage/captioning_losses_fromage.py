"""The captioning loss (section 3.1), of captions and of documents of several texts and images.

Axes: B rows of text, L tokens, D the LM's input width, M `[RET]`s, q the width of the shared image-text space.
"""

from typing import Any, NamedTuple

import torch

from .backbones_fromage import check_length
from .frozen_lm_fromage import FrozenLM
from .gradient_caching_fromage import in_chunks
from .losses_fromage import mean_over_targets
from .ret_runs_fromage import offsets_of_tokens


class Retrievals(NamedTuple):
    """What `[RET]`s are to find, and how well they were predicted.

    Args:
        token_loss: Sum of the next-token losses that teach the model when to ask for an image.
        num_tokens: Number of these losses.
        embeds: (M, q), the embeddings of the `[RET]`s; (M, r, q) where each has several queries.
        images: (M,), the number of the image that each is to find.
    """

    token_loss: torch.Tensor
    num_tokens: torch.Tensor
    embeds: torch.Tensor
    images: torch.Tensor


def sequence_losses(
    lm: FrozenLM,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor | None,
    ret_targets: torch.Tensor | None,
    across_processes: bool,
    logits_to_keep: int | torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[dict[str, Any], Retrievals | None]:
    """What a model returns for `embeds` (B, L, D): logits unless `logits_to_keep` is `None`, the captioning loss where
    there are `targets` (B, L), and what the `[RET]`s of documents are to find where there are `ret_targets` (B, L).

    Args:
        options: For the LM, in one padded pass with all that it returns; those that are `None` are left out.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if targets is not None:
        check_length(embeds, lm.config.text_config)
    if ret_targets is not None:
        if targets is None or targets.shape != ret_targets.shape or options:
            raise ValueError(
                f"`ret_targets` come with `labels` of their shape, {tuple(ret_targets.shape)}, and without other "
                f"options; got labels {None if targets is None else tuple(targets.shape)} and {sorted(options)}."
            )
        loss, of_documents = _document_losses(lm, embeds, attention_mask, targets, ret_targets, across_processes)
        parts = {"captioning_loss": loss}
        if logits_to_keep is not None:
            parts |= _whole_pass(lm, embeds, attention_mask, None, logits_to_keep, across_processes, options)
        return parts, of_documents
    if targets is None or logits_to_keep is not None or options:
        return _whole_pass(lm, embeds, attention_mask, targets, logits_to_keep, across_processes, options), None
    return {"captioning_loss": _captioning_loss(lm, embeds, attention_mask, targets, across_processes)}, None


def _captioning_loss(
    lm: FrozenLM,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor,
    across_processes: bool = False,
) -> torch.Tensor:
    """Mean next-token loss of `embeds` (B, L, D), given the target of each position, `targets` (B, L), or -100."""
    mask = torch.ones_like(targets) if attention_mask is None else attention_mask
    is_target = (targets != -100) & mask.bool()
    mask = _up_to_the_last(is_target, mask)

    def branch(
        embeds: torch.Tensor, mask: torch.Tensor, is_target: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor]:
        hidden, _ = lm.run_unpadded(embeds, mask)
        return (lm.sum_token_loss(hidden[is_target[mask.bool()]], targets[is_target], _smoothing(lm)),)

    chunks = in_chunks(lm, branch, embeds, mask, is_target, targets)
    losses = [loss for (loss,) in chunks]
    return mean_over_targets(sum(losses[1:], losses[0]), is_target.sum(), across_processes)


def _document_losses(
    lm: FrozenLM,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor,
    ret_targets: torch.Tensor,
    across_processes: bool = False,
) -> tuple[torch.Tensor, Retrievals]:
    """The captioning loss of interleaved texts and images, and what their `[RET]`s are to find: an image each, from
    all that stands before it, images included.

    One ordinary pass: what precedes a `[RET]` depends on the visual tokens, which are trained.

    Args:
        embeds, targets: As in [`_captioning_loss`]. A target that is `[RET]` does not count to the captioning loss.
        ret_targets: (B, L), at a `[RET]`, the last of its tokens, the number of the image that it is to find, -100
            elsewhere.
    """
    mask = torch.ones_like(targets) if attention_mask is None else attention_mask
    is_target, finds = (targets != -100) & mask.bool(), (ret_targets != -100) & mask.bool()
    lm.traits.log_fallback("documents have images before a [RET], which trained parameters have a part in")
    mask = _up_to_the_last(is_target | finds, mask)

    def branch(
        embeds: torch.Tensor,
        mask: torch.Tensor,
        is_target: torch.Tensor,
        targets: torch.Tensor,
        finds: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        hidden, layers = lm.run_unpadded(embeds, mask, all_layers=True)
        tokens = mask.bool()
        sums, is_ret = [], lm.is_ret(targets)
        for predicts, smoothing in ((is_target & ~is_ret, _smoothing(lm)), (is_target & is_ret, 0.0)):
            sums.append(lm.sum_token_loss(hidden[predicts[tokens]], targets[predicts], smoothing))
        last = finds[tokens].nonzero()  # (M, 1)
        rets = last + offsets_of_tokens(lm.config, last.device)
        return *sums, lm.adapter.text_embeds([layer[rets].flatten(1) for layer in layers])

    chunks = in_chunks(lm, branch, embeds, mask, is_target, targets, finds)
    losses, ret_losses, ret_embeds = zip(*chunks, strict=True)
    rets = (is_target & lm.is_ret(targets)).sum()
    loss = mean_over_targets(sum(losses[1:], losses[0]), is_target.sum() - rets, across_processes)
    ret_loss = sum(ret_losses[1:], ret_losses[0])
    return loss, Retrievals(ret_loss, rets, torch.cat(ret_embeds), ret_targets[finds])


def _whole_pass(
    lm: FrozenLM,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor | None,
    across_processes: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """One padded pass of the LM: what it returns, logits unless `logits_to_keep` is `None`, and the captioning loss
    where there are targets."""
    output = lm.decode(embeds, attention_mask, **options)
    parts = {name: output.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
    hidden = output.last_hidden_state
    if targets is not None:
        is_target = targets != -100
        loss = lm.sum_token_loss(hidden[is_target], targets[is_target], _smoothing(lm))
        parts["captioning_loss"] = mean_over_targets(loss, is_target.sum(), across_processes)
    if logits_to_keep is not None:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        parts["logits"] = lm.logits(hidden[:, keep])
    return parts


def _smoothing(lm: FrozenLM) -> float:
    """Of captions' labels, in training alone: an evaluation reports likelihoods."""
    return lm.config.captioning_label_smoothing if lm.adapter.training else 0.0


def _up_to_the_last(is_needed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`mask` (B, L) without what follows a row's last needed token, on which nothing depends: with the authors'
    captions, a row's last token. A row without any stays whole, for a pass of no tokens is none."""
    is_before = is_needed.flip(1).cumsum(1).flip(1).bool()
    return mask.bool() & (is_before | ~is_before.any(dim=1, keepdim=True))


__all__ = ["Retrievals", "sequence_losses"]
