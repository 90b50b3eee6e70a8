"""Vision towers of open_clip checkpoints: plain ViTs as transformers' own CLIP encoder, others around open_clip's code.

A checkpoint is a folder or a repository of the Hub with open_clip's `open_clip_config.json` and its weights.
"""

import json
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in the order that open_clip looks
_HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download", "proxies", "revision")
_PROJECTION = r"visual\.(proj$|head\.(proj|mlp)\.)"
EXTRA = "pip install 'modeling-fromage[open-clip]'"
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # open_clip's defaults
# open_clip's defaults of `vision_cfg`. A plain ViT sets sizes alone, and nothing else that its output depends on.
_SIZES = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_DEFAULTS = {"ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable",
             "final_ln_after_pool": False, "pool_type": "tok", "act_kwargs": None, "norm_kwargs": None,
             "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
             "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "timm_model_name": None}  # fmt: skip
_OF_OTHERS = {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained",
              "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"}  # fmt: skip


@strict
class OpenClipVisionConfig(PreTrainedConfig):
    """Configuration of [`OpenClipVisionModel`].

    Args:
        model_cfg (`dict`): open_clip's own: "embed_dim", "vision_cfg", and "quick_gelu" where it is set.
        projected (`bool`, defaults to `False`): Whether features have gone through CLIP's projection. In a ResNet it
            is part of the pooling, and they have in any case.
        hidden_size (`int`): Width of the features.
    """

    model_type = "open_clip_vision"

    model_cfg: dict | None = None
    projected: bool = False
    hidden_size: int = 512
    image_size: int | list[int] = 224
    num_channels: int = 3


class OpenClipVisionModel(PreTrainedModel):
    """An image tower as open_clip computes it: pixel values (N, 3, H, W) -> one vector an image (N, hidden_size)."""

    config_class = OpenClipVisionConfig
    config: OpenClipVisionConfig
    base_model_prefix = "open_clip"
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: OpenClipVisionConfig):
        super().__init__(config)
        with torch.device("cpu"):  # not on the meta device: some towers compute buffers that no checkpoint holds
            self.visual = _build_tower(config.model_cfg or {}, config.projected)
        self._computed = {
            module: {name: module.get_buffer(name).clone() for name in module._non_persistent_buffers_set}
            for module in self.visual.modules()
        }
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """open_clip has drawn the weights. Computed buffers, which `from_pretrained` empties, get their values back."""
        for name, values in self._computed.get(module, {}).items():
            module.get_buffer(name).copy_(values)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=_pooled(self.visual(pixel_values.to(self.dtype))))


def _pooled(features: Any) -> torch.Tensor:
    return features[0] if isinstance(features, tuple) else features  # CoCa's tower gives its tokens too


def _build_tower(model_cfg: dict[str, Any], projected: bool) -> nn.Module:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"This vision tower runs in open_clip, which cannot be imported: {EXTRA} ({error})"
        ) from error
    text_cfg = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8, "context_length": 2}  # built, and dropped
    vision_cfg = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    visual = open_clip.CLIP(
        model_cfg["embed_dim"], vision_cfg, text_cfg, quick_gelu=model_cfg.get("quick_gelu", False)
    ).visual
    if not projected:
        if getattr(visual, "proj", None) is not None:
            visual.proj = None
        for name in ("proj", "mlp"):  # timm's towers: what stands behind their pooling
            if name in getattr(visual, "head", nn.Module())._modules:
                visual.head._modules[name] = nn.Identity()
    return visual


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def find_file(name: str, filename: str, **hub_kwargs: Any) -> Path | None:
    """One of a checkpoint's files, in its folder or downloaded into the Hub's cache; `None` if it has none."""
    hub_kwargs = {key: value for key, value in hub_kwargs.items() if key in _HUB_KWARGS}
    found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return None if found is None else Path(found)


def read_open_clip_config(name: str, **hub_kwargs: Any) -> dict[str, Any]:
    """`open_clip_config.json`: "model_cfg" and "preprocess_cfg".

    Raises:
        ValueError: There is none, or it has other values than open_clip writes.
    """
    path = find_file(name, CONFIG_FILE, **hub_kwargs)
    if path is None:
        raise ValueError(f"{name} is no open_clip checkpoint: it has no {CONFIG_FILE}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The {CONFIG_FILE} of {name} is no JSON: {error}") from error
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("vision_cfg"), dict):
        raise ValueError(f"The {CONFIG_FILE} of {name} has no `model_cfg` with a `vision_cfg`.")
    preprocess = config.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ValueError(f"The `preprocess_cfg` in the {CONFIG_FILE} of {name} is {preprocess!r}, not a dictionary.")
    if wrong := _wrong_fields(model_cfg, preprocess):
        raise ValueError(f"The {CONFIG_FILE} of {name} has values that no model of open_clip has: {', '.join(wrong)}.")
    return config


