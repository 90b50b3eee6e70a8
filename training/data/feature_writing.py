"""Writes the shards of a feature cache: each image is read once, hashed and encoded."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.hub import resolve_revision

from modeling_fromage.backbone_loading_fromage import load_backbone
from modeling_fromage.file_writing_fromage import replace_file
from modeling_fromage.images_fromage import UnreadableImageError, is_url, load_rgb_image
from modeling_fromage.io.fetching import fetch
from modeling_fromage.trainer.ret_states import as_stored
from modeling_fromage.vision_fromage import check_vision_model, pool_vision_output
from modeling_fromage.vision_libraries_fromage import load_image_processor, split_library

from .feature_cache import (
    MANIFEST,
    ImageRecord,
    check_images,
    describe,
    differences,
    images_of,
    is_whole,
    name_of,
    place_of,
    read_manifest,
    record_tensors,
    shard_name,
    source_digest,
)

Batch = tuple[torch.Tensor, list[ImageRecord]]


@dataclass
class VisionEncoder:
    """A frozen vision encoder with its preprocessing, and where it came from."""

    name: str
    revision: str | None
    library: str
    pooling: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor

    @classmethod
    def from_pretrained(cls, name: str, pooling: str, dtype: str = "float32", device: str = "cpu") -> "VisionEncoder":
        """Load an encoder and its image processor, both at the same commit. `name` as in training: a Hub id, a folder,
        or a checkpoint of open_clip."""
        library, own_name = split_library(name)
        revision = resolve_revision(own_name)
        image_processor = load_image_processor(name, revision=revision)
        kwargs = {"revision": revision, "dtype": dtype}
        model = load_backbone("vision", own_name, kwargs, pooling, library).to(device).eval()
        check_vision_model(model, pooling)
        return cls(own_name, getattr(revision, "resolved", revision), library, pooling, model, image_processor)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Pixel values `(N, num_channels, height, width)` and records of N rows. Runs in the loader's workers."""
        images, records = zip(*(read_image(row["image"]) for row in rows), strict=True)
        return self.image_processor(list(images), return_tensors="pt")["pixel_values"], list(records)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pooled features `(N, vision_width)` of `pixels`, on the CPU."""
        output = self.model(pixels.to(self.model.device, self.model.dtype), return_dict=True)
        return pool_vision_output(output, self.pooling, self.name, pixels).cpu()


def read_image(image: Any) -> tuple[Image.Image, ImageRecord]:
    """Read an image once: as RGB, with the record of exactly the bytes that were decoded.

    Raises:
        UnreadableImageError: The image is missing or cannot be decoded.
    """
    place, mtime_ns = place_of(image), 0
    if place is None:
        contents = image["bytes"]
    elif is_url(place):
        contents = fetch(place)
    else:
        try:
            found = os.stat(place)  # before reading, so that a later write changes the recorded time
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImageError(place, "not a regular file")
            mtime_ns = found.st_mtime_ns
            contents = Path(place).read_bytes()
        except OSError as error:
            raise UnreadableImageError(place, error.strerror) from error
    rgb = load_rgb_image({"bytes": contents, "path": name_of(image)})
    return rgb, ImageRecord(hashlib.sha256(contents).digest(), len(contents), mtime_ns, source_digest(place))


def write_features(
    encoder: VisionEncoder,
    dataset: Dataset,
    directory: str | Path,
    shard_size: int = 8192,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Write the shards of this rank that are missing.

    Args:
        encoder: The frozen vision encoder.
        dataset: The dataset to encode, with a column `image`.
        directory: Folder of the cache; made if needed.
        shard_size: Images per file.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images.
        rank, world_size: This process writes every `world_size`-th shard, starting with shard `rank`.

    Returns:
        The number of shards written.

    Raises:
        ValueError: `directory` has features of another encoder or other images, an image cannot be read, or its
            features are not finite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    about = describe(encoder.name, encoder.revision, encoder.library, encoder.pooling, encoder.image_processor, dataset)
    _write_manifest(directory, {**about, "shard_size": shard_size})
    starts = range(rank * shard_size, len(dataset), world_size * shard_size)
    shards = {start: dataset.select(range(start, min(len(dataset), start + shard_size))) for start in starts}
    paths = {start: directory / shard_name(start // shard_size) for start in starts}
    missing = [start for start in starts if not is_whole(paths[start], len(shards[start]))]
    for start in sorted(set(starts) - set(missing)):
        check_images(images_of(shards[start]), paths[start], start)
    for start in tqdm(missing, desc="Encoding shards", disable=rank > 0):
        loader = DataLoader(shards[start], batch_size=batch_size, collate_fn=encoder.collate, num_workers=num_workers)
        progress = tqdm(loader, desc="Encoding images", leave=False, disable=rank > 0)
        features, records = _encode_shard(encoder, shards[start], progress, start)
        replace_file(paths[start], save({"features": as_stored(features), **record_tensors(records)}))
    return len(missing)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or compare it with the one that is there.

    Raises:
        ValueError: They differ.
    """
    path = directory / MANIFEST
    if not path.is_file():
        replace_file(path, json.dumps(manifest, indent=1).encode())
    elif found := differences(manifest, read_manifest(directory)):
        raise ValueError(f"{directory} already has features with {'; '.join(found)}. Give another folder.")


def _encode_shard(
    encoder: VisionEncoder, rows: Dataset, batches: Iterable[Batch], first: int
) -> tuple[torch.Tensor, list[ImageRecord]]:
    """Features `(len(rows), vision_width)` and records of a shard whose first image has number `first`.

    Raises:
        ValueError: Features are not finite.
    """
    features, records = [], []
    for pixels, batch_records in batches:
        pooled = encoder.encode(pixels)
        if not (finite := pooled.isfinite().all(-1)).all():
            row = len(records) + int((~finite).nonzero()[0])
            raise ValueError(
                f"The features of image {first + row}, {name_of(rows[row]['image'])}, are not finite in "
                f"{str(pooled.dtype).removeprefix('torch.')}. Leave the image out, or encode with dtype=float32."
            )
        features.append(pooled)
        records += batch_records
    return torch.cat(features), records
