"""Writes the shards of a feature cache: each image is read once, hashed and encoded."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.images_fromage import UnreadableImageError, is_url, load_rgb_image
from modeling_fromage.io.fetching import fetch
from modeling_fromage.trainer.bad_example_list import BadExampleList
from modeling_fromage.trainer.bad_examples import (
    BadExampleError,
    TooManyBadExamplesError,
    as_bad,
    example_place,
    refuse_too_many,
)
from modeling_fromage.trainer.ret_states import as_stored
from modeling_fromage.vision_fromage import check_vision_model
from modeling_fromage.vision_libraries_fromage import load_image_processor, split_library

from .feature_cache import (
    MANIFEST,
    ImageRecord,
    Problem,
    check_images,
    describe,
    differences,
    images_of,
    is_whole,
    name_of,
    place_of,
    read_manifest,
    read_problems,
    record_tensors,
    shard_name,
    source_digest,
)


class ReadImage(NamedTuple):
    """A row of the dataset, read: its image, `None` where there is a problem with it."""

    image: Image.Image | None
    record: ImageRecord
    place: str | None = None
    problem: Problem | None = None


class Batch(NamedTuple):
    """N rows: the pixel values of those with an image, their records, and their problems."""

    pixels: torch.Tensor | None
    records: list[ImageRecord]
    problems: list[Problem | None]


@dataclass
class VisionEncoder:
    """A frozen vision encoder with its preprocessing, and where it came from."""

    name: str
    revision: str | None
    library: str
    vector: ImageVector
    model: PreTrainedModel
    image_processor: BaseImageProcessor

    @classmethod
    def from_pretrained(
        cls, name: str, vector: ImageVector, dtype: str = "float32", device: str = "cpu"
    ) -> "VisionEncoder":
        """Load an encoder and its image processor, both at the same commit. `name` as in training: a Hub id, a folder,
        or a checkpoint of open_clip."""
        library, own_name = split_library(name)
        revision = resolve_revision(own_name)
        image_processor = load_image_processor(name, revision=revision)
        kwargs = {"revision": revision, "dtype": dtype}
        model = load_backbone("vision", own_name, kwargs, vector.pooling, library).to(device).eval()
        check_vision_model(model, vector)
        return cls(own_name, getattr(revision, "resolved", revision), library, vector, model, image_processor)

    def collate(self, rows: list[ReadImage], skips: bool) -> Batch:
        """Preprocess N rows. Runs in the loader's workers."""
        try:
            pixels = self._pixels([row.image for row in rows if row.image is not None])
        except Exception:  # whatever it raises for a picture
            if not skips:
                raise
            rows = [self._checked(row) for row in rows]
            pixels = self._pixels([row.image for row in rows if row.image is not None])
        return Batch(pixels, [row.record for row in rows], [row.problem for row in rows])

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor | None:
        return self.image_processor(images, return_tensors="pt")["pixel_values"] if images else None

    def _checked(self, row: ReadImage) -> ReadImage:
        try:
            self._pixels([] if row.image is None else [row.image])
        except Exception as error:
            problem = Problem("image processor raises", f"{type(error).__name__}: {error}", row.place)
            return row._replace(image=None, problem=problem)
        return row

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pooled features `(N, vision_width)` of `pixels`, on the CPU."""
        return self.vector.encode(self.model, pixels.to(self.model.device, self.model.dtype))[1].cpu()

    def encode_blank(self) -> torch.Tensor:
        """The features (1, vision_width) of a white picture."""
        white = self.image_processor([Image.new("RGB", (64, 64), "white")], return_tensors="pt")
        return self.encode(white["pixel_values"])


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


class ReadImages(torch.utils.data.Dataset):
    """The images of a dataset, read. With `skips` there is a problem where one cannot be; without, it raises."""

    def __init__(self, rows: Any, skips: bool):
        self.rows, self.skips = rows, skips

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ReadImage:
        row: dict[str, Any] = {}
        try:
            row = self.rows[index]
            return ReadImage(*read_image(row["image"]), example_place(row))
        except Exception as error:  # whatever a data set or a decoder raises for this row
            if not self.skips:
                raise
            place, problem = example_place(row), row.get("problem")
            known = BadExampleError("malformed row", problem) if problem else as_bad(error)
            unread = ImageRecord(bytes(32), 0, 0, source_digest(None))
            return ReadImage(None, unread, place, Problem(known.reason, known.detail, place))


def write_features(
    encoder: VisionEncoder,
    dataset: Dataset,
    directory: str | Path,
    shard_size: int = 8192,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_bad_share: float | None = None,
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
        max_bad_share: With it, an image that cannot be read or encoded costs its row alone: shards say which rows are
            valid. Once all are there, the manifest has the number of bad images, and `_bad_examples.jsonl` lists them.
            A process judges by its own images and by the shards that others have finished.

    Returns:
        The number of shards written.

    Raises:
        ValueError: `directory` has features of another encoder or other images; without `max_bad_share`, an image
            cannot be read, or its features are not finite.
        TooManyBadExamplesError: A `ValueError`. More of the images are bad than `max_bad_share`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    about = describe(encoder.name, encoder.revision, encoder.library, encoder.vector, encoder.image_processor, dataset)
    _write_manifest(directory, {**about, "shard_size": shard_size})
    starts = range(rank * shard_size, len(dataset), world_size * shard_size)
    shards = {start: dataset.select(range(start, min(len(dataset), start + shard_size))) for start in starts}
    paths = {start: directory / shard_name(start // shard_size) for start in starts}
    missing = [start for start in starts if not is_whole(paths[start], len(shards[start]))]
    skips = max_bad_share is not None
    for start in sorted(set(starts) - set(missing)):
        check_images(images_of(shards[start]), paths[start], start)
    share = BadShare(directory, max_bad_share, shard_size, len(dataset), missing) if skips else None
    for start in tqdm(missing, desc="Encoding shards", disable=rank > 0):
        loader = DataLoader(
            ReadImages(shards[start], skips), batch_size=batch_size, num_workers=num_workers,
            collate_fn=partial(encoder.collate, skips=skips),
        )  # fmt: skip
        progress = tqdm(loader, desc="Encoding images", leave=False, disable=rank > 0)
        replace_file(paths[start], _encode_shard(encoder, shards[start], progress, start, share))
        if share is not None:
            share.add_finished()
    if share is not None:
        share.finish()
    return len(missing)


class BadShare:
    """Judges how many of the images so far are bad, and lists them in the end: of the images that this process encodes,
    and of the shards that earlier runs and other processes have finished.

    Args:
        directory: Folder of the cache.
        most: `max_bad_share`.
        shard_size, count: Images in a shard, and in all.
        own: First images of the shards that this process encodes.

    Raises:
        TooManyBadExamplesError: Too many of the images of the finished shards are bad.
    """

    def __init__(self, directory: Path, most: float, shard_size: int, count: int, own: list[int]):
        self.directory, self.most, self.shard_size, self.count = directory, most, shard_size, count
        self.found = BadExampleList(directory)
        self.seen = self.bad = 0
        self._others = sorted({*range(0, count, shard_size)} - {*own})
        self.add_finished()

    def add_finished(self) -> None:
        """Add the shards that others have finished since.

        Raises:
            TooManyBadExamplesError: Too many of the images so far are bad.
        """
        for start in list(self._others):
            shard = self.directory / shard_name(start // self.shard_size)
            size = min(self.shard_size, self.count - start)
            if is_whole(shard, size):
                self._others.remove(start)
                known = read_problems(shard)
                self.add(start, [known.get(row) for row in range(size)])

    def add(self, first: int, problems: list[Problem | None]) -> None:
        """Add images, from number `first` on.

        Raises:
            TooManyBadExamplesError: Too many of the images so far are bad.
        """
        self.seen += len(problems)
        for number, problem in enumerate(problems, start=first):
            if problem is not None:
                self.bad += 1
                self.found.add({"split": "train", "number": number, **problem._asdict()})
        try:
            refuse_too_many(self.bad, self.seen, self.most, self.count, "images that were read so far")
        except TooManyBadExamplesError as error:
            raise TooManyBadExamplesError(self.found.why_stopped(str(error))) from None

    def finish(self) -> None:
        """Write the list of bad images and put their number into the manifest, once all shards are there: the last
        process finds that they are."""
        if not self._others:
            self.found.write()
            manifest = {**read_manifest(self.directory), "num_bad_images": self.bad}
            replace_file(self.directory / MANIFEST, json.dumps(manifest, indent=1).encode())


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
    encoder: VisionEncoder, rows: Dataset, batches: Iterable[Batch], first: int, share: BadShare | None
) -> bytes:
    """The file of a shard whose first image has number `first`: features `(len(rows), vision_width)` and records; with
    `share`, which rows are valid (those of others are 0).

    Raises:
        ValueError: Without `share`, features are not finite.
    """
    features: list[torch.Tensor] = []
    records: list[ImageRecord] = []
    problems: list[Problem | None] = []
    encoded: list[int] = []  # the rows that have features
    for batch in batches:
        good = [row for row, problem in enumerate(batch.problems, start=len(problems)) if problem is None]
        records += batch.records
        problems += batch.problems
        if batch.pixels is not None:
            pooled = encoder.encode(batch.pixels)
            for row in (~pooled.isfinite().all(-1)).nonzero().flatten().tolist():
                name, dtype = name_of(rows[good[row]]["image"]), str(pooled.dtype).removeprefix("torch.")
                if share is None:
                    raise ValueError(
                        f"The features of image {first + good[row]}, {name}, are not finite in {dtype}. Leave the "
                        "image out, or encode with dtype=float32."
                    )
                place = example_place(rows[good[row]])
                problems[good[row]] = Problem("features not finite", f"{name}, in {dtype}", place)
                pooled[row] = 0
            features.append(pooled)
            encoded += good
        if share is not None:
            before = len(problems) - len(batch.problems)
            share.add(first + before, problems[before:])
    if share is None:
        return save({"features": as_stored(torch.cat(features)), **record_tensors(records)})
    stored = as_stored(torch.cat(features) if features else encoder.encode_blank()[:0])
    whole = stored.new_zeros(len(problems), stored.shape[1])
    whole[encoded] = stored
    valid = torch.tensor([problem is None for problem in problems], dtype=torch.uint8)
    told = json.dumps({row: problem for row, problem in enumerate(problems) if problem is not None})
    return save({"features": whole, "valid": valid, **record_tensors(records)}, {"problems": told})
