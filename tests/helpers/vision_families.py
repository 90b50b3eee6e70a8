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
    **dict.fromkeys(["encoder_hidden_dim", "decoder_in_channels", "output_channels"], 32),
    **dict.fromkeys(["num_queries", "two_stage_num_proposals"], 10),
}
_IMAGES = {"image_size": 32, "patch_size": 8, "window_size": 2}
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
    heads = _first(fields, "num_attention_heads", "num_heads")
    depth = _first(fields, "num_hidden_layers", "num_layers", "depth")
    is_staged = "depths" in fields  # of such a model, no layer goes
    depth, sizes = (None, dict(sizes.items() - _DEPTHS.items())) if is_staged else (depth, sizes)
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


def _first(fields: dict[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if name in fields), None)


# What the rules do not see.
_STAGED = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 32}
_HGNET = {
    **{"stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 24], "stage_mid_channels": [8, 8, 8, 8]},
    **{"stage_out_channels": [16, 16, 24, 32], "hidden_sizes": [16, 16, 24, 32]},
    **{"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]},
}
_DETECTOR = {"encoder_in_channels": [16, 24, 32]}
_TIMM_RESNET = {"model_type": "timm_backbone", "backbone": "test_resnet", "use_pretrained_backbone": False}
_DETR = {"backbone_config": {**_TIMM_RESNET, "out_indices": [1, 2, 3, 4]}}
_HIERA = {"embed_dim_per_stage": [8, 16, 24, 32], "num_attention_heads_per_stage": [1, 2, 3, 4], "hidden_size": 8}
_HIERA |= {"blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3]}
_FASTVIT_SIZES = {"embed_dims": [16, 32, 64, 128], "layers": [1, 1, 1, 1], "inference_mode": True}
_FASTVIT = {"model_type": "timm_wrapper", "architecture": "fastvit_t8", "model_args": _FASTVIT_SIZES}
_FASTVIT |= {"hidden_size": 128, "num_classes": 2}
_PE = {"embed_dim": 32, "num_heads": 4, "depth": 2, "img_size": [32, 32]}
_PE_TIMM: dict[str, Any] = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_tiny_patch16_384",
    "model_args": _PE,
    "num_classes": 2,
}
# Under this name of the architecture, which transformers' defaults misspell.
_REPVIT_SIZES = {
    "embed_dim": [8, 16, 24, 32],
    "depth": [1, 1, 1, 1],
    "features_only": True,
    "out_indices": [0, 1, 2, 3],
}
_REPVIT = {"model_type": "timm_wrapper", "architecture": "repvit_m1", "model_args": _REPVIT_SIZES, "num_classes": 2}
_LEVELS = {"num_feature_levels": 1, "projector_in_channels": [32], "projector_out_channels": 32}
_BLOCKS = [[[3, 16, 16, 1, False]], *[[[3, 16, 16, 2, False], [3, 16, 16, 1, False]]] * 3]
_LCNET = {"model_type": "pp_lcnet_v4", "out_indices": [1, 2, 3, 4], "stem_channels": [3, 16, 16]}
_LCNET |= {"block_configs": _BLOCKS}
_CONVOLUTIONS = {
    **dict.fromkeys(["reduce_channel", "return_channel"], [1, 1, 0]),
    **{
        f"{name}_{ratio}ratio": [[k * h + 1 - h, k * w + 1 - w], [1, 1], [k // 2 * h, k // 2 * w]]
        for name, h, w in (
            ("vertical_long_to_small_conv", 1, 0),
            ("horizontal_small_to_long_conv", 0, 1),
            ("symmetric_conv_long", 1, 1),
        )
        for ratio, k in (("long", 7), ("mid", 5), ("short", 3))
    },
}
GIVEN: dict[str, dict[str, Any]] = {
    "align_vision_model": _EFFICIENTNET,
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "conditional_detr": _DETR,
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "d_fine": _DETECTOR,
    "dab-detr": _DETR,
    "deimv2": _DETECTOR,
    "deformable_detr": {"backbone_config": {**_TIMM_RESNET, "out_indices": [2, 3, 4]}},
    "detr": _DETR,
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "donut-swin": {"image_size": 64},
    "edgetam_vision_model": {"backbone_config": _REPVIT, "backbone_channel_list": [32, 24, 16, 8]},
    "efficientnet": _EFFICIENTNET,
    "fast_vlm": {"vision_config": _FASTVIT},
    "gemma3n_vision": {
        **{"model_args": {"channel_multiplier": 0.125}, "pretrained_cfg": {"input_size": [3, 64, 64]}, "num_classes": 2}
    },
    "gemma4": {"vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 2}},
    "gemma4_text": {"vocab_size_per_layer_input": _VOCAB},
    "hgnet_v2": _HGNET,
    "inkling_vision": {"n_layers": 2, "text_hidden_size": 32},
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 64, "projector_output_dim": 64},
    "lw_detr": {"projector_scale_factors": [1.0], "d_model": 32, "num_queries": 10, "group_detr": 1, **_LEVELS},
    "lw_detr_vit": {"image_size": 64, "num_windows": 4, "window_block_indices": [0], "pretrain_image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64, "n_attn_blocks": [1, 1, 1]},
    "pe_video_encoder": {"vision_config": _PE_TIMM},
    "perception_lm": {"vision_config": _PE_TIMM},
    "pp_doclayout_v3": {**_DETECTOR, "x4_feat_dim": 16},
    "pp_doclayout_v4": _DETECTOR,
    "pp_formulanet_vision": {"post_conv_in_channels": 32, "post_conv_mid_channels": 48, "post_conv_out_channels": 64},
    "pp_ocrv6_medium_det": {
        **{"backbone_config": _LCNET, "neck_out_channels": 16, "intraclass_block_config": _CONVOLUTIONS},
        **{"scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]},
    },
    "pp_ocrv6_small_det": {"backbone_config": _LCNET, "layer_list_out_channels": [16, 16, 16, 16]},
    **dict.fromkeys(["pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec"], {"backbone_config": _LCNET | {"out_indices": [4]}}),
    "regnet": {**_STAGED, "groups_width": 8},
    "resnet": _STAGED,
    "rt_detr": _DETECTOR,
    "rt_detr_resnet": _STAGED,
    "rt_detr_v2": _DETECTOR,
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": {"backbone_channel_list": [32, 24, 16, 8]},
    "sam3_vit_model": {"pretrain_image_size": 32, "window_size": 2, "global_attn_indexes": [1]},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4], "num_key_value_attention_heads": 4},
    "uvdoc_backbone": {"out_features": [f"stage{number}" for number in range(1, 7)], "out_indices": None},
    "unlimited_ocr_sam_vision_model": {"image_size": 64, "patch_size": 4, "downsample_channels": [16, 32]},
    "swin": {"image_size": 64},
    "table-transformer": _DETR,
    "timm_wrapper": {"architecture": "test_resnet"},
}
