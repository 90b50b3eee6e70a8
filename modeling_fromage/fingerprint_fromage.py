"""Telling models apart: the trained parts by a digest, a frozen backbone by its weight files, without reading them
whole."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .configuration_fromage import FromageConfig
from .vision_open_clip import WEIGHT_FILES as OPEN_CLIP_WEIGHTS

_BLOCK = 1 << 16
_BLOCKS = 8  # sampled of each file, evenly spaced, the first and the last among them


def weight_files(
    name: str,
    revision: str | None,
    library: str = "transformers",
    gguf_file: str | None = None,
    cache_dir: str | None = None,
) -> list[Path]:
    """The weight files that a backbone was loaded from: in a folder, or in the Hub's cache (no download)."""

    def find(filename: str) -> Path | None:
        if os.path.isdir(name):
            return path if (path := Path(name, filename)).is_file() else None
        cached = try_to_load_from_cache(name, filename, cache_dir=cache_dir, revision=revision)
        return Path(cached) if isinstance(cached, str) else None

    if library == "open_clip":
        return list(filter(None, map(find, OPEN_CLIP_WEIGHTS)))[:1]
    for single, index in (
        (gguf_file or SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if path := find(single):
            return [path]
        if path := find(index):
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return [shard for shard in map(find, shards) if shard]
    return []


def fingerprint(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Name -> `{"size", "sha256", "sample"}`: bytes, the file's digest, and a digest of a few blocks of it.

    A file of the Hub's cache is named by its digest, so that it need not be read.
    """
    prints = {}
    for path in files:
        blob = path.resolve().name
        if not re.fullmatch("[0-9a-f]{64}", blob):
            with open(path, "rb") as file:
                blob = hashlib.file_digest(file, "sha256").hexdigest()
        prints[path.name] = {"size": path.stat().st_size, "sha256": blob, "sample": _sample(path)}
    return prints


def check_fingerprint(files: list[Path], expected: dict[str, dict[str, Any]], role: str, name: str) -> None:
    """Compare sizes and sampled blocks, in milliseconds.

    Raises:
        ValueError: A file is missing or is another one than that with which the trained parts were trained.
    """
    found = {path.name: path for path in files}
    for filename, known in expected.items():
        path = found.get(filename)
        if path is None:
            problem = f"has no file {filename}"
        elif (size := path.stat().st_size) != known["size"]:
            problem = f"has a {filename} of {size} bytes, not {known['size']}"
        elif _sample(path) != known["sample"]:
            problem = f"has a {filename} with other contents"
        else:
            continue
        raise ValueError(
            f"The {role} {name!r} {problem}: the trained parts of this checkpoint belong to another {role} of that "
            f"name. Restore it, or pass `{role.split()[0].replace('language', 'text')}_model_fingerprint={{}}` to load "
            "what is there all the same."
        )


def trained_fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Digest of the trained tensors by name, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def with_feature_layer(digest: str, config: FromageConfig) -> str:
    """The digest, and behind it the encoder's layer that images' embeddings are of, where that is not its last."""
    is_last = config.vision_feature_layer == -1 or config.vision_pooling == "pooler"
    return digest if is_last else f"{digest}-layer{config.vision_feature_layer}"


class TrainedFingerprint:
    """The digest of a model's trained tensors, taken anew when one of them has changed."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._fingerprint = ""

    def of(self, state: dict[str, torch.Tensor]) -> str:
        """[`trained_fingerprint`] of `state`."""
        if self._tensors.keys() == state.keys() and self._tensors:
            # Compared with a copy: 5 ms at the paper's shapes on a CPU, and unlike `_version` it sees edits of `.data`.
            known = {name: tensor.to(state[name]) for name, tensor in self._tensors.items()}
            if all(torch.equal(tensor, known[name]) for name, tensor in state.items()):
                self._tensors = known  # on the device where it is asked for
                return self._fingerprint
        self.remember(state, trained_fingerprint(state))
        return self._fingerprint

    def remember(self, state: dict[str, torch.Tensor], fingerprint: str) -> None:
        """Let `fingerprint` be that of `state`, until it changes."""
        self._tensors, self._fingerprint = {name: tensor.clone() for name, tensor in state.items()}, fingerprint


def _sample(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
