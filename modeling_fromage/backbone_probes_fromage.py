"""What a language model computes rightly when several sequences run together, found out by trying.

A sequence by itself, without padding or cache, is the truth. A miniature of the LM (its class and configuration, two
layers, fp32) has weights large enough for a wrong mask, position or state to show, whatever the LM's own weights and
dtype. What its own weights, dtype and attention kernels make of it is then tried on the LM itself.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .backbones_fromage import decoder_and_head, in_eval_mode, undisturbed, weight_of
from .packing_fromage import PackedRows, positions

logger = logging.getLogger(__name__)

LENGTHS = (6, 2, 4)  # of the sequences, which two more tokens follow
# Of the norm, in fp32. What is wrong is off by more than 1e-2. A mixture of experts moves by 7e-7, as it runs batches
# of other sizes; the steps of a state-space model are off by 1e-4 from its scan, in the LM's own `generate` as well.
TOLERANCE, _TOLERANCE_OF_STEPS = 1e-5, 1e-3
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_VOCAB = 64
_LARGEST = 5e7  # parameters of a miniature: seconds on a CPU


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

    def empty_cache(self) -> Cache:
        """What transformers' `generate` starts from."""
        return DynamicCache(config=self.decoder.config.get_text_config(decoder=True))

    def run(
        self,
        embeds: torch.Tensor,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
    ) -> Any:
        # A cache is passed only where there is one: state-space models know no such argument.
        past = {} if cache is None else {"past_key_values": cache}
        return self.decoder(
            inputs_embeds=embeds.clone(), attention_mask=mask, position_ids=position_ids, use_cache=use_cache, **past
        )

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
                packed.lay_queries(packed.lengths),
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

    def takes_left_padding(self) -> bool:
        """A batch padded on the left, whole, and in a cache with two more tokens at once and one by one."""
        mask = (self.columns.flip(0) < self.lengths[:, None]).long()
        width = mask.shape[1]
        longer = nn.functional.pad(mask, (0, 2), value=1)
        later = positions(longer)
        for fill in (0, -10):
            embeds = torch.stack(
                [
                    torch.cat([fill * row[:1].expand(width - n, -1), row[: n + 2]])
                    for row, n in zip(self.embeds, LENGTHS, strict=True)
                ]
            )
            whole = self.run(embeds, longer, later, use_cache=False)[0]
            prefix = self.run(embeds[:, :width], mask, later[:, :width], self.empty_cache())
            at_once = self.run(embeds[:, width:], longer, later[:, width:], copy.deepcopy(prefix.past_key_values))[0]
            cache, steps = prefix.past_key_values, [prefix[0]]
            for end in (width + 1, width + 2):
                here = slice(end - 1, end)
                output = self.run(embeds[:, here], longer[:, :end], later[:, here], cache)
                cache = output.past_key_values
                steps.append(output[0])
            for found in (whole, torch.cat([prefix[0], at_once], dim=1), torch.cat(steps, dim=1)):
                if not all(self.agree(found[i, width - n :], self.truth[i]) for i, n in enumerate(LENGTHS)):
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
        cache, steps = self.empty_cache(), []
        for start, end in ((0, n), (n, n + 1), (n + 1, n + 2)):
            output = self.run(row[:, start:end], mask[:, :end], positions(mask)[:, start:end], cache)
            cache = output.past_key_values
            steps.append(output[0][0])
        return self.agree(torch.cat(steps), self.truth[0])


# What the LM is said to take in the log: how it is tried, and whether it must be shown on a miniature.
ABILITIES = {
    "packed rows": Trial.takes_packed_rows,
    "cached prefixes": Trial.takes_cached_prefixes,
    "left padding": Trial.takes_left_padding,
    "right padding": Trial.takes_right_padding,
    "a cache": Trial.continues_from_a_cache,
}
_TRAINING = ("packed rows", "cached prefixes")  # shortcuts of training: in doubt, the ordinary pass
_GENERATION = ("left padding", "a cache")


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
        return ability not in _TRAINING
    if ability == "packed rows" and language_model.config._attn_implementation not in ("sdpa", "eager"):
        return False  # other kernels take no masks
    if ability in _TRAINING and not holds_attention_alone(_cache_of(language_model.config)):
        return False
    found = _shown_by_a_miniature(language_model, ability)
    if found is None:
        found = ability not in _TRAINING
    elif ability not in _TRAINING:
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


