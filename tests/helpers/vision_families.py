"""Tiny vision encoders, and image-text models with one, of every model type that transformers has."""

import copy
import functools
import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from modeling_fromage.configuration_fromage import vision_half
from modeling_fromage.vision_fromage import build_vision_model, dummy_images, vision_part

HALVES = ("vision_config", "image_config")
_VOCAB = 99
_LARGEST = 5e7  # parameters
logger = logging.getLogger(__name__)
_DEPTHS = dict.fromkeys(["num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"], 2)
_WIDTHS = {
    **dict.fromkeys(["hidden_size", "d_model", "embed_dim"], 32),
    **dict.fromkeys(["intermediate_size", "mlp_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["num_attention_heads", "num_heads", "num_key_value_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **{"head_dim": 8, "projection_dim": 16, "vocab_size": _VOCAB, "pooler_output_size": 32},
}
_IMAGES = {"image_size": 32, "patch_size": 8}
# Of stages: what must be a multiple of the number of heads, and what of nothing.
_STAGES = ["hidden_sizes", "embed_dims", "neck_hidden_sizes"]


def model_types() -> list[str]:
    """The types of `MODEL_MAPPING` whose class has pixel values for its main input, and those with a vision half."""
    return sorted(
        {model_type for model_type in CONFIG_MAPPING_NAMES if _is_encoder(model_type) or has_half(model_type)}
    )


def _is_encoder(model_type: str) -> bool:
    if model_type not in MODEL_MAPPING_NAMES:
        return False
    try:
        found = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
        classes = found if isinstance(found, (list, tuple)) else [found]
        return any(each.main_input_name == "pixel_values" for each in classes)
    except (AttributeError, ImportError, ValueError):  # of audio, and mistakes in the table
        return False


def has_half(model_type: str) -> bool:
    return any(name in CONFIG_MAPPING[model_type].sub_configs for name in HALVES)


def make_vision_model(model_type: str) -> PreTrainedModel:
    """A random model of a type, as small as goes by rule; of an image-text model that has no small one, its encoder."""
    torch.manual_seed(3)
    return build_vision_model(copy.deepcopy(tiny_config(model_type))).eval()


@functools.cache
def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest configuration of a type by rule that a model can be made of and, if at all, encodes an image."""
    default = CONFIG_MAPPING[model_type]()
    made = _tiny(default)
    if made is None and has_half(model_type):
        made = _tiny(vision_half(default))
    if made is None:
        raise ValueError(f"No tiny model of type {model_type} can be made by rule.")
    return made


def _tiny(default: PreTrainedConfig) -> PreTrainedConfig | None:
    made = None
    for tables in ((_DEPTHS, _WIDTHS, _IMAGES), (_DEPTHS, _IMAGES), (_DEPTHS,), (_DEPTHS, _WIDTHS), ()):
        for stages in (True, False):
            try:
                config = type(default).from_dict(_shrink(default.to_dict(), tables, stages))
                with torch.device("meta"):
                    model = build_vision_model(config).eval()
                if sum(parameter.numel() for parameter in model.parameters()) > _LARGEST:
                    continue
                made = made or config
                if _encodes(config, model):
                    return config
            except ImportError:
                raise
            except Exception as error:
                logger.info("%s", error)
    return made


@torch.no_grad()
def _encodes(config: PreTrainedConfig, on_meta: PreTrainedModel) -> bool:
    for model in (on_meta, None):  # some look at their numbers
        encoder = vision_part(build_vision_model(copy.deepcopy(config)).eval() if model is None else model)
        try:
            encoder(dummy_images(encoder.config, 2).to(encoder.device), return_dict=True)
            return True
        except Exception as error:
            if "meta" not in str(error):
                return False
    return False


def _shrink(fields: dict[str, Any], tables: tuple[dict[str, int], ...], stages: bool) -> dict[str, Any]:
    sizes = {name: size for table in tables for name, size in table.items()}
    heads = next((fields[name] for name in ("num_attention_heads", "num_heads") if name in fields), None)
    depth = next((fields[name] for name in ("num_hidden_layers", "num_layers", "depth") if name in fields), None)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config" or depth and name in ("out_features", "out_indices", "stage_names"):
            continue  # made anew
        small[name] = value
        if isinstance(value, dict) and "model_type" in value:
            small[name] = _shrink(value, tables, stages)
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, sizes[name])
        elif name in sizes and isinstance(value, (list, tuple)):
            small[name] = [sizes[name]] * len(value)
        elif name == "depths" and tables:
            small[name] = [1] * len(value)
        elif isinstance(value, (list, tuple)) and len(value) == depth and len(value) > 2:
            small[name] = [value[0], value[-1]]  # the kinds of layers
        elif stages and name in _STAGES and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            each = heads if isinstance(heads, (list, tuple)) and len(heads) == len(value) else range(1, len(value) + 1)
            small[name] = [8 * h for h in each]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= _VOCAB:
            small[name] = _VOCAB - 1
    return {**small, **GIVEN.get(fields.get("model_type", ""), {})}


# What the rules do not see.
_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 32}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
GIVEN: dict[str, dict[str, Any]] = {
    "align_vision_model": _EFFICIENTNET,
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "efficientnet": _EFFICIENTNET,
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 64, "projector_output_dim": 64},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "resnet": _RESNET,
}
