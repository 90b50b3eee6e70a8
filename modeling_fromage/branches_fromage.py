"""The two branches of a training step (section 3.3), without the work that their losses do not depend on.

Axes: B rows of text, L tokens, T tokens without padding, N images, H the LM's head's width, q the shared space's.
"""

import logging
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from .backbone_probes_fromage import has_ability
from .backbones_fromage import attention_window, decoder_and_head, no_activation_checkpointing
from .losses_fromage import (
    LOGITS_AT_A_TIME,
    ChunkedTokenLoss,
    contrastive_loss,
    duplicate_mask,
    gather_with_gradient,
    mean_over_targets,
    split_token_losses,
    target_logits,
    token_losses,
)
from .packing_fromage import PackedRows, groups_of_one_length, length_groups, tokens_first

logger = logging.getLogger(__name__)
_ONE_TRIAL = threading.Lock()


class FromageBranchesMixin:
    """Losses of [`FromageForConditionalGeneration`]."""

    @property
    def _across_processes(self) -> bool:
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def _dispatch_hint(self) -> str:
        """What may have cut a batch's tensors apart, for errors about their lengths."""
        if not self._across_processes:
            return ""
        return (
            " Of a streamed data set, accelerate cuts batches between processes, and concatenated captions have fewer "
            'rows than images: set `accelerator_config={"dispatch_batches": False}` in TrainingArguments, or use '
            "FromageTrainer."
        )

    # ---- passes without padding ------------------------------------------------------------------------------------

    def _takes(self, ability: str) -> bool:
        """Whether the LM has one of `ABILITIES` with its present attention: tried once, and said once."""
        attention = self.language_model.config._attn_implementation
        if (attention, ability) not in self._abilities:
            self._try(attention, ability)
        return self._abilities[attention, ability]

    @torch.compiler.disable
    def _try(self, attention: str, ability: str):
        with _ONE_TRIAL:
            if (attention, ability) in self._abilities:
                return
            found = has_ability(self.language_model, ability)
            self._abilities[attention, ability] = found
        verb = "takes" if found else "does not take"
        logger.info("%s (%s) %s %s.", type(self.language_model).__name__, attention, verb, ability)

    def _packs_rows(self, mask: torch.Tensor) -> bool:
        """Whether the sequences of `mask` can be packed: the LM takes such rows, and none reaches beyond its attention
        window, which only the LM's own masks know of."""
        within_window = int(mask.sum(-1).max()) < attention_window(self.config.text_config)
        return within_window and self._takes("packed rows")

    def _hidden_at_tokens(
        self, embeds: torch.Tensor, mask: torch.Tensor, all_layers: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The LM's last hidden states (T, H) of `embeds` (B, L, D) at the tokens of `mask` (B, L), row by row, and
        those of `text_embed_layers`, (T, width) each, with `all_layers`."""
        options = {"output_hidden_states": True} if all_layers and self._needs_all_layers else {}
        if self._packs_rows(mask):
            packed = PackedRows(mask, attention_window(self.config.text_config))
            output = self._decode(
                packed.lay(embeds), packed.attention_mask(embeds.dtype), packed.position_ids, **options
            )
            layers = self._text_layers(output) if all_layers else []
            return packed.at_tokens(output.last_hidden_state), [packed.at_tokens(hidden) for hidden in layers]
        order = tokens_first(mask)
        embeds, mask = embeds.take_along_dim(order[..., None], dim=1), mask.gather(1, order)
        place = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        places, found = [], []
        lengths = mask.sum(-1)
        for rows in length_groups(lengths) if self._takes("right padding") else groups_of_one_length(lengths):
            columns = mask[rows].any(0)  # without the padding that no row of the group needs
            own = mask[rows][:, columns].bool()
            output = self._decode(embeds[rows][:, columns], own.long(), **options)
            layers = self._text_layers(output) if all_layers else []
            places.append(place[rows][:, columns][own])
            found.append([hidden[own] for hidden in (output.last_hidden_state, *layers)])
        order = torch.cat(places).argsort()
        last, *layers = (torch.cat(hidden)[order] for hidden in zip(*found, strict=True))
        return last, layers

    def _in_chunks(self, branch: Callable, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """`branch` of pieces of `tensors` (B, ...), each recomputed in the backward pass: gradient caching
        (Gao et al. 2021), which gives a contrastive batch the memory of one piece."""
        size = self.config.gradient_cache_chunk_size
        if not size or len(tensors[0]) <= size or not torch.is_grad_enabled():
            return [branch(*tensors)]
        pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
        return [checkpoint(branch, *piece, use_reentrant=False) for piece in pieces]

    # ---- captioning ------------------------------------------------------------------------------------------------

    def _captioning_loss(self, embeds, attention_mask, targets) -> torch.Tensor:
        """Next-token loss given `embeds` (B, L, D), each of which has its target (B, L) or -100."""
        mask = torch.ones_like(targets) if attention_mask is None else attention_mask
        is_target = (targets != -100) & mask.bool()  # (B, L): predicts a target
        # Nothing looks at what follows a row's last prediction: its last token, with the authors' captions.
        is_needed = is_target.flip(1).cumsum(1).flip(1).bool()
        mask = mask.bool() & is_needed if bool(is_needed.any()) else mask

        def branch(embeds, mask, is_target, targets):
            hidden, _ = self._hidden_at_tokens(embeds, mask)
            return (self._token_loss(hidden[is_target[mask.bool()]], targets[is_target]),)

        chunks = self._in_chunks(branch, embeds, mask, is_target, targets)
        return mean_over_targets(sum(loss for (loss,) in chunks), is_target.sum(), self._across_processes)

    def _token_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies of hidden states (M, H), with the whole vocabulary's gradient held in chunks."""
        if not torch.is_grad_enabled():
            return self._constant_token_losses(hidden, targets).sum()
        rows = self.adapter.ret_head_rows().to(hidden)
        _, head = decoder_and_head(self.language_model)
        ret_token_id = self.config.ret_token_id
        if any(parameter.requires_grad for parameter in head.parameters()):
            return token_losses(*self._split_logits(hidden, rows), targets, ret_token_id).sum()
        return ChunkedTokenLoss.apply(hidden, rows, targets, self._split_logits, ret_token_id, ret_token_id)

    # ---- retrieval -------------------------------------------------------------------------------------------------

    def _retrieval(self, input_ids, attention_mask, pooled) -> dict[str, torch.Tensor]:
        """The retrieval losses and embeddings: of the text alone, without its image, up to `[RET]`."""
        if pooled is None or len(pooled) != len(input_ids):
            raise ValueError(
                f"Retrieval text i pairs with image i, but there are {len(input_ids)} texts and "
                f"{0 if pooled is None else len(pooled)} images.{self._dispatch_hint}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        branch = self._ret_only_branch if self._only_ret_needs_gradient(input_ids, mask) else self._text_branch
        losses, embeds = zip(*self._in_chunks(branch, input_ids, mask), strict=True)
        text_embeds, image_embeds = torch.cat(embeds), self.get_image_embeds(pooled_image_features=pooled)
        images, texts = image_embeds, text_embeds
        if self._across_processes:
            images, texts, pooled = (gather_with_gradient(tensor) for tensor in (images, texts, pooled))
        logits_per_image = self.adapter.logit_scale.exp() * images @ texts.t()
        duplicates = duplicate_mask(pooled) if self.config.mask_duplicate_images else None
        count = has_previous_token(mask).sum()
        return {
            "ret_token_loss": mean_over_targets(sum(losses), count, self._across_processes),
            "contrastive_loss": contrastive_loss(logits_per_image, duplicates),
            "image_embeds": image_embeds,
            "text_embeds": text_embeds,
            "logits_per_image": logits_per_image,
            "logits_per_text": logits_per_image.t(),
        }

    def _text_branch(self, input_ids, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the next-token losses, and `[RET]` embeddings (B, q), by one ordinary pass."""
        rows, columns = self._last_rets(input_ids)
        hidden, layers = self._hidden_at_tokens(self._embed(input_ids, None), mask, all_layers=True)
        is_token, has_previous = mask.bool(), has_previous_token(mask)
        predicts = torch.nn.functional.pad(has_previous, (0, 1))[is_token]
        loss = self._token_loss(hidden[predicts], input_ids[:, 1:][has_previous])
        number = (is_token.flatten().cumsum(0) - 1).view_as(is_token)[rows, columns]  # of each `[RET]` among the tokens
        return loss, self._project_text([layer[number] for layer in layers])

    def _ret_only_branch(self, input_ids, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """What [`_text_branch`] returns, at a fraction of its cost and with the same gradient.

        Nothing before `[RET]` depends on a trained parameter: those tokens run without gradient into a KV cache, and
        `[RET]` alone runs with gradient against it. Of the logits only the `[RET]` columns have a gradient.
        """
        prefix_mask = mask.masked_fill(self._is_ret(input_ids), 0)
        targets = input_ids[:, 1:][has_previous_token(mask)]
        ret_ids = input_ids[self._last_rets(input_ids)]
        with no_activation_checkpointing(self.language_model):
            if self._packs_rows(prefix_mask):
                hidden, layers = self._packed_prefix_and_ret(input_ids, prefix_mask, ret_ids)
            else:
                hidden, layers = self._padded_prefix_and_ret(input_ids, prefix_mask, ret_ids)
        return self._constant_token_losses(hidden, targets).sum(), self._project_text(layers)

    def _packed_prefix_and_ret(self, input_ids, prefix_mask, ret_ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states of the prefixes' tokens (T, H), constant, and of each row's `[RET]`, (B, width) a layer."""
        packed = PackedRows(prefix_mask, attention_window(self.config.text_config))
        with torch.no_grad():
            embeds = self._embed(packed.lay(input_ids), None)
            prefix = self._decode(embeds, packed.attention_mask(embeds.dtype), packed.position_ids, use_cache=True)
        last = self._decode(
            self._embed(packed.lay_queries(ret_ids), None),
            packed.query_mask(embeds.dtype),
            packed.lay_queries(packed.lengths),
            past_key_values=prefix.past_key_values,
            use_cache=True,
            output_hidden_states=self._needs_all_layers,
        )
        layers = [hidden[packed.row, packed.lap] for hidden in self._text_layers(last)]
        return packed.at_tokens(prefix.last_hidden_state), layers

    def _padded_prefix_and_ret(self, input_ids, prefix_mask, ret_ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[`_packed_prefix_and_ret`] for an LM that takes no packed rows, in one batch padded on the right."""
        order = tokens_first(prefix_mask)
        input_ids, prefix_mask = input_ids.gather(1, order), prefix_mask.gather(1, order)
        with torch.no_grad():
            embeds = self._embed(input_ids.masked_fill(prefix_mask == 0, 0), None)
            prefix = self._decode(embeds, prefix_mask, use_cache=True)
        last = self._decode(
            self._embed(ret_ids[:, None], None),
            torch.cat([prefix_mask, prefix_mask.new_ones(len(ret_ids), 1)], dim=1),
            position_ids=prefix_mask.long().sum(-1, keepdim=True),
            past_key_values=prefix.past_key_values,
            use_cache=True,
            output_hidden_states=self._needs_all_layers,
        )
        return prefix.last_hidden_state[prefix_mask.bool()], [hidden[:, 0] for hidden in self._text_layers(last)]

    def _constant_token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropies (T,) of hidden states (T, H) without gradient: only the `[RET]` columns have one."""
        log_normalizer, from_frozen = self._frozen_logit_statistics(hidden, targets)
        ret = self.logit_transform(hidden @ self.adapter.ret_head_rows().to(hidden).t())
        return split_token_losses(log_normalizer, from_frozen, ret, targets, self.config.ret_token_id)

    @torch.no_grad()
    def _frozen_logit_statistics(
        self, hidden: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the LM's own logits of `hidden` (T, H), a chunk at a time: logsumexp (T,) and target logit (T,)."""
        _, head = decoder_and_head(self.language_model)
        first = self.config.ret_token_id
        size = max(1, LOGITS_AT_A_TIME // first)
        normalizers, from_frozen = [], []
        for chunk, chunk_targets in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self.logit_transform(head(chunk)[..., :first])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            normalizers.append(logits.logsumexp(-1))
            from_frozen.append(target_logits(logits, chunk_targets))
        return torch.cat(normalizers), torch.cat(from_frozen)

    def _only_ret_needs_gradient(self, input_ids, mask) -> bool:
        """Whether [`_ret_only_branch`] is exact: a frozen LM that sees the whole text, and one `[RET]`, at its end."""
        if not torch.is_grad_enabled() or any(p.requires_grad for p in self.language_model.parameters()):
            return self._ordinary_pass("the language model is being trained, or no gradient is asked for")
        if self.language_model.training:
            return self._ordinary_pass("the language model is in training mode")
        if input_ids.shape[1] > attention_window(self.config.text_config):
            return self._ordinary_pass("texts are longer than the language model's attention window")
        is_ret = self._is_ret(input_ids)
        after_ret = is_ret.int().cumsum(-1).bool() & mask.bool()
        if not ((is_ret.sum(-1) == 1).all() and (after_ret == is_ret).all() and (mask.sum(-1) > 1).all()):
            return self._ordinary_pass("a text has [RET] elsewhere than once, at its end, or nothing before it")
        if not (self._takes("packed rows") or self._takes("cached prefixes")):
            return self._ordinary_pass("the language model does not continue cached prefixes of different lengths")
        return True

    def _ordinary_pass(self, reason: str) -> bool:
        if torch.is_grad_enabled() and reason not in self._reasons:
            self._reasons.add(reason)
            logger.info("The retrieval branch takes the ordinary pass: %s.", reason)
        return False

    # ---- the sum ---------------------------------------------------------------------------------------------------

    def _weighted_loss(self, parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
        weights = {
            "captioning_loss": self.config.captioning_loss_weight,
            "ret_token_loss": self.config.ret_token_loss_weight,
            "contrastive_loss": self.config.contrastive_loss_weight,
        }
        losses = [weight * parts[name] for name, weight in weights.items() if name in parts]
        return sum(losses[1:], losses[0]) if losses else None


def has_previous_token(mask: torch.Tensor) -> torch.BoolTensor:
    """(B, L) -> (B, L - 1), True where a token follows a token: every one of a text but its first."""
    is_token = mask.bool()
    return is_token[:, 1:] & is_token[:, :-1]
