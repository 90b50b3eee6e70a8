"""Cached features of a frozen vision encoder: what they depend on, and a data set that reads them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open

from modeling_fromage.fingerprint_fromage import fingerprint, weight_files

MANIFEST = "manifest.json"


def describe(
    vision_model: str, revision: str | None, pooling: str, image_processor, dataset: Dataset
) -> dict[str, Any]:
    """What features depend on: the encoder's weights and pooling, its preprocessing, and the images' names in order."""
    images = hashlib.sha256()
    for image in dataset["image"]:
        name = image if isinstance(image, str) else image["path"] or hashlib.sha256(image["bytes"]).hexdigest()
        images.update(Path(name).name.encode() + b"\0")
    preprocessing = {key: value for key, value in image_processor.to_dict().items() if key != "auto_map"}
    prints = fingerprint(weight_files(vision_model, revision, None, None))
    return {
        "vision_model": vision_model,
        "vision_model_revision": revision,
        "vision_model_weights": {name: known["sha256"] for name, known in prints.items()},
        "vision_pooling": pooling,
        "preprocessing": json.loads(json.dumps(preprocessing, default=str)),
        "num_images": len(dataset),
        "images": images.hexdigest(),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In words; the same weights may lie under another name."""
    names = [name for name in ours if name not in ("vision_model", "vision_model_revision")]
    return [f"{name} {theirs.get(name)!r}, not {ours[name]!r}" for name in names if theirs.get(name) != ours[name]]


class CachedFeatures(torch.utils.data.Dataset):
    """A data set of captions whose images are their cached features, read from disk a row at a time.

    Args:
        dataset: The data set that was encoded, with a column `caption`.
        directory: What `training.cache_features` wrote.
        expected: [`describe`] of the encoder that the features are for.

    Raises:
        ValueError: The cache is of another encoder or other images, or not complete.
    """

    def __init__(self, dataset: Dataset, directory: str | Path, expected: dict[str, Any]):
        self.captions, self.directory = dataset.select_columns(["caption"]), Path(directory)
        if not (self.directory / MANIFEST).is_file():
            raise ValueError(
                f"{directory} is no feature cache: it has no {MANIFEST}. Run training.cache_features first."
            )
        manifest = json.loads((self.directory / MANIFEST).read_text(encoding="utf-8"))
        if found := differences(expected, manifest):
            raise ValueError(
                f"The feature cache {directory} is of another encoder or other images: it has {'; '.join(found)}. "
                "Encode yours into another folder with training.cache_features."
            )
        self.shard_size = manifest["shard_size"]
        shards = -(-len(dataset) // self.shard_size)
        if missing := [i for i in range(shards) if not is_whole(self.directory / shard_name(i))]:
            raise ValueError(
                f"The feature cache {directory} lacks {len(missing)} of its {shards} shards, the first of them "
                f"{shard_name(missing[0])}. Run training.cache_features again to complete it."
            )
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = divmod(index, self.shard_size)
        if shard not in self._open:
            self._open[shard] = safe_open(self.directory / shard_name(shard), "pt").get_slice("features")
        return {"pooled_image_features": self._open[shard][row], "caption": self.captions[index]["caption"]}

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}  # every loader's process opens files of its own


def shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "features" in file.keys()  # noqa: SIM118 (a method of safetensors)
    except (OSError, SafetensorError):
        return False


def with_cached_features(dataset: Dataset, directory: str, model, processor) -> CachedFeatures:
    """`dataset` with the features in `directory`, which must be those of `model`'s own encoder and preprocessing."""
    config = model.config
    expected = describe(
        config.vision_model_id, config.vision_model_revision, config.vision_pooling, processor.image_processor, dataset
    )
    return CachedFeatures(dataset, directory, expected)
