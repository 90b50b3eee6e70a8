"""What FROMAGe makes sure of before it relies on a language model, and the results, each found out once."""

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .backbone_probes_fromage import TOLERANCE, has_ability, why_no_shortcut
from .backbones_fromage import decoder_and_head, refuse_offloaded_ends, undisturbed, weight_of
from .miniature_fromage import FAILURES, miniature

logger = logging.getLogger(__name__)


# ---- what an LM does before its decoder and after its head --------------------------------------------------------


class _HiddenStates(BaseModelOutputWithPast):
    """A decoder's output of which only `last_hidden_state` is there."""

    def __getattr__(self, name: str) -> None:
        return None


_ONE_STUB = threading.Lock()


@contextmanager
def _decoder_that_gives(language_model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Let the LM's decoder give `hidden` (1, L, H) at once, without running a layer: to this thread alone."""
    decoder, _ = decoder_and_head(language_model)
    thread = threading.get_ident()
    with _ONE_STUB:
        own, forward = decoder.__dict__.get("forward"), decoder.forward

        def stub(*args: Any, **kwargs: Any) -> Any:
            here = threading.get_ident() == thread
            return _HiddenStates(last_hidden_state=hidden) if here else forward(*args, **kwargs)

        decoder.forward = stub
        try:
            yield
        finally:
            if own is None:
                del decoder.forward
            else:
                decoder.forward = own


@undisturbed
@torch.no_grad()
def measure_logit_transform(language_model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise function that the LM applies after its head: a scale, a soft cap, or both.

    Read off the LM's own logits of hidden states for which the head gives values up to 300, where no cap is missed.

    Raises:
        ValueError: What the LM makes of them is another function of the head's output, or the head is offloaded.
    """
    refuse_offloaded_ends(language_model)
    _, head = decoder_and_head(language_model)
    generator = torch.Generator().manual_seed(0)
    weight = weight_of(head)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    hidden = torch.randn(1, 2, weight.shape[-1], generator=generator).to(weight.device, dtype)
    ids = torch.tensor([[0, 1]], device=hidden.device)

    try:
        largest_now = head(hidden).float().abs().max()
    except (AssertionError, *FAILURES) as error:
        raise ValueError(
            f"The output embedding of {type(language_model).__name__} ({type(head).__name__}, weight "
            f"{tuple(weight.shape)} of {weight.dtype}) does not run. Leave input and output embeddings out of the "
            f"quantisation (llm_int8_skip_modules=['lm_head'] in bitsandbytes, as by default). It says: {error}"
        ) from error

    def before_and_after(largest: float) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = hidden * (largest / largest_now)
        seen = []
        hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        try:
            with _decoder_that_gives(language_model, scaled):
                after = language_model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        is_own = len(seen) == 1 and torch.equal(seen[0][0].to(scaled), scaled)  # a pass over the vocabulary saved
        return (seen[0][1] if is_own else head(scaled)).double(), after.double()

    name, tolerance = type(language_model).__name__, 2e-2 if hidden.dtype.itemsize < 4 else 1e-4
    transform = None
    try:
        small, large = before_and_after(0.01), before_and_after(300.0)
        if all(before.shape == after.shape for before, after in (small, large)):
            transform = _fit_transform(small, large, language_model.config, tolerance)
    except (IndexError, RuntimeError) as error:  # a head of other widths
        logger.info("The logits of %s cannot be measured: %s", name, error)
    if transform is None:
        raise ValueError(
            f"{name} makes its logits in a way that FROMAGe does not know: they are neither what its output embedding "
            "gives for its last hidden states, nor that scaled or soft-capped. Take another language model, or open an "
            "issue that names this one."
        )
    return transform


def _fit_transform(
    small: tuple[torch.Tensor, torch.Tensor],
    large: tuple[torch.Tensor, torch.Tensor],
    config: PreTrainedConfig,
    tolerance: float,
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The scale and cap that lead from the logits before to those after, in both pairs; `None` where none does."""
    exact = [float(value) for value in config.to_dict().values() if type(value) in (int, float) and value > 0]
    exact = [1.0, *exact, *(1 / value for value in exact)]

    def settle(value: float) -> float:
        """The value of the configuration, or its inverse, that was meant by a measured one."""
        best = min(exact, key=lambda known: abs(known / value - 1))
        return best if abs(best / value - 1) < tolerance else value

    def explains(scale: float, cap: float | None) -> bool:
        pairs = ((_transform(scale, cap)(before), after) for before, after in (small, large))
        return all((found - after).abs().max() <= tolerance * after.abs().max() for found, after in pairs)

    for scale in {_slope(*small), _slope(*large)}:
        if scale > 0 and explains(settle(scale), None):
            return _transform(settle(scale), None)
    before, after = (values.flatten()[large[0].abs().argmax()].abs().item() for values in large)
    slope = _slope(*small)
    for scale in (settle(slope), slope) if slope > 0 else ():
        low, high = after, 1e6  # cap * tanh(scale * before / cap) grows with the cap
        for _ in range(100):
            cap = (low * high) ** 0.5
            low, high = (low, cap) if cap * math.tanh(scale * before / cap) > after else (cap, high)
        for cap in (settle(low), low):
            if explains(scale, cap):
                return _transform(scale, cap)
    return None


def _slope(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((before * after).sum() / (before * before).sum()).item()


def _transform(scale: float, cap: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return functools.partial(_scale_and_cap, scale=scale, cap=cap)  # which can be pickled


def _scale_and_cap(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    if scale != 1.0:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def measure_embedding_scale(language_model: PreTrainedModel) -> float:
    """What the LM's input embedding multiplies its rows by: the square root of the width in Gemma, else mostly 1.

    Raises:
        ValueError: It does something else to them.
    """
    embedding = language_model.get_input_embeddings()
    weight = weight_of(embedding)
    ids = torch.linspace(0, len(weight) - 1, 64, device=weight.device).long()
    rows, found = weight[ids], embedding(ids)
    if torch.equal(rows, found):
        return 1.0
    tolerance = 1e-2 if found.dtype.itemsize < 4 else 1e-5
    rows, found = rows.double(), found.double()
    scale = _slope(rows, found)
    if not (found - scale * rows).norm() <= tolerance * found.norm():
        raise ValueError(
            f"The input embedding of {type(language_model).__name__} does more than look rows up and scale them, so "
            "`[RET]` has no row to enter by. Take another language model, or open an issue that names this one."
        )
    return scale


@undisturbed
def check_gradient_passes(language_model: PreTrainedModel) -> None:
    """Raise a `ValueError` where a linear layer of the LM gives its input no gradient, or a wrong one.

    torchao's dynamically quantised activations are rounded, and rounding has none.
    """
    generator = torch.Generator().manual_seed(0)
    for linear in filter(_is_linear, language_model.modules()):
        weight: Any = linear.weight
        kind, tensor = type(linear), type(weight.data)
        if kind is nn.Linear and tensor is torch.Tensor:
            continue
        dtype = weight.dtype if weight.dtype.is_floating_point else language_model.dtype
        values = torch.randn(3, 1, vars(linear)["in_features"], generator=generator).to(weight.device, dtype)
        with torch.enable_grad():
            inputs = values[0].clone().requires_grad_()
            output = linear(inputs)
            if not isinstance(output, torch.Tensor):
                continue  # a router
            ahead, behind = (linear(values[0] + step).detach() for step in (values[1], -values[1]))
            direction = (ahead - behind) / 2
            if not (ahead + behind - 2 * output.detach()).norm() <= 0.2 * direction.norm():
                continue  # not linear, so the step tells nothing: a router again
            gradient = torch.zeros_like(inputs)
            if output.requires_grad:
                gradient = torch.autograd.grad((output * direction).sum(), inputs, allow_unused=True)[0]
        expected = (direction.float() ** 2).sum().item()
        found = 0.0 if gradient is None else (gradient.float() * values[1].float()).sum().item()
        if not abs(found - expected) <= 0.2 * expected:
            raise ValueError(
                f"{kind.__name__} layers of {type(language_model).__name__} (weights: {tensor.__name__}) lose the "
                f"gradient: {found:.3g} where their output changes by {expected:.3g}. Quantisation of activations is "
                "for inference; to train, quantise weights alone (torchao's Int8WeightOnlyConfig, bitsandbytes) or not."
            )


def _is_linear(module: nn.Module) -> bool:
    return "in_features" in vars(module) and isinstance(module._parameters.get("weight"), torch.Tensor)


# ---- what a decoder takes -------------------------------------------------------------------------------------------


@undisturbed
@torch.no_grad()
def check_decoder(language_model: PreTrainedModel) -> float:
    """Raise a `ValueError` where FROMAGe cannot give the LM what it takes.

    Visual tokens and `[RET]` come as embeddings: the LM must not make more of token ids (Gemma 3n has inputs for each
    layer), nor need them. It must be causal, which XLNet and a BERT that is no decoder are not, and pass a gradient.

    Returns:
        What it multiplies the embeddings of token ids by, and those that are given to it not: 1 but for Falcon-H1.
    """
    decoder, tolerance = miniature(language_model), TOLERANCE
    if decoder is None:
        decoder, _ = decoder_and_head(language_model)
        tolerance = 2e-2 if language_model.dtype.itemsize < 4 else 1e-4
    name, embedding = type(language_model).__name__, decoder.get_input_embeddings()
    weight = weight_of(embedding)
    ids = torch.arange(3, device=weight.device)[None] + len(weight) // 2  # padding has other ids
    expected = decoder(input_ids=ids[:, :2], use_cache=False)[0].float()
    embeds = embedding(ids)

    def difference(embeds: torch.Tensor) -> float:
        found = decoder(inputs_embeds=embeds.clone(), use_cache=False)[0][:, : expected.shape[1]].float()
        return ((found - expected).norm() / expected.norm()).item()

    try:
        scales = [1.0, *_numbers_in_both(decoder.config, language_model.config)]
        differences = [difference(embeds[:, :2])]
        if not differences[0] <= tolerance:
            differences += [difference(scale * embeds[:, :2]) for scale in scales[1:]]
        scale = scales[min(range(len(differences)), key=differences.__getitem__)]
        longer = difference(scale * embeds)
        decoder(inputs_embeds=-embeds, use_cache=False)  # of no token: Gemma 4 looks up whose embeddings they are
        with torch.enable_grad():
            inputs = embeds.detach().clone().requires_grad_()
            output = decoder(inputs_embeds=1 * inputs, use_cache=False)[0]
            torch.autograd.grad(output.float().square().sum(), inputs)
    except FAILURES as error:
        raise ValueError(
            f"{name} does not run from embeddings without token ids, with a gradient for them, and FROMAGe gives it "
            f"embeddings. Take another LM. It says: {error}"
        ) from error
    if not min(differences) <= tolerance:
        raise ValueError(
            f"{name} takes more from token ids than their input embeddings: its hidden states are off by "
            f"{differences[0]:.2g} without the ids, and FROMAGe gives it embeddings. Take another LM."
        )
    if not longer <= max(5 * tolerance, 1e-2):
        raise ValueError(
            f"{name} is not causal: its hidden states change by {longer:.2g} with what follows. Take another LM, or "
            "load one that can be a decoder with `is_decoder=True` (`text_is_decoder=True` in "
            "from_vision_text_pretrained)."
        )
    return scale


def _numbers_in_both(small: PreTrainedConfig, config: PreTrainedConfig) -> list[float]:
    """The floating-point numbers that a miniature's configuration shares with the LM's."""
    numbers, own = small.to_dict(), config.get_text_config(decoder=True).to_dict()
    return sorted(
        {value for key, value in numbers.items() if type(value) is float and value > 0 and own.get(key) == value}
    )


# ---- what has been found out ----------------------------------------------------------------------------------------


_ONE_TRIAL = threading.Lock()


class LanguageModelTraits:
    """What trials have shown of one model's language model. Each trial runs once, when its result is first needed."""

    def __init__(self) -> None:
        self.abilities: dict[tuple[str, str], bool] = {}  # by attention implementation and ability
        self.logit_transform: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.shortcut_problems: dict[str, str] = {}  # by attention implementation
        self.mean_row_norm: float | None = None  # of the input embeddings before `[RET]`
        self.passes_gradient = False  # shown; a linear layer that loses it raises
        self.logged_fallbacks: set[str] = set()
        self.is_sharded = False  # over processes, which must make the same passes then
        self.gathered_state: dict[str, torch.Tensor] | None = None  # of a sharded model that is being saved

    def takes(self, language_model: PreTrainedModel, ability: str) -> bool:
        """Whether the LM has one of `ABILITIES` with its present attention implementation."""
        attention = language_model.config._attn_implementation
        if (attention, ability) not in self.abilities:
            self._try(language_model, attention, ability)
        return self.abilities[attention, ability]

    @torch.compiler.disable
    def _try(self, language_model: PreTrainedModel, attention: str, ability: str) -> None:
        with _ONE_TRIAL:
            if (attention, ability) in self.abilities:
                return
            found = has_ability(language_model, ability)
            self.abilities[attention, ability] = found
        verb = "takes" if found else "does not take"
        logger.info("%s (%s) %s %s.", type(language_model).__name__, attention, verb, ability)

    def why_no_shortcut(self, language_model: PreTrainedModel) -> str | None:
        """What keeps the LM from the shortcuts of training; `None` where it takes one of them."""
        if self.takes(language_model, "packed rows") or self.takes(language_model, "cached prefixes"):
            return None
        attention = language_model.config._attn_implementation
        if attention not in self.shortcut_problems:
            self.shortcut_problems[attention] = why_no_shortcut(language_model)
        return self.shortcut_problems[attention]

    def measure_logit_transform(self, language_model: PreTrainedModel) -> None:
        """Measure anew what the LM does to its head's output, unless its weights are not there yet."""
        self.logit_transform = None
        if weight_of(decoder_and_head(language_model)[1]).device.type != "meta":
            self.logit_transform_of(language_model)

    def logit_transform_of(self, language_model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the LM does to its head's output, elementwise."""
        if self.logit_transform is None:
            self.logit_transform = measure_logit_transform(language_model)
        return self.logit_transform

    def require_gradient(self, language_model: PreTrainedModel) -> None:
        """Raise a `ValueError` where a linear layer of the LM loses the gradient that the trained parts need."""
        if not self.passes_gradient:
            check_gradient_passes(language_model)
            self.passes_gradient = True

    def log_fallback(self, reason: str) -> None:
        """Log once why the retrieval losses take an ordinary pass."""
        if torch.is_grad_enabled() and reason not in self.logged_fallbacks:
            self.logged_fallbacks.add(reason)
            logger.info("The retrieval losses take an ordinary pass: %s.", reason)
