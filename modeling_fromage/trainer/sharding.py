"""Frozen backbones too large for one device: their layers sharded over the processes, what is trained on each of them.

`fully_shard` gathers a layer's weights for the time that it runs. What is trained stays whole on every process, so that
DistributedDataParallel averages its gradients and that optimizer, clipping and checkpoints are those of any other run.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backbone_loading_fromage import PARTS, ROLES
from ..backbone_probes_fromage import ABILITIES
from ..checkpoint_origin_fromage import has_packed_weights
from ..miniature_fromage import FAILURES
from ..modeling_fromage import FromageForConditionalGeneration
from ..vision_fromage import dummy_images

logger = logging.getLogger(__name__)

_LEAVE_OUT = "Leave `shard_backbones` out, or take another backbone."


def shard_for(args: TrainingArguments, model: Any) -> None:
    """Shard `model` over all processes of a run, each of which must call this; nothing where there is only one.

    Args:
        model ([`FromageForConditionalGeneration`]): Or a PeftModel around one.
    """
    if args.world_size == 1:
        logger.warning("`shard_backbones` does nothing in one process: start several (torchrun, accelerate launch).")
        return
    base = base_of(model)
    if not isinstance(base, FromageForConditionalGeneration):
        raise ValueError(f"`shard_backbones` needs a FromageForConditionalGeneration, got {type(model).__name__}.")
    if not base.traits.is_sharded:
        shard_backbones(base, init_device_mesh(args.device.type, (args.world_size,)))


def shard_backbones(model: FromageForConditionalGeneration, mesh: DeviceMesh) -> None:
    """Shard the layers of both backbones over `mesh`, in place. All processes must call this, with the same weights.

    Embeddings, output head and everything that is trained, LoRA too, stay whole on each process. What FROMAGe tries on
    a language model is tried before: afterwards every pass needs all processes.

    Raises:
        ValueError: A backbone is quantised, compiled, or has no layers that run with their weights sharded; or the
            language model cannot run texts of several lengths in one pass.
    """
    _refuse(model)
    _try_everything(model)
    expected, size = _outputs(model), model.get_memory_footprint()
    for part in PARTS.values():
        _shard_layers(getattr(model, part), mesh)
    model.traits.is_sharded = True
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    cast(nn.Module, model).to(next(p.device for p in model.parameters() if isinstance(p, DTensor)))
    tolerance = 2e-2 if model.language_model.dtype.itemsize < 4 else 1e-4
    try:
        same = [_agree(*pair, tolerance) for pair in zip(_outputs(model), expected, strict=True)]
    except FAILURES as error:
        raise ValueError(f"A backbone does not run with its layers sharded: {error}. {_LEAVE_OUT}") from error
    for what, is_same in zip(ROLES.values(), same, strict=True):
        if not is_same:
            raise ValueError(f"The {what} computes other numbers with its layers sharded. {_LEAVE_OUT}")
    logger.info(
        "The layers of both backbones are sharded over %d processes: each holds %.3g GB of %.3g.",
        mesh.size(), sum(p.nbytes for p in held) / 1e9, size / 1e9,
    )  # fmt: skip


def _refuse(model: FromageForConditionalGeneration) -> None:
    for prefix, part in PARTS.items():
        backbone = getattr(model, part)
        if has_packed_weights(backbone):
            raise ValueError(f"`shard_backbones` does not shard a quantised {ROLES[prefix]}. Load it unquantised.")
        if any(module._compiled_call_impl is not None for module in backbone.modules()):
            raise ValueError(
                f"`shard_backbones` does not work with a compiled {ROLES[prefix]}. Leave `compile_vision_model` out."
            )


def _try_everything(model: FromageForConditionalGeneration) -> None:
    """Run all trials of the language model while its weights are whole."""
    lm, traits = model.language_model, model.traits
    traits.require_gradient(lm)
    found = {ability: traits.takes(lm, ability) for ability in ABILITIES}
    traits.why_no_shortcut(lm)
    if not (found["packed rows"] or found["right padding"]):
        raise ValueError(
            f"{type(lm).__name__} takes neither packed rows nor padding on the right. With sharded layers all "
            f"processes must make the same passes, whatever the lengths of their texts. {_LEAVE_OUT}"
        )


@torch.no_grad()
def _outputs(model: FromageForConditionalGeneration) -> list[torch.Tensor]:
    """What the language model and the encoder make of some tokens and an image."""
    lm = model.frozen_lm()
    weight = model.adapter.logit_scale
    hidden = lm.decode(lm.embed(torch.arange(8, device=weight.device)[None])).last_hidden_state
    pixels = dummy_images(model.config.vision_config, 1).to(weight.device)
    return [hidden.float(), model.get_pooled_image_features(pixels).float()]


def _agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found.cpu() - expected.cpu()).norm() <= tolerance * expected.cpu().norm())  # False for NaN


def _shard_layers(backbone: nn.Module, mesh: DeviceMesh) -> None:
    layers = list(_repeated_layers(backbone))
    if not layers:
        raise ValueError(f"`shard_backbones` finds no layers in {type(backbone).__name__}. {_LEAVE_OUT}")
    for layer in layers:
        parameters = list(layer.parameters())
        # One group has one dtype: norms in fp32 beside bf16 stay whole, as what is trained does.
        sizes: Counter[torch.dtype] = Counter()
        for parameter in parameters:
            sizes[parameter.dtype] += 0 if parameter.requires_grad else parameter.numel()
        dtype, _ = sizes.most_common(1)[0]
        whole = {p for p in parameters if p.requires_grad or p.dtype != dtype or p.dim() == 0}
        if len(whole) < len(parameters):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers: modules of transformers' class for them, or in a list or sequence."""
    for child in module.children():
        is_layer = isinstance(child, GradientCheckpointingLayer) or isinstance(module, (nn.ModuleList, nn.Sequential))
        if is_layer and not isinstance(child, (nn.ModuleList, nn.Sequential)) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _repeated_layers(child)


# ---- training and saving ---------------------------------------------------------------------------------------------


def data_parallel(model: nn.Module, accelerator: Accelerator) -> DistributedDataParallel:
    """`model` in DistributedDataParallel, which leaves its sharded parameters alone: accelerate would refuse them."""
    prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # for autocast
    sharded = [name for name, parameter in prepared.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(prepared, sharded)
    options = accelerator.ddp_handler.to_kwargs() if accelerator.ddp_handler else {}
    return DistributedDataParallel(prepared, **options)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, `save_pretrained` of the first process has all weights of a sharded `model` in its CPU's memory.
    All processes must enter this."""
    base = base_of(model)
    if not is_sharded(base):
        yield
        return
    base.traits.gathered_state = whole_state(base)
    try:
        yield
    finally:
        base.traits.gathered_state = None


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict of a sharded `model`, on the first process; all of them must call this."""
    return cast(Any, get_model_state_dict)(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def is_sharded(model: Any) -> bool:
    """Whether no process has all weights of `model`, or of the model in it."""
    base = base_of(model)
    return isinstance(base, FromageForConditionalGeneration) and base.traits.is_sharded


def base_of(model: Any) -> Any:
    """The model, of a PeftModel what it wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["data_parallel", "gathered", "is_sharded", "shard_backbones", "shard_for", "whole_state"]