def _wrong_fields(model_cfg: dict[str, Any], preprocess: dict[str, Any]) -> list[str]:
    """Fields whose values would be misread, or fail late."""
    vision, timm_name = {**_SIZES, **model_cfg["vision_cfg"]}, model_cfg["vision_cfg"].get("timm_model_name")

    def is_size(value: Any, most: int = 100_000) -> bool:
        return type(value) is int and 0 < value <= most

    sides = vision["image_size"] if isinstance(vision["image_size"], list) else [vision["image_size"]] * 2
    layers = vision["layers"] if isinstance(vision["layers"], list) else [vision["layers"]]  # of a ResNet's stages
    is_right = {
        "embed_dim": is_size(model_cfg.get("embed_dim", 512)),
        "quick_gelu": isinstance(model_cfg.get("quick_gelu", False), bool),
        "image_size": len(sides) == 2 and all(map(is_size, sides)),
        "layers": all(is_size(count, 1000) for count in layers),
        **{field: is_size(vision[field]) for field in ("width", "head_width")},
        "patch_size": vision["patch_size"] is None or is_size(vision["patch_size"]),  # of a ResNet
        "timm_model_name": timm_name is None or isinstance(timm_name, str) and not re.search("[:/]", timm_name),
        "mode": preprocess.get("mode", "RGB") == "RGB",
    }
    for field, least in (("mean", -math.inf), ("std", 0)):
        given = preprocess.get(field, [1.0])
        values = given if isinstance(given, (list, tuple)) else [given]
        is_right[field] = len(values) in (1, 3) and all(type(v) in (int, float) and v > least for v in values)
    given = {**vision, **model_cfg, **preprocess}
    return [f"{field} {given.get(field)!r}" for field, right in is_right.items() if not right]


def open_clip_vision_config(model_cfg: dict[str, Any], projected: bool = False) -> PreTrainedConfig:
    """The configuration of a tower: [`CLIPVisionConfig`] of a plain ViT, else [`OpenClipVisionConfig`]."""
    vision = {**_SIZES, **model_cfg["vision_cfg"]}
    if not projected and _is_plain_vit(vision):
        return CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
            projection_dim=model_cfg["embed_dim"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        )
    names = ("embed_dim", "vision_cfg", "quick_gelu")
    kept: dict[str, Any] = {name: model_cfg[name] for name in names if name in model_cfg}
    config = OpenClipVisionConfig(model_cfg=kept, projected=projected, image_size=vision["image_size"])
    with torch.no_grad(), torch.device("meta"):  # no weights are drawn to find a width
        tower = _build_tower(kept, projected).eval()
        features = tower(torch.zeros(1, config.num_channels, *_pair(config.image_size)))
    config.hidden_size = _pooled(features).shape[-1]
    return config


def _is_plain_vit(vision: dict[str, Any]) -> bool:
    """Whether transformers' `CLIPVisionModel` computes what a tower of this `vision_cfg` does."""
    others = {key: value for key, value in vision.items() if key not in _SIZES and key not in _OF_OTHERS}
    whole = all(type(value) is int for key, value in vision.items() if key in _SIZES and key != "mlp_ratio")
    return whole and all(key in _DEFAULTS and _DEFAULTS[key] == value for key, value in others.items())


