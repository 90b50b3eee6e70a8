"""Run the frozen vision encoder once over a data set: `python -m training.cache_features CONFIG.yaml DIR`.

Takes the files of `training.train` and encodes their `train_data` (with `--eval`, their `eval_data`). DIR gets shards
of pooled features, 2 KB for 1,024 of them in fp16 (where that does not hold a shard's values, they stay in the dtype of
the encoder), each with the digests of its images, and a manifest of what they depend on. Where a training file says
`feature_cache: DIR`, `training.train` takes the features from there, and refuses those of another encoder, of other
preprocessing or of other images. A shard appears whole or not at all; the same command again does what is missing.
Several processes share the work: under `torchrun`, or with `--rank` and `--world-size`.
"""

import argparse
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor
from transformers.utils.hub import resolve_revision

from modeling_fromage.backbone_loading_fromage import load_backbone
from modeling_fromage.backbones_fromage import pool_vision_output
from modeling_fromage.file_writing_fromage import replace_file
from modeling_fromage.images_fromage import UnreadableImageError, is_url, load_rgb_image
from modeling_fromage.io.command_line import at_least, command_parser, device_option, errors_in_one_line
from modeling_fromage.io.fetching import fetch

from .arguments import ModelArguments, parse_config
from .data.captioned_images import load_captioned_images
from .data.feature_cache import (
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


def read_image(image: Any) -> tuple[Image.Image, ImageRecord]:
    """Read an image once: as RGB, and the record of just what was decoded.

    Raises:
        UnreadableImageError: It is missing, broken, or none.
    """
    place, mtime_ns = place_of(image), 0
    if place is None:
        contents = image["bytes"]
    elif is_url(place):
        contents = fetch(place)
    else:
        try:
            found = os.stat(place)  # before reading: what is written meanwhile is newer
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImageError(place, "not a regular file")
            mtime_ns = found.st_mtime_ns
            contents = Path(place).read_bytes()
        except OSError as error:
            raise UnreadableImageError(place, error.strerror) from error
    rgb = load_rgb_image({"bytes": contents, "path": name_of(image)})
    return rgb, ImageRecord(hashlib.sha256(contents).digest(), len(contents), mtime_ns, source_digest(place))


def as_stored(features: torch.Tensor) -> torch.Tensor:
    """`features` (n, width) in fp16, or as they are where that would overflow or lose small ones."""
    half, exact = features.half(), features.float()
    error = (half.float() - exact).norm(dim=-1)
    return half if (error <= 2**-10 * exact.norm(dim=-1)).all() else features


@torch.no_grad()
def cache_features(
    model_args: ModelArguments,
    dataset: Dataset,
    directory: str | Path,
    shard_size: int = 8192,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
) -> int:
    """Write the shards that this rank has to and that are not there yet; returns how many it wrote.

    Raises:
        ValueError: `directory` has features of another encoder or other images, an image cannot be read, or its
            features are not finite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = model_args.vision_model
    revision = resolve_revision(name)
    image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    options = {"revision": revision, "dtype": model_args.dtype}
    encoder = load_backbone("vision", name, options, model_args.vision_pooling).to(device).eval()
    commit = getattr(revision, "resolved", revision)
    manifest = {**describe(name, commit, model_args.vision_pooling, image_processor, dataset), "shard_size": shard_size}
    path = directory / MANIFEST
    if path.is_file():
        if found := differences(manifest, read_manifest(directory)):
            raise ValueError(f"{directory} already has features with {'; '.join(found)}. Give another folder.")
    else:
        replace_file(path, json.dumps(manifest, indent=1).encode())

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, list[ImageRecord]]:
        images, records = zip(*(read_image(row["image"]) for row in rows), strict=True)
        return image_processor(list(images), return_tensors="pt")["pixel_values"], list(records)

    def rows_of(number: int) -> Dataset:
        return dataset.select(range(number * shard_size, min(len(dataset), (number + 1) * shard_size)))

    mine = range(rank, -(-len(dataset) // shard_size), world_size)
    missing = [number for number in mine if not is_whole(directory / shard_name(number), len(rows_of(number)))]
    for number in sorted(set(mine) - set(missing)):
        check_images(images_of(rows_of(number)), directory / shard_name(number), number * shard_size)
    for number in tqdm(missing, desc="Encoding shards", disable=rank > 0):
        rows = rows_of(number)
        loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
        features, records = [], []
        for pixels, batch_records in tqdm(loader, desc="Encoding images", leave=False, disable=rank > 0):
            output = encoder(pixels.to(device, encoder.dtype), return_dict=True)
            pooled = pool_vision_output(output, model_args.vision_pooling, name).cpu()
            if not (finite := pooled.isfinite().all(-1)).all():
                row = len(records) + int((~finite).nonzero()[0])
                raise ValueError(
                    f"The features of image {number * shard_size + row}, {name_of(rows[row]['image'])}, are not finite "
                    f"in {model_args.dtype}. Leave the image out, or encode with dtype=float32."
                )
            features.append(pooled)
            records += batch_records
        tensors = {"features": as_stored(torch.cat(features)), **record_tensors(records)}
        replace_file(directory / shard_name(number), save(tensors))
    return len(missing)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("config", help="YAML file of training.train")
    parser.add_argument("directory", help="folder for the features")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    parser.add_argument("--eval", action="store_true", help="encode eval_data instead of train_data")
    parser.add_argument("--shard-size", type=at_least(1), default=8192, help="images in a file")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--num-workers", type=at_least(0), default=0, help="processes that decode images")
    parser.add_argument("--rank", type=at_least(0), default=int(os.environ.get("RANK", 0)))
    parser.add_argument("--world-size", type=at_least(1), default=int(os.environ.get("WORLD_SIZE", 1)))
    parser.add_argument("--device", type=device_option, help="by default the rank's GPU where there is one")
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        return _main(options)


def _main(options: argparse.Namespace) -> int:
    model_args, data_args, _ = parse_config(options.config, options.overrides)
    source, split = data_args.train_data, data_args.train_split
    if options.eval:
        source, split = data_args.eval_data, data_args.eval_split
        if source is None:
            raise ValueError(f"--eval, but {options.config} has no eval_data. Name it there, or as eval_data=...")
    dataset = load_captioned_images(source, split, data_args.image_column, data_args.caption_column)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    written = cache_features(
        model_args, dataset, options.directory, options.shard_size, options.batch_size, options.num_workers,
        options.rank, options.world_size, options.device or device,
    )  # fmt: skip
    print(f"Wrote {written} shards; {options.directory} is for {len(dataset)} images of {source}.")
    return written


if __name__ == "__main__":
    main()