def _shown_by_a_miniature(language_model: PreTrainedModel, ability: str) -> bool | None:
    """Whether a miniature of the LM has the ability; `None` where none can be made."""
    decoder = miniature(language_model)
    if decoder is None:
        logger.info("No miniature of %s can be made to try %s on.", type(language_model).__name__, ability)
        return None
    generator = torch.Generator().manual_seed(1)
    width = weight_of(decoder.get_input_embeddings()).shape[-1]
    embeds = torch.randn(len(LENGTHS), max(LENGTHS) + 2, width, generator=generator)
    tolerance = _TOLERANCE_OF_STEPS if ability in _GENERATION else TOLERANCE
    # In fp64 where attention is so sharp that fp32's rounding is magnified; some kernels take no fp64.
    for dtype in (torch.float32, torch.float64):
        try:
            if ABILITIES[ability](Trial(nn.Module.to(decoder, dtype), embeds.to(dtype), tolerance, strict=True)):
                return True
        except FAILURES:
            continue
    return False


# ---- the miniature -------------------------------------------------------------------------------------------------


def miniature(language_model: PreTrainedModel) -> PreTrainedModel | None:
    """A decoder of the LM's class and configuration, on the CPU in fp32, with few layers and large random weights.

    As small as the class allows: what does not fit together is left as large as it is. `None` where that fails too.
    """
    attention = language_model.config._attn_implementation
    attention = attention if attention in ("sdpa", "eager") else "sdpa"
    for heads, thin in ((2, True), (4, True), (2, False), (4, False), (None, True), (None, False)):
        try:
            config = _small_config(language_model.config, heads, thin)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in type(language_model)._from_config(config).parameters())
            if size > _LARGEST:
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                small = (
                    type(language_model)._from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
                )
                small.requires_grad_(False)
                decoder, _ = decoder_and_head(small)
                _enlarge(small)
                width = weight_of(small.get_input_embeddings()).shape[-1]
                decoder(inputs_embeds=torch.randn(1, 3, width, dtype=torch.float32), use_cache=False)
        except (AssertionError, ImportError, *FAILURES):
            continue
        return decoder
    return None


def _small_config(config: PreTrainedConfig, few: int | None, thin: bool) -> PreTrainedConfig:
    """A copy with a layer of each kind (two at least) and few tokens; `thin`: with small feed-forward parts and few
    experts; `few`: at least so many attention heads, and a width to match."""
    config = copy.deepcopy(config)
    fields = vars(config)
    depth = config.num_hidden_layers
    of_layers = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == depth}
    kinds = list(zip(*(value for value in of_layers.values() if isinstance(value[0], str)), strict=True))
    kept = sorted({*range(min(2, depth)), *(kinds.index(kind) for kind in kinds)})
    changes: dict[str, Any] = {key: [value[i] for i in kept] for key, value in of_layers.items()}
    changes |= {key: len(kept) for key in ("decoder_layers", "encoder_layers", "num_blocks") if key in fields}
    sizes = {key: value for key, value in fields.items() if type(value) is int}
    changes |= {key: 0 for key, value in sizes.items() if key.endswith("token_id") and value >= _VOCAB}
    changes |= {key: _VOCAB for key in sizes if key.startswith("vocab_size")}
    if thin:
        changes |= {
            key: 64 for key, value in sizes.items() if ("intermediate_size" in key or "ffn" in key) and value > 64
        }
        chosen = max((value for key, value in sizes.items() if "per_tok" in key or "top_k" in key), default=2)
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        changes |= {key: max(4, chosen) for key in experts if sizes.get(key, 0) > 4}
    if few:
        width = config.hidden_size
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        fewest = next((n for n in (*range(few, heads), 1) if heads % n == 0), heads) if heads else 1
        factor = heads // fewest if heads else max(1, width // 64)
        changes |= {key: value // factor for key, value in sizes.items() if value % width == 0 and key not in changes}
        # Heads of states as well, whose number goes with the width, too.
        changes |= {
            key: max(1, value // factor)
            for key, value in sizes.items()
            if any(word in key for word in ("heads", "n_head", "groups"))
        }
    for key, value in changes.items():
        setattr(config, key, value)
    config.num_hidden_layers = len(kept)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        fields.pop(name, None)
    return config


def _enlarge(model: nn.Module) -> None:
    """Weights that keep the size of what they multiply, as after training, so that no part of the model is silent."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        elif parameter.dim() == 1:  # scales and biases, among them such as start from zero
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
