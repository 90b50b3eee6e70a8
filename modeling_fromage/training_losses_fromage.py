"""Captioning and retrieval losses (section 3.3), skipping work that no trained parameter depends on.

Axes: B rows of text, L tokens, T tokens without padding, N images, H the width of the LM's head, q the width of the
shared image-text space.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .adapter_fromage import FromageAdapter
from .backbones_fromage import attention_window, no_activation_checkpointing
from .configuration_fromage import FromageConfig
from .frozen_lm_fromage import FrozenLM
from .losses_fromage import (
    contrastive_loss,
    duplicate_mask,
    gather_with_gradient,
    largest_of_ranks,
    mean_over_targets,
)
from .packing_fromage import PackedRows, PrefixTree, tokens_first

# The losses by the names that they have in the model's output, and the fields of the configuration that weight them.
LOSS_WEIGHTS = {
    "captioning_loss": "captioning_loss_weight",
    "ret_token_loss": "ret_token_loss_weight",
    "contrastive_loss": "contrastive_loss_weight",
}

# For errors about counts that differ, where several processes train.
DISPATCH_HINT = (
    " Of a streamed data set, accelerate cuts batches between processes, and concatenated captions have fewer rows "
    'than images: set `accelerator_config={"dispatch_batches": False}` in TrainingArguments, or use FromageTrainer.'
)


def weighted_sum(losses: dict[str, Any], config: FromageConfig) -> torch.Tensor | None:
    """The training loss: the sum of those of `LOSS_WEIGHTS` that are among `losses`, or `None`."""
    terms = [getattr(config, weight) * losses[name] for name, weight in LOSS_WEIGHTS.items() if name in losses]
    return sum(terms[1:], terms[0]) if terms else None


# ---- captioning ----------------------------------------------------------------------------------------------------


def captioning_loss(
    lm: FrozenLM,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor,
    across_processes: bool = False,
) -> torch.Tensor:
    """Mean next-token loss of `embeds` (B, L, D), given the target of each position, `targets` (B, L), or -100."""
    mask = torch.ones_like(targets) if attention_mask is None else attention_mask
    is_target = (targets != -100) & mask.bool()
    # Nothing depends on what follows a row's last prediction: its last token, with the authors' captions.
    is_needed = is_target.flip(1).cumsum(1).flip(1).bool()
    mask = mask.bool() & is_needed if bool(is_needed.any()) else mask

    def branch(
        embeds: torch.Tensor, mask: torch.Tensor, is_target: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor]:
        hidden, _ = lm.run_unpadded(embeds, mask)
        return (lm.sum_token_loss(hidden[is_target[mask.bool()]], targets[is_target]),)

    chunks = _in_chunks(lm, branch, embeds, mask, is_target, targets)
    losses = [loss for (loss,) in chunks]
    return mean_over_targets(sum(losses[1:], losses[0]), is_target.sum(), across_processes)


# ---- retrieval -----------------------------------------------------------------------------------------------------


def retrieval_losses(
    lm: FrozenLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pooled: torch.Tensor | None,
    across_processes: bool = False,
) -> dict[str, torch.Tensor]:
    """Losses and embeddings of texts (N, L) that end in `[RET]`, without their images, and of the images that match
    them.

    Args:
        pooled: (N, vision width), pooled features of the images.
        across_processes: Whether the pairs of all ranks are one batch.

    Returns:
        `ret_token_loss`, `contrastive_loss`, `image_embeds` (N, q), and `logits_per_image` and `logits_per_text`
        over the pairs of all ranks.

    Raises:
        ValueError: There are not as many images as texts.
    """
    if pooled is None or len(pooled) != len(input_ids):
        raise ValueError(
            f"Retrieval text i pairs with image i, but there are {len(input_ids)} texts and "
            f"{0 if pooled is None else len(pooled)} images.{DISPATCH_HINT if across_processes else ''}"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    fallback = why_not_ret_only(lm, input_ids, mask)
    if lm.traits.is_sharded and largest_of_ranks(fallback is not None, input_ids.device) and fallback is None:
        fallback = "another process needs an ordinary pass, and with sharded layers all make the same passes"
    if fallback is not None:
        lm.traits.log_fallback(fallback)

    def branch(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ret_only_pass(lm, input_ids, mask) if fallback is None else ordinary_pass(lm, input_ids, mask)

    losses, embeds = zip(*_in_chunks(lm, branch, input_ids, mask), strict=True)
    count = has_previous_token(mask).sum()
    return {
        "ret_token_loss": mean_over_targets(sum(losses[1:], losses[0]), count, across_processes),
        **matching_loss(lm.adapter, lm.config, pooled, torch.cat(embeds), across_processes),
    }


def matching_loss(
    adapter: FromageAdapter,
    config: FromageConfig,
    pooled: torch.Tensor,
    text_embeds: torch.Tensor,
    across_processes: bool = False,
) -> dict[str, torch.Tensor]:
    """The contrastive loss of images, by their pooled features (N, vision width), and the texts that match them, by
    their embeddings (N, q): the part of [`retrieval_losses`] that comes after the language model.

    Returns:
        `contrastive_loss`, `image_embeds`, `text_embeds`, `logits_per_image` and `logits_per_text`.
    """
    image_embeds = adapter.image_embeds(pooled)
    images, texts = image_embeds, text_embeds
    if across_processes:
        images, texts, pooled = (gather_with_gradient(tensor) for tensor in (images, texts, pooled))
    logits_per_image = adapter.logit_scale.exp() * images @ texts.t()
    duplicates = duplicate_mask(pooled) if config.mask_duplicate_images else None
    return {
        "contrastive_loss": contrastive_loss(logits_per_image, duplicates),
        "image_embeds": image_embeds,
        "text_embeds": text_embeds,
        "logits_per_image": logits_per_image,
        "logits_per_text": logits_per_image.t(),
    }


@torch.no_grad()
def ret_hidden_states(lm: FrozenLM, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of the last `[RET]` of each text (N, L), without gradient: (N, width) for each of
    `text_embed_layers`. Of a frozen language model, and while `[RET]` stays as it is, they are constants.

    What several texts begin with runs once, where the LM takes that."""
    numbers = _number_of_rets(lm, input_ids, attention_mask)
    is_right_padded = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    if not (is_right_padded and lm.can_pack(attention_mask) and lm.takes("shared prefixes")):
        _, layers = lm.run_unpadded(lm.embed(input_ids), attention_mask, all_layers=True)
        return [layer[numbers] for layer in layers]
    tree = PrefixTree(input_ids, attention_mask, attention_window(lm.config.text_config))
    embeds = lm.embed(tree.input_ids)
    output = lm.decode(
        embeds, tree.attention_mask(embeds.dtype), tree.position_ids, output_hidden_states=lm.needs_all_layers
    )
    return [tree.at_tokens(hidden)[numbers] for hidden in lm.text_layers(output)]


