"""Run the frozen vision encoder once over a dataset: `python -m training.cache_features CONFIG.yaml DIR`.

Reads the files of `training.train` and encodes the images of their `train_data` (with `--eval`, `eval_data`). DIR gets
a manifest of what the features depend on, and shards of pooled features with a digest of each image. Features are
stored in fp16, 2 KB for 1,024 of them; a shard whose values do not fit keeps the encoder's dtype. With
`on_bad_example: skip` an image that cannot be read or encoded costs its row alone, up to a share of `max_bad_share`.
With `feature_cache: DIR` in its file, `training.train` reads the features from there, and refuses those of another
encoder, other preprocessing or other images. An interrupted run leaves only complete shards; the same command writes
the rest.
Several processes share the work: under `torchrun`, or with `--rank` and `--world-size`.
"""

import argparse
import os
from pathlib import Path

import torch

from modeling_fromage.io.command_line import at_least, command_parser, device_option, errors_in_one_line

from .arguments import parse_config
from .data.feature_cache import read_manifest
from .data.feature_writing import VisionEncoder, write_features
from .data.training_data import INDEXES, DataLoading, refuse_documents


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("config", help="YAML file of training.train")
    parser.add_argument("directory", help="folder for the features")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    parser.add_argument("--eval", action="store_true", help="encode eval_data instead of train_data")
    parser.add_argument("--shard-size", type=at_least(1), default=8192, help="images per file")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--num-workers", type=at_least(0), default=0, help="processes that decode images")
    parser.add_argument("--rank", type=at_least(0), default=int(os.environ.get("RANK", 0)))
    parser.add_argument("--world-size", type=at_least(1), default=int(os.environ.get("WORLD_SIZE", 1)))
    parser.add_argument("--device", type=device_option, help="by default the rank's GPU if there is one")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        model_args, data_args, args = parse_config(options.config, options.overrides)
        if options.eval and data_args.eval_data is None:
            raise ValueError(f"--eval, but {options.config} has no eval_data. Name it there, or as eval_data=...")
        loading = DataLoading(data_args, args.seed, args.on_bad_example == "skip", Path(options.directory) / INDEXES)
        dataset = loading.all_examples(for_evaluation=options.eval)
        refuse_documents(dataset)
        default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        encoder = VisionEncoder.from_pretrained(
            model_args.vision_model, model_args.image_vector(), model_args.dtype, options.device or default
        )
        written = write_features(
            encoder,
            dataset,
            options.directory,
            options.shard_size,
            options.batch_size,
            options.num_workers,
            options.rank,
            options.world_size,
            args.max_bad_share if args.on_bad_example == "skip" else None,
        )
        source = data_args.eval_data if options.eval else data_args.train_data
        print(f"Wrote {written} shards; {options.directory} is for {len(dataset)} images of {source}.")
        if bad := read_manifest(Path(options.directory)).get("num_bad_images"):
            print(f"{bad} of them are bad and have no features: _bad_examples.jsonl in that folder lists them.")
        return written


if __name__ == "__main__":
    main()
