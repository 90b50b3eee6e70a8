"""What FROMAGe asks of its backbones: widths, pooling, and what an LM does after its head. The only place for it."""

import functools
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

logger = logging.getLogger(__name__)


def vision_width(vision_config: PreTrainedConfig) -> int:
    """Width of the encoder's pooled features: `hidden_size`, or the last of `hidden_sizes` (ResNet and its kind)."""
    config = vision_config.to_dict()
    if isinstance(config.get("hidden_size"), int):
        return config["hidden_size"]
    if config.get("hidden_sizes"):
        return config["hidden_sizes"][-1]
    raise ValueError(
        f"Cannot tell the feature width of a vision model of type {vision_config.model_type!r}: its configuration has "
        "neither `hidden_size` nor `hidden_sizes`."
    )


def pool_vision_output(output: ModelOutput, pooling: str, model_name: str) -> torch.Tensor:
    """One vector per image, (N, width), from a vision encoder's output.

    Raises:
        ValueError: `pooling` is `"pooler"` and the encoder has no pooled output.
    """
    if pooling == "pooler":
        pooled = output.get("pooler_output")
        if pooled is None:
            raise ValueError(
                f"{model_name} has no pooled output. Set `vision_pooling='cls'` or `vision_pooling='mean'` in the "
                "configuration, or use a vision model with a pooler."
            )
        return pooled.flatten(1)  # ResNet gives (N, C, 1, 1)
    hidden = output["last_hidden_state"]  # (N, tokens, width) or (N, width, h, w)
    if pooling == "mean":
        return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.flatten(2).mean(dim=2)
    if hidden.dim() != 3:
        raise ValueError(
            f"`vision_pooling='cls'` needs a sequence of tokens, but {model_name} gives {tuple(hidden.shape)}."
        )
    return hidden[:, 0]