def why_not_ret_only(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> str | None:
    """What keeps [`ret_only_pass`] from being exact, for the log; `None` where it is: for a frozen LM that sees the
    whole text, and one `[RET]`, at the end of each."""
    language_model = lm.language_model
    if not torch.is_grad_enabled() or any(p.requires_grad for p in language_model.parameters()):
        return "the language model is being trained, or no gradient is asked for"
    if language_model.training:
        return "the language model is in training mode"
    if input_ids.shape[1] > attention_window(lm.config.text_config):
        return "texts are longer than the language model's attention window"
    if input_ids.shape[1] > lm.rope_switch:
        return "texts are longer than what the language model has one set of rotary frequencies for"
    is_ret = lm.is_ret(input_ids)
    after_ret = is_ret.int().cumsum(-1).bool() & mask.bool()
    if not ((is_ret.sum(-1) == 1).all() and (after_ret == is_ret).all() and (mask.sum(-1) > 1).all()):
        return "a text has [RET] elsewhere than once, at its end, or nothing before it"
    return lm.traits.why_no_shortcut(language_model)


def ordinary_pass(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses of texts (N, L), and their `[RET]` embeddings (N, q)."""
    hidden, layers = _hidden_states_and_rets(lm, input_ids, mask)
    has_previous = has_previous_token(mask)
    predicts = torch.nn.functional.pad(has_previous, (0, 1))[mask.bool()]
    loss = lm.sum_token_loss(hidden[predicts], input_ids[:, 1:][has_previous])
    return loss, lm.adapter.text_embeds(layers)


def _hidden_states_and_rets(
    lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states of all tokens (T, H) of texts (N, L), and of each text's last `[RET]`, (N, width) a layer."""
    numbers = _number_of_rets(lm, input_ids, mask)
    hidden, layers = lm.run_unpadded(lm.embed(input_ids), mask, all_layers=True)
    return hidden, [layer[numbers] for layer in layers]


def _number_of_rets(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,), the number of each text's last `[RET]` among all tokens."""
    rows, columns = lm.last_rets(input_ids)
    return (mask.bool().flatten().cumsum(0) - 1).view_as(mask)[rows, columns]


def ret_only_pass(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`ordinary_pass`] returns, at a fraction of its cost and with the same gradient.

    Nothing before `[RET]` depends on a trained parameter: those tokens run without gradient into a KV cache, and
    `[RET]` alone runs with gradient against it. Of the logits only the `[RET]` columns have a gradient.
    """
    prefix_mask = mask.masked_fill(lm.is_ret(input_ids), 0)
    targets = input_ids[:, 1:][has_previous_token(mask)]
    ret_ids = input_ids[lm.last_rets(input_ids)]
    run = _packed_prefix_and_ret if lm.can_pack(prefix_mask) else _padded_prefix_and_ret
    with no_activation_checkpointing(lm.language_model):
        hidden, layers = run(lm, input_ids, prefix_mask, ret_ids)
    return lm.token_losses_without_gradient(hidden, targets).sum(), lm.adapter.text_embeds(layers)


def _packed_prefix_and_ret(
    lm: FrozenLM, input_ids: torch.Tensor, prefix_mask: torch.Tensor, ret_ids: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states of the prefixes' tokens (T, H), constants, and of each row's `[RET]`, (N, width) a layer."""
    packed = PackedRows(prefix_mask, attention_window(lm.config.text_config))
    with torch.no_grad():
        embeds = lm.embed(packed.lay(input_ids))
        prefix = lm.decode(embeds, packed.attention_mask(embeds.dtype), packed.position_ids, use_cache=True)
    last = lm.decode(
        lm.embed(packed.lay_queries(ret_ids)),
        packed.query_mask(embeds.dtype),
        packed.lay_queries(packed.lengths),
        prefix.past_key_values,
        use_cache=True,
        output_hidden_states=lm.needs_all_layers,
    )
    layers = [hidden[packed.row, packed.slot] for hidden in lm.text_layers(last)]
    return packed.at_tokens(prefix.last_hidden_state), layers


def _padded_prefix_and_ret(
    lm: FrozenLM, input_ids: torch.Tensor, prefix_mask: torch.Tensor, ret_ids: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """[`_packed_prefix_and_ret`] for an LM that takes no packed rows: one batch, padded on the right."""
    order = tokens_first(prefix_mask)
    input_ids, prefix_mask = input_ids.gather(1, order), prefix_mask.gather(1, order)
    with torch.no_grad():
        embeds = lm.embed(input_ids.masked_fill(prefix_mask == 0, 0))
        prefix = lm.decode(embeds, prefix_mask, use_cache=True)
    last = lm.decode(
        lm.embed(ret_ids[:, None]),
        torch.cat([prefix_mask, prefix_mask.new_ones(len(ret_ids), 1)], dim=1),
        prefix_mask.long().sum(-1, keepdim=True),
        prefix.past_key_values,
        use_cache=True,
        output_hidden_states=lm.needs_all_layers,
    )
    return prefix.last_hidden_state[prefix_mask.bool()], [hidden[:, 0] for hidden in lm.text_layers(last)]


def has_previous_token(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, L - 1), True where a token follows a token: for every token of a text but its first."""
    is_token = mask.bool()
    return is_token[:, 1:] & is_token[:, :-1]


def _in_chunks(
    lm: FrozenLM, branch: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """Run `branch` on chunks of `tensors` (B, ...), recomputing each in backward: gradient caching (Gao et al. 2021),
    which gives a contrastive batch the memory of one chunk."""
    size, rows = lm.config.gradient_cache_chunk_size, len(tensors[0])
    if not size or not torch.is_grad_enabled():
        return [branch(*tensors)]
    pieces = [tensor.split(size) for tensor in tensors]
    if lm.traits.is_sharded:  # as many chunks in every process
        count = largest_of_ranks(len(pieces[0]), tensors[0].device)
        if largest_of_ranks(rows < count, tensors[0].device):
            raise ValueError(
                f"With sharded layers all processes run as many chunks, here {count}, and one has fewer sequences "
                f"(this one {rows}). Set `dataloader_drop_last=True`, or a larger `gradient_cache_chunk_size`."
            )
        pieces = [tensor.tensor_split(count) for tensor in tensors]
    if len(pieces[0]) == 1:
        return [branch(*tensors)]
    return [checkpoint(branch, *piece, use_reentrant=False) for piece in zip(*pieces, strict=True)]


__all__ = ["LOSS_WEIGHTS", "captioning_loss", "matching_loss", "ret_hidden_states", "retrieval_losses", "weighted_sum"]
