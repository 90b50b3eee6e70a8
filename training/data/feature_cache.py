"""Cached features of a frozen vision encoder: the files, what they depend on, and a dataset that reads them.

A shard contains the features of its images and a record of each image: the SHA-256 and size of its contents, the
modification time of its file, and a digest of its path or URL. One that was written with `on_bad_example: skip` also
says which of its rows are valid, and in its metadata what is wrong with the others.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers import BaseImageProcessor

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.fingerprint_fromage import fingerprint, weight_files
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.images_fromage import UnreadableImageError, is_url
from modeling_fromage.trainer.bad_examples import BadExampleError

MANIFEST = "manifest.json"
DIGESTS = "sha256"
REMAKE = "Encode yours into another folder: `fromage cache-features CONFIG.yaml DIR`."


class ImageRecord(NamedTuple):
    """Identifies an image.

    Attributes:
        sha256: Digest (32 bytes) of the image's bytes.
        size: Number of bytes.
        mtime_ns: Modification time of the file; 0 for an image that is not a file.
        source: Digest (16 bytes) of the absolute path or URL; that of an empty text for an image inside the dataset.
    """

    sha256: bytes
    size: int
    mtime_ns: int
    source: bytes

    def is_of(self, image: Any) -> bool:
        """Whether `image` is the recorded one.

        A file is read only if its path or modification time differs. URLs, and paths of files that no longer exist,
        are compared by name.
        """
        place = place_of(image)
        if place is None:
            return hashlib.sha256(image["bytes"]).digest() == self.sha256
        same_source = source_digest(place) == self.source
        if is_url(place):
            return same_source
        try:
            found = os.stat(place)
        except FileNotFoundError:
            return same_source
        if found.st_size != self.size:
            return False
        if same_source and found.st_mtime_ns == self.mtime_ns:
            return True
        with open(place, "rb") as file:
            return hashlib.file_digest(file, DIGESTS).digest() == self.sha256


def place_of(image: Any) -> str | None:
    """The absolute path or URL of a dataset's image; `None` if the dataset contains its bytes.

    Raises:
        UnreadableImageError: It has neither bytes nor a path.
    """
    image = image or {}
    if isinstance(image, dict):
        if image.get("bytes"):
            return None
        if not image.get("path"):
            raise UnreadableImageError("in memory", "no image", "neither bytes nor a path")
        image = image["path"]
    return image if is_url(image) else os.path.abspath(image)


def name_of(image: Any) -> str:
    """The name of an image in messages."""
    return (place_of(image) or str(image.get("path") or "in memory"))[:200]


def source_digest(place: str | None) -> bytes:
    return hashlib.blake2b(os.fsencode(place or ""), digest_size=16).digest()


def record_tensors(records: list[ImageRecord]) -> dict[str, torch.Tensor]:
    """Records of N images as tensors: `sha256` (N, 32), `size` (N,), `mtime_ns` (N,) and `source` (N, 16)."""
    sha256, sizes, times, sources = zip(*records, strict=True)
    return {
        "sha256": torch.frombuffer(bytearray(b"".join(sha256)), dtype=torch.uint8).view(len(records), -1),
        "size": torch.tensor(sizes, dtype=torch.int64),
        "mtime_ns": torch.tensor(times, dtype=torch.int64),
        "source": torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8).view(len(records), -1),
    }


def read_records(shard: Path) -> Iterator[ImageRecord]:
    with safe_open(shard, "pt") as file:
        sha256, sizes, times, sources = (file.get_tensor(name) for name in ImageRecord._fields)
    for digest, size, time, source in zip(sha256.numpy(), sizes.tolist(), times.tolist(), sources.numpy(), strict=True):
        yield ImageRecord(digest.tobytes(), size, time, source.tobytes())


class Problem(NamedTuple):
    """What is wrong with an image.

    Attributes:
        reason: A few words, the same for the same cause.
        detail: Of this image alone.
        place: Where the example stands, if it says so.
    """

    reason: str
    detail: str
    place: str | None


def read_problems(shard: Path) -> dict[int, Problem]:
    """What is wrong with the rows of a shard that are not valid, by their number."""
    with safe_open(shard, "pt") as file:
        if "valid" not in file.keys():  # noqa: SIM118 (no mapping)
            return {}
        known = json.loads((file.metadata() or {}).get("problems", "{}"))
        rows = (file.get_tensor("valid") == 0).nonzero().flatten().tolist()
    return {row: Problem(*known.get(str(row), ("bad image", "", None))) for row in rows}


def images_of(dataset: Dataset) -> Iterator[Any]:
    for batch in dataset.select_columns(["image"]).iter(1024):
        yield from batch["image"]


def check_images(images: Iterable[Any], shard: Path, first: int) -> None:
    """Check that the images, from number `first` on, are those that `shard` was made from; bad ones left no trace.

    Raises:
        ValueError: An image is another one.
    """
    problems = read_problems(shard)
    for number, (image, record) in enumerate(zip(images, read_records(shard), strict=False), start=first):
        if number - first not in problems and not record.is_of(image):
            raise ValueError(
                f"The feature cache {shard.parent} is of other images: image {number}, {name_of(image)}, is not "
                f"that of {shard.name}. {REMAKE}"
            )


def describe(
    vision_model: str,
    revision: str | None,
    library: str,
    vector: ImageVector,
    image_processor: BaseImageProcessor,
    dataset: Dataset,
) -> dict[str, Any]:
    """Everything that the features depend on, except the images themselves, which have records in the shards."""
    preprocessing = {key: value for key, value in image_processor.to_dict().items() if key != "auto_map"}
    prints = fingerprint(weight_files(vision_model, revision, library))
    return {
        "vision_model": vision_model,
        "vision_model_revision": revision,
        "vision_model_weights": {name: known["sha256"] for name, known in prints.items()},
        "vision_pooling": str(vector),
        "preprocessing": json.loads(json.dumps(preprocessing, default=str)),
        "num_images": len(dataset),
        "image_digests": DIGESTS,
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ValueError: The cache was written by an earlier version, which kept no image digests.
    """
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("image_digests") != DIGESTS:
        raise ValueError(
            f"The feature cache {directory} is of an earlier version, which knew images by their names alone: another "
            f"picture of the same name would pass for its own. {REMAKE}"
        )
    return manifest


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Differences between two manifests, for a message. The same weights may have another name or revision."""
    names = [name for name in ours if name not in ("vision_model", "vision_model_revision")]
    return [f"{name} {theirs.get(name)!r}, not {ours[name]!r}" for name in names if theirs.get(name) != ours[name]]


class CachedFeatures(torch.utils.data.Dataset):
    """A dataset of captions with cached image features, read from disk row by row.

    Opening it compares every image with the one that was encoded: a file by path, size and modification time, and by
    contents if path or time differ, so that moved or copied images are accepted; an image inside the dataset by
    contents; a URL, or a file that no longer exists, by name.

    Args:
        dataset: The dataset that was encoded, with columns `image` and `caption`.
        directory: The folder that `fromage cache-features` wrote.
        expected: [`describe`] of the encoder that the features are for.

    Raises:
        ValueError: The cache belongs to another encoder or other images, or is incomplete.
        BadExampleError: A `ValueError`. When a row is read: its image was bad, or its features are not finite.
    """

    def __init__(self, dataset: Dataset, directory: str | Path, expected: dict[str, Any]):
        self.captions = dataset.select_columns([name for name in dataset.column_names if name != "image"])
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            raise ValueError(
                f"{directory} is no feature cache: it has no {MANIFEST}. Run `fromage cache-features` first."
            )
        manifest = read_manifest(self.directory)
        if found := differences(expected, manifest):
            raise ValueError(
                f"The feature cache {directory} is of another encoder or other images: it has {'; '.join(found)}. "
                f"{REMAKE}"
            )
        self.shard_size = manifest["shard_size"]
        starts = range(0, len(dataset), self.shard_size)
        counts = [min(self.shard_size, len(dataset) - start) for start in starts]
        if missing := [i for i, count in enumerate(counts) if not is_whole(self.directory / shard_name(i), count)]:
            raise ValueError(
                f"The feature cache {directory} lacks {len(missing)} of its {len(starts)} shards, the first of them "
                f"{shard_name(missing[0])}. Run `fromage cache-features` again to complete it."
            )
        images = images_of(dataset)
        for number, start in enumerate(starts):
            check_images(islice(images, counts[number]), self.directory / shard_name(number), start)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = divmod(index, self.shard_size)
        shard = self.directory / shard_name(number)
        if number not in self._open:
            self._open[number] = safe_open(shard, "pt").get_slice("features"), read_problems(shard)
        stored, problems = self._open[number]
        if row in problems:
            raise BadExampleError(*problems[row])
        features = stored[row]
        if not features.isfinite().all():
            raise BadExampleError(
                "features not finite",
                f"the features in row {row} of {shard}, of image {index}, are not finite. Remove the file and run "
                "`fromage cache-features` again.",
            )
        return {**self.captions[index], "pooled_image_features": features}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each loader worker opens the files itself


def shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def is_whole(path: Path, count: int) -> bool:
    """Whether `path` contains features and records of `count` images."""
    try:
        with safe_open(path, "pt") as file:
            names = {"features", *ImageRecord._fields, *file.keys()}
            return all(file.get_slice(name).get_shape()[0] == count for name in names)
    except (OSError, SafetensorError):
        return False


def with_cached_features(
    dataset: Dataset, directory: str, model: FromageForConditionalGeneration, processor: FromageProcessor
) -> CachedFeatures:
    """`dataset` with the features in `directory`, which must come from `model`'s encoder and preprocessing."""
    config = model.config
    expected = describe(
        config.vision_model_id,
        config.vision_model_revision,
        config.vision_model_library,
        ImageVector.of(config),
        processor.image_processor,
        dataset,
    )
    return CachedFeatures(dataset, directory, expected)