def decoder_and_head(language_model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The LM without its head, and the head."""
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()
    if head is None or decoder is language_model or decoder is head:
        raise ValueError(
            f"{type(language_model).__name__} is not a causal language model with an output head. Load the language "
            "model with AutoModelForCausalLM."
        )
    return decoder, head


def hidden_state_width(text_config: PreTrainedConfig, layer: int, head_width: int) -> int:
    """Width of `hidden_states[layer]`; the last one has gone through OPT-350m's `project_out`."""
    return head_width if layer in (-1, text_config.num_hidden_layers) else text_config.hidden_size


def size_differences(saved: PreTrainedConfig, found: PreTrainedConfig) -> list[str]:
    """What keeps weights made for `found` from fitting a model of configuration `saved`, in words."""
    names = ("model_type", "vocab_size", "hidden_size", "hidden_sizes", "num_hidden_layers", "image_size", "patch_size")
    pairs = {name: (getattr(saved, name, None), getattr(found, name, None)) for name in names}
    return [f"its {name} is {theirs}, not {ours}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _checkpointing_layers(language_model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    modules = language_model.modules()
    return [
        layer for layer in modules if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]


def allow_activation_checkpointing(language_model: PreTrainedModel):
    """Let the layers with checkpointing enabled recompute their activations, although the LM is in eval mode.

    Transformers' layers recompute in training mode alone. That mode would also switch on a layer's own dropout.
    """
    for layer in _checkpointing_layers(language_model):
        layer.training = True
        for name in ("dropout", "activation_dropout"):
            if isinstance(layer.__dict__.get(name), float):
                setattr(layer, name, 0.0)


@contextmanager
def in_eval_mode(model: nn.Module):
    """No dropout, which PEFT's layers have in training, and no recomputed activations."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def no_activation_checkpointing(language_model: PreTrainedModel):
    """Keep activations, for a pass with a KV cache: transformers' layers drop the cache when they recompute."""
    layers = [layer for layer in _checkpointing_layers(language_model) if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def attention_window(text_config: PreTrainedConfig) -> float:
    """Tokens that every layer's attention reaches back; infinite where no layer has a sliding window."""
    config = text_config.to_dict()
    layer_types = config.get("layer_types") or config.get("attention_layers") or []
    slides = not layer_types or any(word in kind for kind in layer_types for word in ("sliding", "chunked", "local"))
    windows = [config.get(name) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((window for window in windows if window and slides), default=float("inf"))


def context_length(text_config: PreTrainedConfig) -> float:
    """Tokens that the LM has positions for; infinite where its configuration names no limit."""
    return getattr(text_config, "max_position_embeddings", None) or float("inf")


def check_length(input_ids: torch.Tensor, text_config: PreTrainedConfig):
    """Raise a `ValueError` where texts (B, L) are longer than the LM's context."""
    if input_ids.shape[1] > context_length(text_config):
        raise ValueError(
            f"The texts are {input_ids.shape[1]} tokens long, images included; the language model's context has "
            f"{context_length(text_config)}. Shorten them."
        )


def undisturbed(function: Callable) -> Callable:
    """Run `function` in a thread of its own, out of the reach of its caller's autocast, inference mode, hooks on saved
    tensors (checkpointing) and default device, which would change what a trial finds."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any):
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

        def on_device():
            with torch.cuda.device(device):
                return function(*args, **kwargs)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(on_device).result()

    return run


# ---- what an LM does before its decoder and after its head --------------------------------------------------------


class _HiddenStates(BaseModelOutputWithPast):
    """A decoder's output of which only `last_hidden_state` is there."""

    def __getattr__(self, name: str) -> None:
        return None


_ONE_STUB = threading.Lock()


@contextmanager
def _decoder_that_gives(language_model: PreTrainedModel, hidden: torch.Tensor):
    """Let the LM's decoder give `hidden` (1, L, H) at once, without running a layer: to this thread alone."""
    decoder, _ = decoder_and_head(language_model)
    thread = threading.get_ident()
    with _ONE_STUB:
        own, forward = decoder.__dict__.get("forward"), decoder.forward

        def stub(*args: Any, **kwargs: Any):
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
        ValueError: What the LM makes of them is another function of the head's output.
    """
    _, head = decoder_and_head(language_model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.weight.shape[-1], generator=generator).to(head.weight.device, _float_dtype(head))
    ids = torch.tensor([[0, 1]], device=hidden.device)

    largest_now = head(hidden).float().abs().max()

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


def _float_dtype(head: nn.Module) -> torch.dtype:
    return head.weight.dtype if head.weight.dtype.is_floating_point else torch.get_default_dtype()


def _fit_transform(small, large, config: PreTrainedConfig, tolerance: float) -> Callable | None:
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
    ids = torch.linspace(0, len(embedding.weight) - 1, 64, device=embedding.weight.device).long()
    rows, found = embedding.weight[ids], embedding(ids)
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
def check_gradient_passes(language_model: PreTrainedModel):
    """Raise a `ValueError` where a linear layer of the LM gives its input no gradient, or a wrong one.

    torchao's dynamically quantised activations are rounded, and rounding has none.
    """
    generator = torch.Generator().manual_seed(0)
    for linear in filter(_is_linear, language_model.modules()):
        kind, tensor = type(linear), type(linear.weight.data)
        if kind is nn.Linear and tensor is torch.Tensor:
            continue
        dtype = linear.weight.dtype if linear.weight.dtype.is_floating_point else language_model.dtype
        values = torch.randn(3, 1, linear.in_features, generator=generator).to(linear.weight.device, dtype)
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


# ---- what an encoder does twice ------------------------------------------------------------------------------------


@torch.no_grad()
def check_vision_model(vision_model: PreTrainedModel, pooling: str):
    """Encode one image twice.

    Raises:
        ValueError: The features differ (ViT-MAE masks at random), or are not as wide as the configuration says.
    """
    parameter = next(vision_model.parameters())
    if parameter.device.type == "meta":
        return
    config = vision_model.config.to_dict()
    size = config.get("image_size") or 64
    height, width = (size, size) if isinstance(size, int) else (size.values() if isinstance(size, dict) else size)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, config.get("num_channels") or 3, height, width, generator=generator, device="cpu")
    image, name = image.to(parameter.device, vision_model.dtype), type(vision_model).__name__
    first, second = (pool_vision_output(vision_model(image, return_dict=True), pooling, name).float() for _ in range(2))
    if not (first - second).norm() <= 1e-2 * first.norm():
        raise ValueError(
            f"{name} gives one image other features each time (cosine similarity "
            f"{nn.functional.cosine_similarity(first, second).item():.3f}). Switch off what is random in it: for "
            "ViT-MAE, load it with `mask_ratio=0.0` (`vision_mask_ratio=0.0` in from_vision_text_pretrained)."
        )
    if first.shape[-1] != vision_width(vision_model.config):
        raise ValueError(
            f"{name} gives {first.shape[-1]} features an image with `vision_pooling={pooling!r}`, but its "
            f"configuration names a width of {vision_width(vision_model.config)}. Try another `vision_pooling`."
        )