def _pair(size: int | list[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def load_open_clip(name: str, config: PreTrainedConfig | None = None, projected: bool = False, **kwargs: Any) -> Any:
    """`from_pretrained` for the vision tower of an open_clip checkpoint, which `AutoModel` does not know.

    Args:
        name: A folder, or a repository of the Hub.
        config (*optional*): As a FROMAGe checkpoint has saved it.
        projected (`bool`): As for [`OpenClipVisionConfig`].
        kwargs: Those of `from_pretrained`.

    Returns:
        The model; with `output_loading_info=True` also what was missing.

    Raises:
        ImportError: The tower runs in open_clip, which is not installed.
        ValueError: `name` is no checkpoint of open_clip, its weights cannot be read, or they are not those of its
            configuration.
    """
    hub_kwargs = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
    if config is None:
        config = open_clip_vision_config(read_open_clip_config(name, **hub_kwargs)["model_cfg"], projected)
    path = next(filter(None, (find_file(name, file, **hub_kwargs) for file in WEIGHT_FILES)), None)
    if path is None:
        raise ValueError(f"{name} has none of open_clip's weight files ({', '.join(WEIGHT_FILES)}).")
    try:
        state = _read_tower(path)
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever the bytes of a broken file lead it to
        raise ValueError(f"{path}, the weights of {name}, cannot be read: {_what_is_wrong(path)}.") from error
    if isinstance(config, OpenClipVisionConfig):
        if not config.projected:
            state = {key: value for key, value in state.items() if not re.match(_PROJECTION, key)}
        model_class: Any = OpenClipVisionModel
    else:
        model_class, state = CLIPVisionModel, clip_vision_state(state)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **kwargs)
    if info["unexpected_keys"]:  # open_clip loads them or raises: without them a tower computes something else
        left = sorted(info["unexpected_keys"])
        raise ValueError(
            f"The vision tower of {name} has weights that its {CONFIG_FILE} does not speak of: {', '.join(left[:8])}. "
            "Correct its `vision_cfg`, or save the model anew with open_clip (open_clip.push_to_hf_hub.save_for_hf)."
        )
    return (model, info) if wants_info else model


def _read_tower(path: Path) -> dict[str, torch.Tensor]:
    """The weights of the vision tower, with the prefix "visual."."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith("visual.")}
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    state = state.get("state_dict", state)  # of a training run
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise TypeError("not a dictionary of tensors")
    return state


def _what_is_wrong(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself. Fetch that with `git lfs pull`"
    kind = "safetensors file" if path.suffix == ".safetensors" else "dictionary of tensors that torch.load takes"
    return (
        f"it is cut off, damaged or no {kind} ({path.stat().st_size} bytes). Get it again, or save the model anew with "
        "open_clip (open_clip.push_to_hf_hub.save_for_hf)"
    )


_RENAMED = (
    (r"^visual\.", ""),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # as transformers spells it
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def clip_vision_state(visual: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of open_clip's `VisionTransformer` under the names of transformers' `CLIPVisionModel`, without the
    projection."""
    state = {}
    for name, tensor in visual.items():
        if name == "visual.proj":
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = rows.contiguous()
        else:
            state[name] = tensor
    return state


# ---- preprocessing --------------------------------------------------------------------------------------------------


class OpenClipImageProcessor(CLIPImageProcessorPil):
    """Pixels as the transforms of open_clip and timm make them, which are torchvision's on Pillow images."""

    def center_crop(  # type: ignore[override]  # as the class above has it
        self, image: np.ndarray, size: SizeDict, **kwargs: Any
    ) -> np.ndarray:
        """Crop (C, H, W) like torchvision, which rounds half a pixel to even where transformers cuts it off."""
        (height, width), (rows, columns) = image.shape[-2:], (size.height, size.width)
        if height < rows or width < columns:
            return super().center_crop(image, size, **kwargs)
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        return image[..., top : top + rows, left : left + columns]


def open_clip_image_processor(name: str, **hub_kwargs: Any) -> OpenClipImageProcessor:
    """What open_clip does to an image before its tower, as an image processor of transformers that works with Pillow:
    torchvision's resizes a little differently.

    Raises:
        ValueError: `name` is no checkpoint of open_clip, or it prepares images in a way that no image processor has.
    """
    config = read_open_clip_config(name, **hub_kwargs)
    given: dict[str, Any] = {
        "mean": _MEAN, "std": _STD, "interpolation": "bicubic", "resize_mode": "shortest",
        **(config.get("preprocess_cfg") or {}),
    }  # fmt: skip
    # The tower's size goes before any that is given beside the transforms.
    height, width = _pair(config["model_cfg"]["vision_cfg"].get("image_size", _SIZES["image_size"]))
    if given["resize_mode"] == "squash":
        shapes = {"size": {"height": height, "width": width}, "do_center_crop": False}
    elif given["resize_mode"] == "shortest" and height == width:
        shapes = {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    else:
        raise ValueError(
            f"{name} resizes images to {height} x {width} by {given['resize_mode']!r}, which no image processor of "
            "transformers does. Give a processor of your own: FromageProcessor(image_processor, tokenizer)."
        )
    return pillow_processor(shapes, given["mean"], given["std"], given["interpolation"], name)


def pillow_processor(
    shapes: dict[str, Any], mean: Sequence[float], std: Sequence[float], interpolation: str, name: str
) -> OpenClipImageProcessor:
    """An image processor that resizes and crops to `shapes`.

    Raises:
        ValueError: `interpolation` is neither bicubic nor bilinear.
    """
    resample = {"bicubic": PILImageResampling.BICUBIC, "bilinear": PILImageResampling.BILINEAR}.get(interpolation)
    if resample is None:
        raise ValueError(f"{name} resizes images by {interpolation!r}; only 'bicubic' and 'bilinear' are known here.")
    return OpenClipImageProcessor(image_mean=list(mean), image_std=list(std), resample=resample, **shapes)


AutoConfig.register("open_clip_vision", OpenClipVisionConfig, exist_ok=True)
AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel, exist_ok=True)
AutoImageProcessor.register(
    OpenClipVisionConfig, image_processor_classes={"pil": OpenClipImageProcessor}, exist_ok=True
)

__all__ = ["OpenClipImageProcessor", "OpenClipVisionConfig", "OpenClipVisionModel"]
