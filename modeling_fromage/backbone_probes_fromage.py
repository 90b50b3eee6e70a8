"""What a language model computes rightly when several sequences run together, found out by trying.

A sequence by itself, without padding or cache, is the truth. A miniature of the LM (its class and configuration, two
layers, fp32) has weights large enough for a wrong mask, position or state to show, whatever the LM's own weights and
dtype. What its own weights, dtype and attention kernels make of it is then tried on the LM itself.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .backbones_fromage import decoder_and_head, in_eval_mode, initial_cache, run_decoder, undisturbed, weight_of
from .miniature_fromage import FAILURES, miniature
from .packing_fromage import PackedRows, PrefixTree, positions

logger = logging.getLogger(__name__)

LENGTHS = (6, 2, 4)  # of the sequences, which two more tokens follow
# Of the norm, in fp32. What is wrong is off by more than 1e-2. A mixture of experts moves by 7e-7, as it runs batches
# of other sizes; the steps of a state-space model are off by 1e-4 from its scan, in the LM's own `generate` as well.
TOLERANCE, _TOLERANCE_OF_STEPS = 1e-5, 1e-3


class Trial:
    """Short sequences of different lengths, to run together in some way and compare with each by itself.

    Args:
        decoder (`nn.Module`): The LM without its head.
        embeds (`torch.Tensor`): (3, 8, D), its inputs.
        tolerance (`float`): Largest difference, in norms of the expected hidden states.
        strict (`bool`): Whether to look for leaks and at gradients too.
    """

    def __init__(self, decoder: PreTrainedModel, embeds: torch.Tensor, tolerance: float, strict: bool):
        self.decoder, self.embeds, self.tolerance, self.strict = decoder, embeds, tolerance, strict
        self.lengths = torch.tensor(LENGTHS, device=embeds.device)
        self.columns = torch.arange(max(LENGTHS), device=embeds.device)
        self.truth = [
            decoder(inputs_embeds=row[None, : n + 2].clone(), use_cache=False)[0][0]  # CTRL scales them in place
            for row, n in zip(embeds, LENGTHS, strict=True)
        ]

    def agree(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        found, expected = found.float(), expected.float()
        return bool((found - expected).norm() <= self.tolerance * expected.norm())  # False for NaN

    def disturbed(self) -> Iterator[tuple[torch.Tensor, int | None]]:
        """The inputs, and the inputs with one sequence replaced by a loud other, with its number."""
        yield self.embeds, None
        for i in range(len(LENGTHS) if self.strict else 0):
            embeds = self.embeds.clone()
            embeds[i] *= -10
            yield embeds, i

    def run(
        self,
        embeds: torch.Tensor,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
    ) -> Any:
        return run_decoder(self.decoder, embeds.clone(), mask, position_ids, cache, use_cache=use_cache)

    def same_gradient(self, run: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether `run` of each sequence's next token (3, D) -> (3, H) has the gradient of whole passes."""
        if not self.strict:
            return True
        tokens = self.embeds[torch.arange(len(LENGTHS)), self.lengths]
        with torch.enable_grad():
            ours, theirs = (tokens.clone().requires_grad_() for _ in range(2))
            whole = [
                self.run(torch.cat([row[:n], token[None]])[None], use_cache=False)[0][0, -1]
                for row, n, token in zip(self.embeds, LENGTHS, theirs, strict=True)
            ]
            direction = torch.stack(whole).detach().roll(1, dims=-1)
            found, expected = (
                torch.autograd.grad((hidden * direction).sum(), inputs)[0]
                for hidden, inputs in ((run(ours), ours), (torch.stack(whole), theirs))
            )
        return self.agree(found, expected)

    # ---- ways of running sequences together ------------------------------------------------------------------------

    def takes_packed_rows(self) -> bool:
        """Several sequences in a row under a block-diagonal mask, and one more token of each behind a cached row."""
        packed = PackedRows(self.columns < self.lengths[:, None])
        width = len(self.columns)

        def prefix_of(embeds: torch.Tensor) -> Any:
            return self.run(packed.lay(embeds[:, :width]), packed.attention_mask(embeds.dtype), packed.position_ids)

        def queries(cache: Cache, tokens: torch.Tensor) -> torch.Tensor:
            rows = tokens.new_zeros(packed.rows, packed.slots, tokens.shape[-1])
            hidden = self.run(
                rows.index_put((packed.row, packed.slot), tokens),
                packed.query_mask(tokens.dtype),
                packed.lay_queries(packed.lengths[:, None]),
                cache,
            )[0]
            return hidden[packed.row, packed.slot]

        for embeds, loud in self.disturbed():
            prefix = prefix_of(embeds)
            if not holds_attention_alone(prefix.past_key_values):
                return False
            found = packed.at_tokens(prefix[0]).split(LENGTHS)
            last = queries(prefix.past_key_values, embeds[torch.arange(len(LENGTHS)), self.lengths])
            for i, n in enumerate(LENGTHS):
                right = self.agree(found[i], self.truth[i][:n]) and self.agree(last[i], self.truth[i][n])
                if i != loud and not right:
                    return False
        cache = prefix_of(self.embeds).past_key_values
        return self.same_gradient(lambda tokens: queries(cache, tokens))

    def takes_shared_prefixes(self) -> bool:
        """Texts that begin alike in one row, with what they share there once."""
        own = torch.full((3, 6), -1, device=self.embeds.device)  # numbers of tokens
        for row, text in zip(own, ((0, 1, 2, 3, 4, 5), (0, 1, 6, 7), (0, 1, 2, 8, 9)), strict=True):
            row[: len(text)] = torch.tensor(text)
        tree = PrefixTree(own, own >= 0)
        for loud in (None, 0, 1, 2) if self.strict else (None,):
            vectors = self.embeds.flatten(0, 1).clone()
            if loud is not None:
                vectors[own[loud, 3:]] *= -10
            mask = tree.attention_mask(vectors.dtype)
            found = tree.at_tokens(self.run(vectors[tree.input_ids], mask, tree.position_ids, use_cache=False)[0])
            for i, hidden in enumerate(found.split((own >= 0).sum(-1).tolist())):
                whole = self.run(vectors[own[i, : len(hidden)]][None], use_cache=False)[0][0]
                if i != loud and not self.agree(hidden, whole):
                    return False
        return True

    def takes_cached_prefixes(self) -> bool:
        """A batch padded on the right in a cache, and one more token of each at a position of its own."""
        mask = self.columns < self.lengths[:, None]
        longer = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1).long()

        def query(cache: Cache, tokens: torch.Tensor) -> torch.Tensor:
            return self.run(tokens[:, None], longer, self.lengths[:, None], cache)[0][:, 0]

        def prefix_of(fill: float) -> Cache:
            embeds = torch.where(mask[..., None], self.embeds[:, : mask.shape[1]], fill * self.embeds[:, :1])
            return self.run(embeds, mask.long(), positions(mask)).past_key_values

        for fill in (0, -10):
            cache = prefix_of(fill)
            if not holds_attention_alone(cache):
                return False
            found = query(cache, self.embeds[torch.arange(len(LENGTHS)), self.lengths])
            if not all(self.agree(found[i], self.truth[i][n]) for i, n in enumerate(LENGTHS)):
                return False
        cache = prefix_of(0)
        return self.same_gradient(lambda tokens: query(cache, tokens))

    def _padded_on_the_left(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """Batches with quiet and with loud padding, their mask and positions, and the columns before the last two."""
        mask = (self.columns.flip(0) < self.lengths[:, None]).long()
        width = mask.shape[1]
        longer = nn.functional.pad(mask, (0, 2), value=1)
        for fill in (0, -10):
            rows = [
                torch.cat([fill * row[:1].expand(width - n, -1), row[: n + 2]])
                for row, n in zip(self.embeds, LENGTHS, strict=True)
            ]
            yield torch.stack(rows), longer, positions(longer), width

    def _agree_behind_padding(self, found: torch.Tensor) -> bool:
        width = found.shape[1] - 2
        return all(self.agree(found[i, width - n :], self.truth[i]) for i, n in enumerate(LENGTHS))

    def takes_left_padding(self) -> bool:
        """A batch padded on the left, whole, and in a cache with two more tokens one by one."""
        for embeds, mask, position, width in self._padded_on_the_left():
            cache, steps = initial_cache(self.decoder), []
            for start, end in ((0, width), (width, width + 1), (width + 1, width + 2)):
                here = slice(start, end)
                output = self.run(embeds[:, here], mask[:, :end], position[:, here], cache)
                cache = output.past_key_values
                steps.append(output[0])
            whole = self.run(embeds, mask, position, use_cache=False)[0]
            if not (self._agree_behind_padding(whole) and self._agree_behind_padding(torch.cat(steps, dim=1))):
                return False
        return True

    def takes_several_tokens_at_once(self) -> bool:
        """A batch padded on the left in a cache, and two more tokens behind it in one pass."""
        for embeds, mask, position, width in self._padded_on_the_left():
            first, last = slice(width), slice(width, None)
            prefix = self.run(embeds[:, first], mask[:, first], position[:, first], initial_cache(self.decoder))
            rest = self.run(embeds[:, last], mask, position[:, last], prefix.past_key_values)
            if not self._agree_behind_padding(torch.cat([prefix[0], rest[0]], dim=1)):
                return False
        return True

    def takes_right_padding(self) -> bool:
        """A batch padded on the right."""
        mask = self.columns < self.lengths[:, None]
        for fill in (0, -10):
            embeds = torch.where(mask[..., None], self.embeds[:, : mask.shape[1]], fill * self.embeds[:, :1])
            found = self.run(embeds, mask.long(), positions(mask), use_cache=False)[0]
            if not all(self.agree(found[i, :n], self.truth[i][:n]) for i, n in enumerate(LENGTHS)):
                return False
        return True

    def continues_from_a_cache(self) -> bool:
        """One sequence, whose last two tokens run one by one behind a cache of the others."""
        row, n = self.embeds[:1], LENGTHS[0]
        mask = torch.ones(1, n + 2, dtype=torch.long, device=row.device)
        cache, steps = initial_cache(self.decoder), []
        for start, end in ((0, n), (n, n + 1), (n + 1, n + 2)):
            output = self.run(row[:, start:end], mask[:, :end], positions(mask)[:, start:end], cache)
            cache = output.past_key_values
            steps.append(output[0][0])
        return self.agree(torch.cat(steps), self.truth[0])


# What the LM is said to take in the log: how it is tried, and whether it must be shown on a miniature.
ABILITIES = {
    "packed rows": Trial.takes_packed_rows,
    "shared prefixes": Trial.takes_shared_prefixes,
    "cached prefixes": Trial.takes_cached_prefixes,
    "left padding": Trial.takes_left_padding,
    "several tokens behind a cache": Trial.takes_several_tokens_at_once,
    "right padding": Trial.takes_right_padding,
    "a cache": Trial.continues_from_a_cache,
}
TRAINING = ("packed rows", "shared prefixes", "cached prefixes")  # shortcuts of training: in doubt, the ordinary pass
GENERATION = ("left padding", "several tokens behind a cache", "a cache")


def holds_attention_alone(cache: Cache | None) -> bool:
    """Whether a cache is keys and values of attention and nothing else: a state mixes what stands in a row."""
    return type(cache) is DynamicCache and not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers
    )


