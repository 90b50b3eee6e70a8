"""The frozen language model as FROMAGe runs it, with `[RET]` among its input and output embeddings.

Axes: B rows of text, L tokens, T tokens without padding, D the LM's input width, H its head's width, V columns of
logits, N images, k visual tokens per image, R `[RET]` tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import Cache, PreTrainedModel

from .adapter_fromage import FromageAdapter
from .backbone_checks_fromage import LanguageModelTraits
from .backbones_fromage import attention_window, decoder_and_head, independent_length, rope_switch, run_decoder
from .configuration_fromage import FromageConfig
from .losses_fromage import (
    LOGITS_AT_A_TIME,
    ChunkedTokenLoss,
    split_token_losses,
    target_logits,
    token_losses,
)
from .packing_fromage import PackedRows, groups_of_one_length, length_groups, padding_side, positions, tokens_first

VisualTokens = torch.Tensor | Sequence[torch.Tensor]


class DecoderOutput(Protocol):
    """A decoder's output, by the fields that FROMAGe reads; those that were not asked for are `None`."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    past_key_values: Cache

    def get(self, name: str) -> Any: ...


class FrozenLM:
    """The only caller of the language model: embedding, decoding, logits, and sums of token losses.

    Made anew for each call of the model, because PEFT replaces modules.

    Args:
        language_model (`PreTrainedModel`): A causal LM.
        adapter ([`FromageAdapter`]): For `[RET]` and for the visual tokens.
        config ([`FromageConfig`]): For token ids and layers.
        traits ([`LanguageModelTraits`]): What trials have shown of this LM.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        adapter: FromageAdapter,
        config: FromageConfig,
        traits: LanguageModelTraits,
    ):
        self.language_model, self.adapter, self.config, self.traits = language_model, adapter, config, traits
        self.decoder, self.head = decoder_and_head(language_model)
        self.rope_switch, self.longest = rope_switch(config.text_config), independent_length(config.text_config)

    def takes(self, ability: str) -> bool:
        """Whether the LM has one of `ABILITIES` with its present attention implementation."""
        return self.traits.takes(self.language_model, ability)

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor, visual_tokens: VisualTokens | None = None, hint: str = "") -> torch.Tensor:
        """Token ids (B, L) -> the LM's inputs (B, L, D), with visual tokens at the image placeholders.

        Args:
            visual_tokens: (N, k, D), in reading order.
            hint: A sentence for the error about counts that differ.

        Raises:
            ValueError: There are more or fewer visual tokens than placeholders.
        """
        is_ret, is_image = self.is_ret(input_ids), input_ids == self.config.image_token_id
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_ret | is_image, 0))
        if self.config.text_embedding_scale != 1.0:
            embeds = embeds * self.config.text_embedding_scale
        ret_rows = self.adapter.ret_rows()
        if self.config.ret_embedding_scale != 1.0:  # the embedding module scales the LM's own rows, the head does not
            ret_rows = ret_rows * self.config.ret_embedding_scale
        ret_rows = ret_rows.to(embeds)
        ret_index = (input_ids - self.config.ret_token_id).clamp(0, len(ret_rows) - 1)
        embeds = torch.where(is_ret[..., None], ret_rows[ret_index], embeds)
        return self.place_images(embeds, input_ids, visual_tokens, hint)

    def place_images(
        self, embeds: torch.Tensor, input_ids: torch.Tensor, visual_tokens: VisualTokens | None, hint: str = ""
    ) -> torch.Tensor:
        """Put visual tokens into `embeds` (B, L, D) at the placeholders of `input_ids` (B, L)."""
        is_image = input_ids == self.config.image_token_id
        if visual_tokens is None:
            vectors = embeds.new_empty(0, embeds.shape[-1])
        elif isinstance(visual_tokens, torch.Tensor):  # (N, k, D), or (1, rows, D): `generate` may cut within an image
            vectors = visual_tokens.flatten(0, 1)  # (N k, D)
        else:  # a list, from `generate`
            vectors = torch.cat(list(visual_tokens))
        count, k = int(is_image.sum()), self.config.num_image_tokens
        if count != len(vectors):
            raise ValueError(
                f"The text has {count} image placeholder tokens, but {len(vectors) // k} images were given, which take "
                f"{len(vectors)} ({k} each). Let FromageProcessor build both.{hint}"
            )
        if count:
            embeds = embeds.masked_scatter(is_image[..., None], vectors.to(embeds))
        return embeds

    def is_ret(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L), True at `[RET]`."""
        return (input_ids >= self.config.ret_token_id) & (input_ids < self.config.logit_width)

    # ---- hidden states --------------------------------------------------------------------------------------------

    def decode(
        self,
        embeds: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> DecoderOutput:
        """Run the LM without its head on `embeds` (B, L, D).

        Args:
            attention_mask: (B, L), padding on either side; or what the LM takes otherwise, for packed rows say.
            position_ids: (B, L); counted from the mask where absent.

        Raises:
            ValueError: The LM computes other numbers for padded texts than for each by itself, and this pass cannot
                be arranged otherwise.
        """
        # Compiled code does not look at the mask unless it has to.
        takes_both = torch.compiler.is_compiling() and self.takes("left padding") and self.takes("right padding")
        padding = None if takes_both else padding_side(attention_mask, embeds)
        if past_key_values is not None:
            kwargs["cache"] = past_key_values
        if padding and not self.takes(f"{padding} padding"):
            return self._decode_with_padding_last(embeds, attention_mask, position_ids, **kwargs)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask)[:, -embeds.shape[1] :]
        _check_lengths(self.rope_switch, self.longest, embeds, position_ids, past_key_values)
        kwargs.setdefault("use_cache", False)
        return run_decoder(self.decoder, embeds, attention_mask, position_ids, **kwargs)

    def _decode_with_padding_last(
        self, embeds: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor | None, **kwargs: Any
    ) -> DecoderOutput:
        captured = kwargs.get("use_cache") or kwargs.get("output_attentions")
        if captured or not self.takes("right padding"):
            raise ValueError(
                f"{type(self.language_model).__name__} computes other numbers for texts that are padded "
                f"{'on the left ' if captured else ''}than for each text by itself. Give it texts of one length at a "
                "time" + (", or use no cache and no attentions." if captured else ".")
            )
        order = tokens_first(mask)
        if position_ids is not None:
            position_ids = position_ids.expand_as(mask).gather(1, order)
        embeds = embeds.take_along_dim(order[..., None], dim=1)
        output = self.decode(embeds, mask.gather(1, order), position_ids, **kwargs)
        back = order.argsort(dim=-1)[..., None]
        output.last_hidden_state = output.last_hidden_state.take_along_dim(back, dim=1)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(hidden.take_along_dim(back, dim=1) for hidden in output.hidden_states)
        return output

    @property
    def needs_all_layers(self) -> bool:
        """Whether `text_embed_layers` names others than the last, so that `decode` must return `hidden_states`."""
        return self.config.text_embed_layers != [-1]

    def text_layers(self, output: DecoderOutput) -> list[torch.Tensor]:
        """The hidden states (B, L, width) that `text_embed_layers` names."""
        layers = self.config.text_embed_layers
        return [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]

    def can_pack(self, mask: torch.Tensor) -> bool:
        """Whether the sequences of `mask` (B, L) can share rows: the LM takes packed rows, and no sequence is longer
        than its attention window, which only its own masks know of."""
        within_window = int(mask.sum(-1).max()) < min(attention_window(self.config.text_config), self.rope_switch)
        return within_window and self.takes("packed rows")

    def run_unpadded(
        self, embeds: torch.Tensor, mask: torch.Tensor, all_layers: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run `embeds` (B, L, D) without their padding: packed where the LM takes it, else in groups of like length.

        Returns:
            The last hidden states (T, H) at the tokens of `mask` (B, L), row by row; and with `all_layers` those of
            `text_embed_layers`, (T, width) each.
        """
        options: dict[str, Any] = {"output_hidden_states": True} if all_layers and self.needs_all_layers else {}
        if self.can_pack(mask):
            packed = PackedRows(mask, attention_window(self.config.text_config))
            output = self.decode(
                packed.lay(embeds), packed.attention_mask(embeds.dtype), packed.position_ids, **options
            )
            layers = self.text_layers(output) if all_layers else []
            return packed.at_tokens(output.last_hidden_state), [packed.at_tokens(hidden) for hidden in layers]
        order = tokens_first(mask)
        embeds, mask = embeds.take_along_dim(order[..., None], dim=1), mask.gather(1, order)
        flat_position = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        found_positions, found = [], []
        lengths = mask.sum(-1)
        for rows in _groups(lengths, self.takes("right padding"), self.rope_switch, self.traits.is_sharded):
            columns = mask[rows].any(0)  # without padding that no row of the group needs
            own = mask[rows][:, columns].bool()
            output = self.decode(embeds[rows][:, columns], own.long(), **options)
            layers = self.text_layers(output) if all_layers else []
            found_positions.append(flat_position[rows][:, columns][own])
            found.append([hidden[own] for hidden in (output.last_hidden_state, *layers)])
        order = torch.cat(found_positions).argsort()
        last, *layers = (torch.cat(hidden)[order] for hidden in zip(*found, strict=True))
        return last, layers

    # ---- logits and their losses ----------------------------------------------------------------------------------

    def split_logits(
        self, hidden: torch.Tensor, ret_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (..., H) -> the LM's own logits (..., columns before `[RET]`), and those of `[RET]`, (..., R).

        Args:
            ret_rows: (R, H), the adapter's where absent.
        """
        ret_rows = self.adapter.ret_head_rows() if ret_rows is None else ret_rows
        frozen = self.transform(self.head(hidden)[..., : self.config.ret_token_id])
        return frozen, self.transform(hidden @ ret_rows.to(hidden).t())

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """What the LM does to its head's output, elementwise: a scale, a soft cap, or nothing."""
        return self.traits.logit_transform_of(self.language_model)(logits)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., H) -> (..., V): the LM's columns, the image token's, and those of `[RET]`."""
        frozen, ret = self.split_logits(hidden)
        columns = [frozen, ret]
        missing = self.config.ret_token_id - frozen.shape[-1]
        if missing > 0:  # ids that the LM has no row for: only `<|image|>`
            columns.insert(1, frozen.new_full((*frozen.shape[:-1], missing), torch.finfo(frozen.dtype).min))
        return torch.cat(columns, dim=-1)

    def sum_token_loss(self, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the cross-entropies at hidden states (T, H) of `targets` (T,), with gradient to the hidden states;
        logits exist for a chunk of tokens at a time."""
        if not torch.is_grad_enabled() and not smoothing:
            return self.token_losses_without_gradient(hidden, targets).sum()
        ret_rows = self.adapter.ret_head_rows().to(hidden)
        ret_token_id = self.config.ret_token_id
        if any(parameter.requires_grad for parameter in self.head.parameters()):
            return token_losses(*self.split_logits(hidden, ret_rows), targets, ret_token_id, smoothing).sum()
        sizes = ret_token_id, ret_token_id, smoothing
        return ChunkedTokenLoss.apply(hidden, ret_rows, targets, self.split_logits, *sizes)

    def token_losses_without_gradient(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropies (T,) at hidden states (T, H) that are constants: only the `[RET]` columns have gradient."""
        log_normalizer, from_frozen = self.frozen_logit_statistics(hidden, targets)
        ret = self.transform(hidden @ self.adapter.ret_head_rows().to(hidden).t())
        return split_token_losses(log_normalizer, from_frozen, ret, targets, self.config.ret_token_id)

    @torch.no_grad()
    def frozen_logit_statistics(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the LM's own logits at (T, H), a chunk at a time: logsumexp (T,) and target logit (T,)."""
        first = self.config.ret_token_id
        size = max(1, LOGITS_AT_A_TIME // first)
        normalizers, from_frozen = [], []
        for chunk, chunk_targets in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self.transform(self.head(chunk)[..., :first])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            normalizers.append(logits.logsumexp(-1))
            from_frozen.append(target_logits(logits, chunk_targets))
        return torch.cat(normalizers), torch.cat(from_frozen)


def _check_lengths(
    switch: float, most: float, embeds: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None
) -> None:
    """Raise a `ValueError` where a pass has sequences of more than `most` tokens, the [`independent_length`]; or
    sequences, or what a cache holds of them, from both sides of the [`rope_switch`]: all get the frequencies of the
    longest."""
    if switch == most == math.inf:
        return
    cached = 0 if cache is None else int(cache.get_seq_length())
    if position_ids is None:
        position_ids = torch.arange(cached, cached + embeds.shape[1])[None]
    lengths = position_ids.amax(-1) + 1
    longest, shortest = int(lengths.max()), min(int(lengths.min()), cached or math.inf)
    if longest > most:
        raise ValueError(
            f"The texts have up to {longest} tokens, images included. Beyond {most}, what the language model computes "
            "for a text depends on what stands beside it or follows. Shorten them."
        )
    if shortest <= switch < longest:
        raise ValueError(
            f"The language model has other rotary frequencies (longrope) in passes of more than {switch} tokens, which "
            f"would change what texts of up to {shortest} tokens get beside {longest}. Give it texts on one side of "
            "that length at a time, and from one to the other no cache."
        )


def _groups(lengths: torch.Tensor, takes_padding: bool, switch: float, in_one_pass: bool) -> list[torch.Tensor]:
    """Indices of sequences (B,) to run together, on one side of the [`rope_switch`] each; or all `in_one_pass`, where
    every process must make as many."""
    if in_one_pass:
        return [torch.arange(len(lengths), device=lengths.device)]
    groups = length_groups(lengths) if takes_padding else groups_of_one_length(lengths)
    if switch == math.inf:
        return groups
    sides = [rows[is_within] for rows in groups for is_within in (lengths[rows] <= switch, lengths[rows] > switch)]
    return [rows for rows in sides if len(rows)]


__all__ = ["FrozenLM"]
