"""Tiny checkpoints of open_clip: as its own library writes them, and a ViT's without it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from modeling_fromage.vision_open_clip import open_clip_vision_config

_TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
_VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
_TIMM = {"timm_model_pretrained": False}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": _VIT},
    "vit with defaults": {"embed_dim": 16, "vision_cfg": {**_VIT, "mlp_ratio": 2.0, "pool_type": "tok",
                                                          "attentional_pool": False, "patch_dropout": 0.5}},
    "vit, average": {"embed_dim": 16, "vision_cfg": {**_VIT, "pool_type": "avg"}},
    "vit, sin-cos": {"embed_dim": 16, "vision_cfg": {**_VIT, "pos_embed_type": "sin_cos_2d"}},
    "resnet": {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8,
                                               "patch_size": None}},
    "timm": {"embed_dim": 16, "vision_cfg": {**_TIMM, "timm_model_name": "resnet10t", "timm_pool": "",
                                             "timm_proj": "linear", "image_size": 64}},
    "siglip": {"embed_dim": 64, "custom_text": True,
               "vision_cfg": {**_TIMM, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none",
                              "image_size": 160}},
    "rope": {"embed_dim": 16, "vision_cfg": {**_TIMM, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "avg",
                                             "timm_proj": "linear", "image_size": 224}},
    "coca": {"embed_dim": 16, "vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_heads": 2,
                                             "attn_pooler_queries": 4, "output_tokens": True},
             "multimodal_cfg": {**_TEXT}},
}  # fmt: skip
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def write_checkpoint(name: str, folder: Path) -> torch.nn.Module:
    """Write one of `TOWERS` as open_clip would, and return the model."""
    import open_clip

    torch.manual_seed(0)
    cfg = {
        **TOWERS[name],
        "text_cfg": {**_TEXT, **({"embed_cls": True, "output_tokens": True} if name == "coca" else {})},
    }
    model_class = open_clip.CoCa if name == "coca" else open_clip.CustomTextCLIP if name == "siglip" else open_clip.CLIP
    model = model_class(**{key: value for key, value in cfg.items() if key != "custom_text"}).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _write(cfg, SIGLIP if name == "siglip" else {}, model.state_dict(), folder)
    return model


def write_vit(folder: Path) -> CLIPVisionModel:
    """Write a ViT's checkpoint without open_clip, by renaming the weights of the model that is returned."""

    torch.manual_seed(0)
    cfg = {**TOWERS["vit"], "text_cfg": _TEXT}
    model = CLIPVisionModel(open_clip_vision_config(cfg)).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        state[f"visual.{name}"] = tensor
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    state["visual.proj"], state["logit_scale"] = torch.randn(32, 16), torch.tensor(2.0)
    _write(cfg, {}, state, folder)
    return model


_NAMES = (("embeddings.position_embedding.weight", "positional_embedding"), ("embeddings.patch_embedding", "conv1"),
          ("embeddings.class_embedding", "class_embedding"), ("pre_layrnorm", "ln_pre"),
          ("post_layernorm", "ln_post"), ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
          ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))  # fmt: skip


def _write(cfg: dict[str, Any], preprocess: dict[str, Any], state: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