@undisturbed
@torch.no_grad()
def has_ability(language_model: PreTrainedModel, ability: str) -> bool:
    """Try one of `ABILITIES` on a miniature of the LM and, for the shortcuts of training, on the LM itself."""
    decoder, _ = decoder_and_head(language_model)
    embedding = language_model.get_input_embeddings()
    if weight_of(embedding).device.type == "meta":  # offloaded: not to be trained
        return ability not in TRAINING
    needs_mask = ability in ("packed rows", "shared prefixes")
    if needs_mask and language_model.config._attn_implementation not in ("sdpa", "eager"):
        return False  # other kernels take none
    if ability in TRAINING and not holds_attention_alone(_cache_of(language_model.config)):
        return False
    found = _shown_by_a_miniature(language_model, ability)
    if found is None:
        found = ability not in TRAINING
    elif ability not in TRAINING:
        return found
    if not found:
        return False
    weight = weight_of(embedding)
    ids = torch.arange(24, device=weight.device).view(3, 8) * 7 % len(weight)
    try:
        embeds = embedding(ids)
        tolerance = 2e-2 if embeds.dtype.itemsize < 4 else 1e-4
        with in_eval_mode(language_model):
            return ABILITIES[ability](Trial(decoder, embeds, tolerance, strict=False))
    except FAILURES:
        return False


