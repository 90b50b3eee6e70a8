"""Run the frozen vision encoder once over a data set: `python -m training.cache_features CONFIG.yaml DIR`.

Takes the files of `training.train` and encodes their `train_data` (with `--eval`, their `eval_data`). DIR gets shards
of fp16 pooled features, 2 KB for 1,024 of them, and a manifest of what they depend on. Where a training file says
`feature_cache: DIR`, `training.train` takes the features from there, and refuses those of another encoder, of other
preprocessing or of other images. A shard appears whole or not at all; the same command again does what is missing.
Several processes share the work: under `torchrun`, or with `--rank` and `--world-size`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor
from transformers.utils.hub import resolve_revision

from modeling_fromage.assembly_fromage import load_backbone
from modeling_fromage.backbones_fromage import pool_vision_output
from modeling_fromage.images_fromage import load_rgb_image
from training.data import load_captioned_images
from training.features import MANIFEST, describe, differences, is_whole, shard_name
from training.train import ModelArguments, parse_config


def _write(path: Path, write):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


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
        ValueError: `directory` has features of another encoder or other images, or an image cannot be read.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = model_args.vision_model
    revision = resolve_revision(name)
    image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    options = {"revision": revision, "dtype": getattr(torch, model_args.dtype)}
    encoder = load_backbone("vision", name, options, model_args.vision_pooling).to(device).eval()
    commit = getattr(revision, "resolved", revision)
    manifest = {**describe(name, commit, model_args.vision_pooling, image_processor, dataset), "shard_size": shard_size}
    path = directory / MANIFEST
    if path.is_file():
        present = json.loads(path.read_text(encoding="utf-8"))
        if found := differences(manifest, present):
            raise ValueError(f"{directory} already has features with {'; '.join(found)}. Give another folder.")
    else:
        _write(path, lambda file: file.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))

    def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
        return image_processor([load_rgb_image(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]

    mine = range(rank, -(-len(dataset) // shard_size), world_size)
    missing = [number for number in mine if not is_whole(directory / shard_name(number))]
    for number in tqdm(missing, desc="Encoding shards", disable=rank > 0):
        rows = dataset.select(range(number * shard_size, min(len(dataset), (number + 1) * shard_size)))
        loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
        features = []
        for pixels in tqdm(loader, desc="Encoding images", leave=False, disable=rank > 0):
            output = encoder(pixels.to(device, encoder.dtype), return_dict=True)
            features.append(pool_vision_output(output, model_args.vision_pooling, name).half().cpu())
        tensors = {"features": torch.cat(features)}
        _write(directory / shard_name(number), lambda file, tensors=tensors: save_file(tensors, file))
    return len(missing)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of training.train")
    parser.add_argument("directory", help="folder for the features")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    parser.add_argument("--eval", action="store_true", help="encode eval_data instead of train_data")
    parser.add_argument("--shard-size", type=int, default=8192, help="images in a file")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", 0)))
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 1)))
    parser.add_argument("--device", default=None, help="by default the rank's GPU where there is one")
    options = parser.parse_args(argv)
    try:
        model_args, data_args, _ = parse_config(options.config, options.overrides)
    except ValueError as error:
        parser.error(str(error))
    source, split = data_args.train_data, data_args.train_split
    if options.eval:
        source, split = data_args.eval_data, data_args.eval_split
        if source is None:
            parser.error(f"--eval, but {options.config} has no eval_data.")
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
