"""What FROMAGe asks of a vision encoder: one vector per image, its width, and that images do not disturb each other."""

import copy
import importlib
import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .backbone_probes_fromage import FAILURES
from .backbones_fromage import undisturbed
from .configuration_fromage import FromageConfig, vision_half
from .image_vectors_fromage import ImageVector

logger = logging.getLogger(__name__)


# ---- the vision half of an image-text model ------------------------------------------------------------------------


def auto_model_for(vision_config: PreTrainedConfig) -> Any:
    """`AutoModel`, which first learns the class of an encoder that it does not know by itself (BLIP's, OwlViT's).

    Raises:
        ValueError: transformers has no model of that configuration that takes pixel values.
    """
    kind = type(vision_config)
    is_remote = "AutoModel" in (getattr(vision_config, "auto_map", None) or {})
    if kind not in MODEL_MAPPING and not is_remote:
        try:
            module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
        except ImportError:
            module = None
        models = [each for each in vars(module).values() if _takes_pixels(each, kind)] if module else []
        if not models:
            raise ValueError(
                f"transformers has no encoder of pixel values with a configuration of type {kind.__name__}. Take "
                "another vision model."
            )
        usual_name = f"{kind.__name__.removesuffix('Config')}Model"
        AutoModel.register(kind, max(models, key=lambda model: model.__name__ == usual_name), exist_ok=True)
    return AutoModel


def build_vision_model(vision_config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with random weights."""
    return auto_model_for(vision_config).from_config(vision_config)


def _takes_pixels(each: Any, config_class: type) -> bool:
    is_model = isinstance(each, type) and issubclass(each, PreTrainedModel)
    if not is_model or "config_class" not in dir(each) or each.config_class is not config_class:
        return False
    return list(inspect.signature(each.forward).parameters)[1:2] == ["pixel_values"]


def vision_part(model: PreTrainedModel) -> PreTrainedModel:
    """The vision encoder within an image-text model, with its weights, or the model itself where it is an encoder.

    Raises:
        ValueError: There is none that runs by itself.
    """
    half = vision_half(model.config)
    if half is model.config:
        return model
    within = model.get_submodule(_name_of_half(model) or "")
    if within is not model:
        with torch.device("meta"):
            encoder = build_vision_model(copy.deepcopy(half))
        if type(within) is type(encoder):
            return within
        # SAM and OwlViT hold what is within their encoder.
        inner = next((name for name, each in encoder.named_modules() if type(each) is type(within)), None)
        if inner is not None:
            encoder.set_submodule(inner, within)
            encoder.config = half
            if all(parameter.device.type != "meta" for parameter in encoder.parameters()):
                return encoder.eval()
    raise ValueError(
        f"FROMAGe finds no vision encoder of its own in {type(model).__name__}. Save the encoder by itself with "
        "save_pretrained, and pass that folder; or take another vision model."
    )


def names_in_vision_half(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of `names`, of tensors of an image-text model, that are in its vision half."""
    return [name for name in names if name.startswith(f"{_name_of_half(model)}.")]


def _name_of_half(model: PreTrainedModel) -> str | None:
    kind = type(vision_half(model.config))
    return next((name for name, each in model.named_modules() if type(getattr(each, "config", None)) is kind), None)


# ---- width ---------------------------------------------------------------------------------------------------------


def dummy_images(config: PreTrainedConfig, count: int) -> torch.Tensor:
    """Random pixel values (count, channels, height, width) of the size that an encoder takes."""
    fields = config.to_dict()
    size = _image_size(fields) or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = next((fields[name] for name in ("num_channels", "in_channels", "in_chans") if fields.get(name)), 3)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, height, width, generator=generator, device="cpu")


def _image_size(fields: dict[str, Any]) -> Any:
    """The size that a configuration names for images; of SAM or a detector, its encoder's; `None` of any size."""
    if fields.get("image_size"):
        return fields["image_size"]
    for name, key in (("model_args", "img_size"), ("pretrained_cfg", "input_size")):  # of timm
        if (fields.get(name) or {}).get(key):
            size = fields[name][key]
            return size[-2:] if isinstance(size, (list, tuple)) else size
    inner = (_image_size(each) for each in fields.values() if isinstance(each, dict) and "model_type" in each)
    return next((size for size in inner if size), None)


def vision_feature_size(config: FromageConfig, vision_model: PreTrainedModel | None = None) -> int:
    """Width of an image's pooled features: `config.vision_feature_size`, which is measured where it is absent.

    Args:
        config ([`FromageConfig`]): Gets the measured width.
        vision_model (`PreTrainedModel`, *optional*): Made from `config`, without weights, where it is not at hand.

    Raises:
        ValueError: The encoder does not run without weights, and its configuration names no width.
    """
    if config.vision_feature_size is None:
        config.vision_feature_size = _measured_feature_size(config, vision_model)
    return config.vision_feature_size


