"""Captioning and retrieval losses (section 3.3), skipping work that no trained parameter depends on.

Axes: B rows of text, L tokens, T tokens without padding, N images, H the width of the LM's head, r `[RET]` tokens at
the end of each text, q the width of the shared image-text space.
"""

from typing import Any

import torch

from .adapter_fromage import FromageAdapter
from .backbones_fromage import attention_window, check_length, no_activation_checkpointing
from .captioning_losses_fromage import Retrievals
from .configuration_fromage import FromageConfig
from .frozen_lm_fromage import FrozenLM
from .gradient_caching_fromage import in_chunks
from .losses_fromage import (
    contrastive_loss,
    duplicate_mask,
    gather_numbers,
    gather_with_gradient,
    largest_of_ranks,
    mean_over_targets,
    sigmoid_loss,
)
from .packing_fromage import PackedRows, PrefixTree, tokens_first
from .ret_runs_fromage import ends_of_rets, last_rets

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


# ---- retrieval -----------------------------------------------------------------------------------------------------


def retrieval_losses(
    lm: FrozenLM,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pooled: torch.Tensor | None,
    across_processes: bool = False,
    images: torch.Tensor | None = None,
    of_documents: Retrievals | None = None,
    negatives: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Losses and embeddings of texts (M, L) that end in `[RET]`, without their images, and of the images that match
    them.

    Args:
        pooled: (N, vision width), pooled features of the images.
        across_processes: Whether the pairs of all ranks are one batch.
        images: (M,), the number of each text's image. By default text i has image i, and there are no others.
        of_documents: `[RET]`s in documents, which find images of the same batch, and are negatives of the texts.
        negatives: (N', vision width), pooled features of further images, that no text is to find.

    Returns:
        `ret_token_loss`, `contrastive_loss`, `image_embeds` (M, q) and `text_embeds` (M, q) of matching pairs, the
        latter (M, r, q) where a text has several queries, in the order of the images, and `logits_per_image`
        (N + N', M) and `logits_per_text` (M, N + N') over the images and texts of all ranks, a rank's negatives behind
        its other images.

    Raises:
        ValueError: There are not as many images as texts, or there is no image of that number.
    """
    count = 0 if input_ids is None else len(input_ids)
    pooled = _checked_images(count, pooled, images, of_documents, across_processes)
    if lm.traits.is_sharded and not count and largest_of_ranks(count, pooled.device):
        raise ValueError(
            "With sharded layers all processes make the same passes, and of this step's batches one has captioned "
            "images and another documents alone. Train on one kind of data, or without `shard_backbones`."
        )
    found = [] if of_documents is None else [of_documents]
    if input_ids is not None and count:
        numbers = torch.arange(count, device=pooled.device) if images is None else images
        found.insert(0, _of_texts(lm, input_ids, attention_mask, numbers))
    losses, counts, all_embeds, all_numbers = zip(*found, strict=True)
    loss, targets = sum(losses[1:], losses[0]), sum(counts[1:], counts[0])
    embeds, matches = torch.cat(all_embeds), None
    if images is not None or of_documents is not None:
        matches, order = torch.cat(all_numbers).sort(stable=True)
        embeds = embeds[order]
    return {
        "ret_token_loss": mean_over_targets(loss, targets, across_processes),
        **matching_loss(lm.adapter, lm.config, pooled, embeds, across_processes, matches, negatives),
    }


def _checked_images(
    count: int,
    pooled: torch.Tensor | None,
    images: torch.Tensor | None,
    of_documents: Retrievals | None,
    across_processes: bool,
) -> torch.Tensor:
    """`pooled`, which has an image for each of `count` texts and each `[RET]` of documents; else a `ValueError`."""
    hint = DISPATCH_HINT if across_processes else ""
    there = 0 if pooled is None else len(pooled)
    numbers = [] if images is None else [images]
    numbers += [] if of_documents is None else [of_documents.images]
    if images is None and (there < count or (there > count and of_documents is None)):
        raise ValueError(f"Retrieval text i pairs with image i, but there are {count} texts and {there} images.{hint}")
    if images is not None and len(images) != count:
        raise ValueError(f"`retrieval_targets` names {len(images)} images for {count} retrieval texts.{hint}")
    named = torch.cat(numbers) if numbers else torch.arange(0)
    if pooled is None or bool(((named < 0) | (named >= there)).any()):
        raise ValueError(
            f"The targets of [RET] name images {sorted(set(named.tolist()))[:20]}, and there are {there}, counted from "
            f"0.{hint}"
        )
    return pooled


def _of_texts(
    lm: FrozenLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, images: torch.Tensor
) -> Retrievals:
    """What the `[RET]`s of texts (M, L) without images, at their ends, are to find: `images` (M,)."""
    check_length(input_ids, lm.config.text_config)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    fallback = why_not_ret_only(lm, input_ids, mask)
    if lm.traits.is_sharded and largest_of_ranks(fallback is not None, input_ids.device) and fallback is None:
        fallback = "another process needs an ordinary pass, and with sharded layers all make the same passes"
    if fallback is not None:
        lm.traits.log_fallback(fallback)

    def branch(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ret_only_pass(lm, input_ids, mask) if fallback is None else ordinary_pass(lm, input_ids, mask)

    losses, embeds = zip(*in_chunks(lm, branch, input_ids, mask), strict=True)
    return Retrievals(sum(losses[1:], losses[0]), has_previous_token(mask).sum(), torch.cat(embeds), images)


def matching_loss(
    adapter: FromageAdapter,
    config: FromageConfig,
    pooled: torch.Tensor,
    text_embeds: torch.Tensor,
    across_processes: bool = False,
    matches: torch.Tensor | None = None,
    negatives: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The contrastive loss of images, by their pooled features (N, vision width), and the texts that match them, by
    their embeddings (M, q), or (M, r, q) of several queries: the part of [`retrieval_losses`] that comes after the
    language model.

    Args:
        matches: (M,), the number of each text's image; by default text i matches image i.
        negatives: (N', vision width), of further images. One that is a copy of a text's own image is no negative of
            that text.

    Returns:
        `contrastive_loss`, `image_embeds`, `text_embeds`, `logits_per_image` and `logits_per_text`.
    """
    is_negative = torch.zeros(len(pooled), device=pooled.device)
    if negatives is not None:
        pooled = torch.cat([pooled, negatives])
        is_negative = torch.cat([is_negative, is_negative.new_ones(len(negatives))])
        matches = torch.arange(len(text_embeds), device=text_embeds.device) if matches is None else matches
    images, texts = adapter.image_embeds(pooled), text_embeds
    own = images if matches is None else images[matches]
    if across_processes:
        local = torch.arange(len(texts), device=texts.device) if matches is None else matches
        matches = gather_numbers(local, len(images))
        images, texts, pooled, is_negative = map(gather_with_gradient, (images, texts, pooled, is_negative))
    logits_per_image = adapter.logits_per_image(images, texts)
    duplicates = None
    if config.mask_duplicate_images:
        duplicates = duplicate_mask(pooled)
    elif negatives is not None or (across_processes and bool(is_negative.any())):
        duplicates = duplicate_mask(pooled) & is_negative.bool()[:, None]
    if config.contrastive_loss_type == "siglip":
        loss = sigmoid_loss(logits_per_image, duplicates, matches)
    else:
        smoothing = config.contrastive_label_smoothing if adapter.training else 0.0
        loss = contrastive_loss(logits_per_image, duplicates, matches, smoothing)
    return {
        "contrastive_loss": loss,
        "image_embeds": own,
        "text_embeds": text_embeds,
        "logits_per_image": logits_per_image,
        "logits_per_text": logits_per_image.t(),
    }


@torch.no_grad()
def ret_hidden_states(lm: FrozenLM, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of the last `[RET]` of each text (N, L), without gradient: (N, r * width) for each of
    `text_embed_layers`, its tokens side by side. Of a frozen language model, and while `[RET]` stays as it is, they are
    constants.

    What several texts begin with runs once, where the LM takes that."""
    check_length(input_ids, lm.config.text_config)
    numbers = _number_of_rets(lm, input_ids, attention_mask)
    is_right_padded = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    if not (is_right_padded and lm.can_pack(attention_mask) and lm.takes("shared prefixes")):
        _, layers = lm.run_unpadded(lm.embed(input_ids), attention_mask, all_layers=True)
        return [layer[numbers].flatten(1) for layer in layers]
    tree = PrefixTree(input_ids, attention_mask, attention_window(lm.config.text_config))
    embeds = lm.embed(tree.input_ids)
    output = lm.decode(
        embeds, tree.attention_mask(embeds.dtype), tree.position_ids, output_hidden_states=lm.needs_all_layers
    )
    return [tree.at_tokens(hidden)[numbers].flatten(1) for hidden in lm.text_layers(output)]


def why_not_ret_only(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> str | None:
    """What keeps [`ret_only_pass`] from being exact, for the log; `None` where it is: for a frozen LM that sees the
    whole text, and one `[RET]`, all its tokens, at the end of each."""
    language_model = lm.language_model
    if not torch.is_grad_enabled() or any(p.requires_grad for p in language_model.parameters()):
        return "the language model is being trained, or no gradient is asked for"
    if language_model.training:
        return "the language model is in training mode"
    if input_ids.shape[1] > attention_window(lm.config.text_config):
        return "texts are longer than the language model's attention window"
    if input_ids.shape[1] > lm.rope_switch:
        return "texts are longer than what the language model has one set of rotary frequencies for"
    is_ret, count = lm.is_ret(input_ids), lm.config.num_ret_tokens
    after_ret = is_ret.int().cumsum(-1).bool() & mask.bool()
    is_one = (is_ret.sum(-1) == count) & (ends_of_rets(input_ids, lm.config).sum(-1) == 1)
    if not (is_one.all() and (after_ret == is_ret).all() and (mask.sum(-1) > count).all()):
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
    """Hidden states of all tokens (T, H) of texts (N, L), and of each text's last `[RET]`, (N, r * width) a layer."""
    numbers = _number_of_rets(lm, input_ids, mask)
    hidden, layers = lm.run_unpadded(lm.embed(input_ids), mask, all_layers=True)
    return hidden, [layer[numbers].flatten(1) for layer in layers]


def _number_of_rets(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, r), the numbers of each text's last `[RET]` among all tokens."""
    rows, columns = last_rets(input_ids, lm.config)
    return (mask.bool().flatten().cumsum(0) - 1).view_as(mask)[rows, columns]


def ret_only_pass(lm: FrozenLM, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`ordinary_pass`] returns, at a fraction of its cost and with the same gradient.

    Nothing before `[RET]` depends on a trained parameter: those tokens run without gradient into a KV cache, and
    `[RET]` alone runs with gradient against it. Of the logits at those tokens only the `[RET]` columns have a gradient.
    """
    prefix_mask = mask.masked_fill(lm.is_ret(input_ids), 0)
    targets = input_ids.roll(-1, dims=1)[prefix_mask.bool()]
    ret_ids = input_ids[last_rets(input_ids, lm.config)]  # (N, r)
    run = _packed_prefix_and_ret if lm.can_pack(prefix_mask) else _padded_prefix_and_ret
    with no_activation_checkpointing(lm.language_model):
        hidden, ret_hidden, layers = run(lm, input_ids, prefix_mask, ret_ids)
    loss = lm.token_losses_without_gradient(hidden, targets).sum()
    if ret_ids.shape[1] > 1:  # each but the last predicts the next
        loss = loss + lm.sum_token_loss(ret_hidden[:, :-1].flatten(0, 1), ret_ids[:, 1:].flatten())
    return loss, lm.adapter.text_embeds([layer.flatten(1) for layer in layers])


_PrefixAndRet = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def _packed_prefix_and_ret(
    lm: FrozenLM, input_ids: torch.Tensor, prefix_mask: torch.Tensor, ret_ids: torch.Tensor
) -> _PrefixAndRet:
    """Hidden states of the prefixes' tokens (T, H), constants; of each row's `[RET]` (N, r, H), and (N, r, width) a
    layer."""
    count = ret_ids.shape[1]
    packed = PackedRows(prefix_mask, attention_window(lm.config.text_config), count)
    with torch.no_grad():
        embeds = lm.embed(packed.lay(input_ids))
        prefix = lm.decode(embeds, packed.attention_mask(embeds.dtype), packed.position_ids, use_cache=True)
    last = lm.decode(
        lm.embed(packed.lay_queries(ret_ids)),
        packed.query_mask(embeds.dtype),
        packed.lay_queries(packed.lengths[:, None] + torch.arange(count, device=ret_ids.device)),
        prefix.past_key_values,
        use_cache=True,
        output_hidden_states=lm.needs_all_layers,
    )
    layers = [packed.at_queries(hidden) for hidden in lm.text_layers(last)]
    return packed.at_tokens(prefix.last_hidden_state), packed.at_queries(last.last_hidden_state), layers


def _padded_prefix_and_ret(
    lm: FrozenLM, input_ids: torch.Tensor, prefix_mask: torch.Tensor, ret_ids: torch.Tensor
) -> _PrefixAndRet:
    """[`_packed_prefix_and_ret`] for an LM that takes no packed rows: one batch, padded on the right, and the tokens of
    `[RET]` one by one behind it, as the trial of "cached prefixes" has shown."""
    # A sliding window's cache keeps as many columns as it reaches, padding among them: the prefix and [RET] fill it.
    width = int(min(input_ids.shape[1] + 1, attention_window(lm.config.text_config))) - ret_ids.shape[1]
    order = tokens_first(prefix_mask)[:, :width]
    input_ids, prefix_mask = input_ids.gather(1, order), prefix_mask.gather(1, order)
    with torch.no_grad():
        embeds = lm.embed(input_ids.masked_fill(prefix_mask == 0, 0))
        prefix = lm.decode(embeds, prefix_mask, use_cache=True)
    steps = []
    for place, token in enumerate(ret_ids.split(1, dim=1)):
        last = lm.decode(
            lm.embed(token),
            torch.cat([prefix_mask, prefix_mask.new_ones(len(token), place + 1)], dim=1),
            prefix_mask.long().sum(-1, keepdim=True) + place,
            prefix.past_key_values,
            use_cache=True,
            output_hidden_states=lm.needs_all_layers,
        )
        steps.append([last.last_hidden_state, *lm.text_layers(last)])
    ret_hidden, *layers = (torch.cat(hidden, dim=1) for hidden in zip(*steps, strict=True))
    return prefix.last_hidden_state[prefix_mask.bool()], ret_hidden, layers


def has_previous_token(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, L - 1), True where a token follows a token: for every token of a text but its first."""
    is_token = mask.bool()
    return is_token[:, 1:] & is_token[:, :-1]


__all__ = ["LOSS_WEIGHTS", "matching_loss", "ret_hidden_states", "retrieval_losses", "weighted_sum"]