def _cache_of(config: PreTrainedConfig) -> Cache | None:
    try:
        return DynamicCache(config=config)
    except FAILURES:  # a kind of layer that transformers' caches do not know
        return None


@undisturbed
@torch.no_grad()
def why_no_shortcut(language_model: PreTrainedModel) -> str:
    """Why an LM takes neither packed rows nor cached prefixes, in words."""
    if not holds_attention_alone(_cache_of(language_model.config)):
        return "the language model's layers keep states, which mix what stands in a row"
    decoder = miniature(language_model)
    if decoder is None:
        return "no small copy of the language model can be made to try packed rows on"
    width = weight_of(decoder.get_input_embeddings()).shape[-1]
    embeds = torch.randn(1, max(LENGTHS), width, generator=torch.Generator().manual_seed(1))
    places = torch.arange(max(LENGTHS))[None]
    try:
        output = run_decoder(decoder, embeds.clone(), None, places, use_cache=True)
        if not holds_attention_alone(output.get("past_key_values")):
            return "the language model returns no cache of keys and values"
        if torch.equal(output[0], run_decoder(decoder, embeds.clone(), None, places**2, use_cache=False)[0]):
            return "the language model takes no `position_ids`: it counts the places in a row itself"
    except FAILURES as error:
        return f"a pass with a cache fails in the language model ({type(error).__name__})"
    return "the language model computes other numbers from packed rows and cached prefixes than from whole texts"


def _shown_by_a_miniature(language_model: PreTrainedModel, ability: str) -> bool | None:
    """Whether a miniature of the LM has the ability; `None` where none can be made."""
    decoder = miniature(language_model)
    if decoder is None:
        logger.info("No miniature of %s can be made to try %s on.", type(language_model).__name__, ability)
        return None
    generator = torch.Generator().manual_seed(1)
    width = weight_of(decoder.get_input_embeddings()).shape[-1]
    embeds = torch.randn(len(LENGTHS), max(LENGTHS) + 2, width, generator=generator)
    tolerance = _TOLERANCE_OF_STEPS if ability in GENERATION else TOLERANCE
    # In fp64 where attention is so sharp that fp32's rounding is magnified; some kernels take no fp64.
    for dtype in (torch.float32, torch.float64):
        try:
            if ABILITIES[ability](Trial(nn.Module.to(decoder, dtype), embeds.to(dtype), tolerance, strict=True)):
                return True
        except FAILURES:
            continue
    return False