@torch.no_grad()
def _measured_feature_size(config: FromageConfig, vision_model: PreTrainedModel | None) -> int:
    """The width of what an encoder on the meta device makes of a dummy image; else what the configuration names."""
    vision_config, why = copy.deepcopy(config.vision_config), ""
    try:
        if vision_model is None or next(vision_model.parameters()).device.type != "meta":
            build = type(vision_model)._from_config if vision_model else build_vision_model
            with torch.device("meta"):
                vision_model = build(vision_config).eval()
        pixels = dummy_images(vision_config, 1).to("meta", vision_model.dtype)
        return ImageVector.of(config).encode(vision_model, pixels)[1].shape[-1]
    except FAILURES as error:
        why = f"{type(error).__name__}: {error}"
        logger.info("No dummy image runs through a %s without weights: %s", vision_config.model_type, why)
    fields = vision_config.to_dict()
    width = fields.get("hidden_size") or (fields.get("hidden_sizes") or [None])[-1]
    if not isinstance(width, int):
        raise ValueError(
            f"A vision model of type {vision_config.model_type!r} encodes no dummy image, and its configuration names "
            "no width. Take another vision model; or set `vision_feature_size` in the configuration, if it does encode "
            f"pixel values by themselves once its weights are there. It says: {why}"
        )
    return width * (1 + config.vision_patch_tokens)


# ---- what an encoder makes of images -------------------------------------------------------------------------------


@undisturbed
@torch.no_grad()
def check_vision_model(vision_model: PreTrainedModel, vector: ImageVector) -> int | None:
    """Encode an image by itself and behind two others, which must make no difference.

    Returns:
        The width of its features; `None` of an encoder without weights.

    Raises:
        ValueError: The encoder needs more than pixel values, has nothing that `vector` could take, gives one image
            other features each time (ViT-MAE masks at random), or mixes the images of a batch.
    """
    parameter = next(vision_model.parameters())
    if parameter.device.type == "meta":
        return None
    _refuse_further_inputs(vision_model)
    image, other = dummy_images(vision_model.config, 2).to(parameter.device, vision_model.dtype).split(1)
    alone = _encode(vision_model, vector, image)[0]
    # The last two in passes of one shape, so that rounding is the same and a leak shows however small it is.
    behind, behind_loud = (_encode(vision_model, vector, torch.cat([each, image]))[1] for each in (other, -10 * other))
    leaks = _differ(behind, behind_loud, 1e-5 if vision_model.dtype.itemsize >= 4 else 1e-3)
    if not leaks and not _differ(alone, behind, 1e-2):
        return alone.shape[-1]
    name, again = type(vision_model).__name__, _encode(vision_model, vector, image)[0]
    if _differ(alone, again, 1e-5):
        raise ValueError(
            f"{name} gives one image other features each time (cosine similarity "
            f"{torch.nn.functional.cosine_similarity(alone, again, dim=0).item():.3f}). Switch off what is random in "
            "it: for ViT-MAE, load it with `mask_ratio=0.0` (`vision_mask_ratio=0.0` in from_vision_text_pretrained)."
        )
    raise ValueError(
        f"{name} mixes the images of a batch: the features of one change with what stands beside it. Take another "
        "vision model."
    )


def _encode(vision_model: PreTrainedModel, vector: ImageVector, pixels: torch.Tensor) -> torch.Tensor:
    """Pooled features (N, width) of `pixels`, in fp32."""
    name = type(vision_model).__name__
    options = {} if vector.layer == -1 else {"output_hidden_states": True}
    try:
        output = vision_model(pixels, return_dict=True, **options)
    except FAILURES as error:
        raise ValueError(
            f"{name} does not encode pixel values of shape {tuple(pixels.shape)} by themselves, and FROMAGe gives it "
            f"nothing else. Take another vision model. It says: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, ModelOutput):
        raise ValueError(f"{name} returns a {type(output).__name__}, not a ModelOutput. Take another vision model.")
    features = vector.of_output(output, vision_model, pixels)
    if features.dim() != 2 or len(features) != len(pixels):
        raise ValueError(
            f"{name} gives features of shape {tuple(features.shape)} for {len(pixels)} images with `vision_pooling="
            f"{vector.pooling!r}`, not a vector for each. Try another `vision_pooling`, or take another vision model."
        )
    return features.float()


def _differ(first: torch.Tensor, second: torch.Tensor, tolerance: float) -> bool:
    return not (first - second).norm() <= tolerance * first.norm()  # True for NaN


def _refuse_further_inputs(vision_model: PreTrainedModel) -> None:
    """Raise a `ValueError` where an encoder's `forward` demands more than pixel values."""
    parameters = list(inspect.signature(vision_model.forward).parameters.values())[1:]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [f"`{each.name}`" for each in parameters if each.kind in by_name and each.default is each.empty]
    if needed:
        raise ValueError(
            f"{type(vision_model).__name__} needs {' and '.join(needed)} beside pixel values, and FROMAGe gives an "
            "encoder nothing else. Take one that encodes images alone, for instance a SigLIP 2 checkpoint without "
            "`naflex` in its name."
        )


__all__ = [
    "auto_model_for",
    "build_vision_model",
    "check_vision_model",
    "names_in_vision_half",
    "vision_feature_size",
    "vision_part",
]
