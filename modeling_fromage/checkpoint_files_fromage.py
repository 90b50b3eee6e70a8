"""The weight files of a checkpoint: found, and read for what was trained."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .peft_layers_fromage import names_without_peft

TRAINED_PREFIX = "adapter."
LOGIT_SCALE = "adapter.logit_scale"  # of shape (), and in files also (1,), which some ways of sharding need


def load_trained_parts(adapter: nn.Module, files: list[Path]) -> None:
    """Fill `adapter` from `files`, in fp32; raise a `ValueError` unless names and shapes are just its own."""
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors.update({key: opened.get_tensor(key) for key in opened.keys() if key.startswith(TRAINED_PREFIX)})  # noqa: SIM118
    own = names_without_peft(adapter, adapter.state_dict())  # PEFT may have wrapped some of its layers
    expected = {f"{TRAINED_PREFIX}{key}": tensor.shape for key, tensor in own.items()}
    if LOGIT_SCALE in tensors and tensors[LOGIT_SCALE].shape == (1,):
        tensors[LOGIT_SCALE] = tensors[LOGIT_SCALE][0]
    problems = [f"{key} is missing" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"{key} is unknown" for key in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(shape)}"
        for key, shape in sorted(expected.items())
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        raise ValueError(
            f"The trained parts in {files[0].parent} do not fit the configuration beside them: {'; '.join(problems)}."
        )
    check_finite({key: tensors[key] for key in expected}, files[0].parent)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[f"{TRAINED_PREFIX}{key}"])


def take_scale_of_shape_1(adapter: nn.Module, mismatched: set[Any], files: list[Path]) -> set[Any]:
    """Fill `adapter` where its scale is the tensor that transformers found `mismatched`, and return the others."""
    others = {entry for entry in mismatched if (entry[0], *entry[1]) != (LOGIT_SCALE, 1)}
    if len(others) < len(mismatched):
        load_trained_parts(adapter, files)
    return others


def check_finite(tensors: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Raise a `ValueError` where trained tensors hold NaN or infinities."""
    broken = sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    if broken:
        raise ValueError(
            f"Trained tensors in {source} hold NaN or infinite values: {', '.join(broken[:8])}. The run that wrote "
            "them diverged: load an earlier checkpoint of it."
        )


def weight_files_of(name: str | os.PathLike, variant: str | None, hub_kwargs: dict[str, Any]) -> list[Path]:
    """The checkpoint's safetensors files; none of another format, or where transformers is to say what is wrong."""
    single, index = (_add_variant(weights, variant) for weights in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if path := _find(name, single, hub_kwargs):
        return [path]
    if path := _find(name, index, hub_kwargs):
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        return [shard for shard in (_find(name, shard, hub_kwargs) for shard in sorted(shards)) if shard]
    return []


def _add_variant(filename: str, variant: str | None) -> str:
    return filename.replace(".safetensors", f".{variant}.safetensors") if variant else filename


def _find(name: str | os.PathLike, filename: str, hub_kwargs: dict[str, Any]) -> Path | None:
    try:
        path = cached_file(name, filename, **hub_kwargs)
    except OSError:
        return None
    return None if path is None else Path(path)


def tensor_names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
