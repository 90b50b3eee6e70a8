"""The library that a vision encoder comes from, and its image processor: transformers, open_clip, or timm through
transformers' wrapper."""

import math
import re
from typing import Any, Literal

from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedConfig
from transformers.utils import is_timm_available

from .vision_open_clip import (
    EXTRA,
    open_clip_image_processor,
    open_clip_vision_config,
    pillow_processor,
    read_open_clip_config,
)

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's defaults


def split_library(name: str) -> tuple[Literal["transformers", "open_clip"], str]:
    """The library of a vision encoder, and the folder or Hub id within it.

    `"open_clip:hf-hub:org/name"`, `"open_clip:local-dir:PATH"` and `"open_clip:MODEL/TAG"` (a model and a pretrained
    tag of open_clip's table) are of `"open_clip"`; all other names are of `"transformers"`.

    Raises:
        ImportError: A tag is to be looked up, and open_clip is not installed.
        ValueError: The name after `open_clip:` is none of these, or the tag's weights are in no Hub repository.
    """
    if not name.startswith("open_clip:"):
        return "transformers", name
    name = name.removeprefix("open_clip:")
    for prefix in ("hf-hub:", "local-dir:"):
        if name.startswith(prefix) and name != prefix:
            return "open_clip", name.removeprefix(prefix)
    model, _, tag = name.partition("/")
    if not model or not tag or "/" in tag:
        raise ValueError(
            f"'open_clip:{name}' names no checkpoint: expected 'open_clip:hf-hub:org/name', 'open_clip:local-dir:PATH' "
            "or 'open_clip:MODEL/TAG', such as 'open_clip:ViT-B-32/laion2b_s34b_b79k'."
        )
    return "open_clip", _hub_id_of_tag(model, tag)


def _hub_id_of_tag(model: str, tag: str) -> str:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"open_clip's table knows where the weights of {model}/{tag} are, and it cannot be imported: {EXTRA}. "
            f"Or name the repository itself: 'open_clip:hf-hub:org/name'. ({error})"
        ) from error
    known = open_clip.get_pretrained_cfg(model, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "no tags: there is no such model"
        raise ValueError(f"open_clip has no weights {tag!r} of {model!r}; it has {tags}.")
    if not re.fullmatch(r"[^/]+/[^/]+/", known.get("hf_hub") or ""):  # else a file of its own, or an address
        raise ValueError(
            f"The weights of {model}/{tag} are in no Hub repository with open_clip's configuration. Save them into a "
            "folder (open_clip.push_to_hf_hub.save_for_hf), and name it: 'open_clip:local-dir:PATH'."
        )
    return known["hf_hub"].rstrip("/")


def read_vision_config(name: str, library: str, projected: bool = False, **hub_kwargs: Any) -> PreTrainedConfig:
    """The configuration of an encoder, a folder or Hub id of `library`; of an image-text model, all of it.

    Raises:
        ImportError: It needs a package that is not installed.
    """
    if library == "open_clip":
        return open_clip_vision_config(read_open_clip_config(name, **hub_kwargs)["model_cfg"], projected)
    _require_timm(name, hub_kwargs)
    config = AutoConfig.from_pretrained(name, **hub_kwargs)
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm writes the classifier's size here too, and the wrapper has one of its own: no classifier.
        config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    return config


def load_image_processor(name: str, **hub_kwargs: Any) -> BaseImageProcessor:
    """The image processor of a vision encoder, by the name that [`split_library`] takes.

    Those of open_clip and timm give the pixels that these give, and are saved and loaded without them.

    Raises:
        OSError, ValueError: There is none, or it prepares images in a way that no image processor has.
    """
    library, name = split_library(name)
    if library == "open_clip":
        return open_clip_image_processor(name, **hub_kwargs)
    if (known := _timm_config(name, hub_kwargs)) is not None:
        return _timm_image_processor(name, known)
    return AutoImageProcessor.from_pretrained(name, **hub_kwargs)


# ---- timm -----------------------------------------------------------------------------------------------------------


def _timm_config(name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **hub_kwargs)
    except OSError:  # an image processor can be loaded without
        return None
    return config if config.get("model_type") == "timm_wrapper" else None


def _require_timm(name: str, hub_kwargs: dict[str, Any]) -> None:
    if not is_timm_available() and _timm_config(name, hub_kwargs) is not None:
        raise ImportError(f"{name} is a model of timm, which is not installed, or its torchvision is not: {EXTRA}")


def _timm_image_processor(name: str, config: dict[str, Any]) -> BaseImageProcessor:
    """timm's transforms of evaluation, read as timm reads them."""
    given: dict[str, Any] = {
        "input_size": (3, 224, 224), "mean": _IMAGENET_MEAN, "std": _IMAGENET_STD, "interpolation": "bicubic",
        "crop_pct": 0.875, "crop_mode": "center",
    }  # fmt: skip
    known = config.get("pretrained_cfg")
    if not isinstance(known, dict):
        raise ValueError(
            f"The config.json of {name} has no `pretrained_cfg`, in which timm says how images are prepared. Save the "
            "model anew with timm (timm.models.save_for_hf), or give a processor of your own: "
            "FromageProcessor(image_processor, tokenizer)."
        )
    given |= {key: value for key, value in known.items() if value}  # as timm, which skips 0 and [] too
    size, crop = given["input_size"], given["crop_pct"]
    if not (isinstance(size, (list, tuple)) and len(size) == 3 and isinstance(crop, (int, float)) and crop > 0):
        raise ValueError(
            f"The `pretrained_cfg` of {name} has `input_size` {size!r} and `crop_pct` {crop!r}: expected three sizes "
            "(channels, height, width) and a share above 0. Correct its config.json."
        )
    _, height, width = size
    if given["crop_mode"] != "center" or height != width:
        raise ValueError(
            f"{name} crops images to {height} x {width} by {given['crop_mode']!r}, which is not known here. Give a "
            "processor of your own: FromageProcessor(image_processor, tokenizer)."
        )
    shapes = {"size": {"shortest_edge": math.floor(height / given["crop_pct"])},
              "crop_size": {"height": height, "width": width}}  # fmt: skip
    return pillow_processor(shapes, given["mean"], given["std"], given["interpolation"], name)
