"""Build an image index: `python -m hub_scripts.build_image_index MODEL IMAGES OUTPUT`.

IMAGES is a folder of images; a table (CSV, TSV, JSONL, Parquet) with a column "image" or "url"; shards (tar, Parquet),
by their paths, a pattern or a folder, here or in an object store (s3://...); or the authors' `cc3m_embeddings*.pkl`.
With `--merge`, IMAGES are the indexes that several processes built with `--shard`. With `--ray`, actors of a cluster
build such parts, in OUTPUT.parts, and the command merges them. With `--milvus`, the index is a collection of Milvus,
and OUTPUT its header. After an interruption, run the same command again: it continues.
"""

import argparse
import os
from typing import Any

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex
from modeling_fromage.images_fromage import is_url
from modeling_fromage.index.image_shards import find_shards
from modeling_fromage.index.merging import merge_folders
from modeling_fromage.io.command_line import at_least, command_parser, device_option, errors_in_one_line

from .index_on_ray import build_on_ray
from .index_parts import build_part, load_model, load_processor
from .original_embeddings import read_original_embeddings


def from_original_embeddings(paths: list[str], model: FromageForConditionalGeneration) -> FromageImageIndex:
    """One index of the authors' files, in the order given. Of images that occur twice, the first is kept."""
    index = FromageImageIndex(
        torch.empty(0, model.config.projection_dim), [], model_fingerprint=model.retrieval_fingerprint()
    )
    for path in paths:
        names, embeds = read_original_embeddings(path)
        first = {name: row for row, name in reversed(list(enumerate(names))) if name not in index}
        rows = sorted(first.values())
        kept = [names[row] for row in rows]
        metadata = [{"url" if is_url(name) else "path": name} for name in kept]
        index.add(embeds[rows], kept, metadata)
        print(f"{path}: {len(kept):,} images, and {len(names) - len(kept):,} that occurred before.")
    return index


def _shard(text: str) -> tuple[int, int]:
    try:
        first, count = (int(number) for number in text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected I/N, such as 0/4, got {text!r}") from error
    return first, count


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of the model that embeds the images")
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", help="a folder, table or shards; indexes; or the authors' *.pkl"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder of the index")
    parser.add_argument("--merge", action="store_true", help="IMAGES are folders of indexes")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="take every N-th image from the I-th on (from 0), or every N-th file of N or more shards",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=64)
    parser.add_argument("--num-workers", type=at_least(1), default=8, help="threads that read images")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="of the stored embeddings")
    parser.add_argument("--device", type=device_option, help="by default a GPU, if there is one")
    parser.add_argument("--timeout", type=at_least(0, float), default=10.0, help="seconds to fetch an image")
    parser.add_argument("--faiss", metavar="FACTORY", help="search through a FAISS index, such as IVF4096,Flat")
    parser.add_argument("--nprobe", type=at_least(1), help="inverted lists that FAISS visits per query")
    parser.add_argument("--milvus", metavar="URI", help="put it into Milvus: a file ending in .db, or the address of a "
                        "server, whose token is MILVUS_TOKEN of the environment")  # fmt: skip
    parser.add_argument("--collection", default="fromage", help="with --milvus, the name of the collection")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the index to this dataset repository")
    parser.add_argument("--trust-remote-code", action="store_true")
    ray = parser.add_argument_group("on a Ray cluster", "MODEL, IMAGES and OUTPUT must be the same on every node.")
    ray.add_argument("--ray", action="store_true", help="build on a cluster, or on one of this machine alone")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="of the cluster; by default $RAY_ADDRESS or this machine")
    ray.add_argument("--actors", type=at_least(1), metavar="N", help="by default as many as there is room for")
    ray.add_argument("--cpus-per-actor", type=at_least(1), default=1, metavar="N", help="and threads that compute")
    ray.add_argument("--gpus-per-actor", type=at_least(0, float), default=0, metavar="N", help="also fractions")
    ray.add_argument("--parts", type=at_least(1), metavar="N", help="by default 4 for each actor")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    with errors_in_one_line(parser):
        index = _make(options)
        if options.milvus and index.backend != "milvus":
            index.use_backend(**_milvus(options))
            index.save_pretrained(options.output)
        if options.faiss:
            index.use_backend("faiss", factory=options.faiss, nprobe=options.nprobe)
            index.save_pretrained(options.output)
        print(f"{index!r} in {options.output}")
        if index.image_root is not None:  # not stored: whoever loads an index decides which folder it may read
            call = f"FromageImageIndex.from_pretrained({options.output!r}, image_root={str(index.image_root)!r})"
            print(f"To load it with its images: {call}")
        for row in index.skipped[:20]:
            print(f"skipped {row['source']}: {row['reason']}")
        if options.push_to_hub:
            print(index.push_to_hub(options.push_to_hub))


def _make(options: argparse.Namespace) -> FromageImageIndex:
    if options.merge:
        merge_folders(options.images, options.output)
        return FromageImageIndex.from_pretrained(options.output)
    if all(path.endswith(".pkl") for path in options.images):
        if options.ray or options.shard:
            raise ValueError("The authors' files hold embeddings: one process reads them, without --ray and --shard.")
        index = from_original_embeddings(options.images, load_model(options))
        index.save_pretrained(options.output)
        return index
    if len(options.images) != 1 and not find_shards(options.images)[0]:
        raise ValueError(
            f"Expected one folder or table, or shards (tar, Parquet), got {options.images}. Use --merge to join "
            "indexes."
        )
    if options.ray:
        return build_on_ray(options)
    return build_part(
        options, load_model(options), load_processor(options), options.output, options.shard, **_milvus(options)
    )


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    alone = [name for name in ("merge", "shard") if getattr(options, name) and options.ray]
    if alone:
        parser.error(f"--ray and --{alone[0]} exclude each other: --ray divides and merges by itself")
    if options.shard and options.milvus:
        parser.error("--shard builds a part in a folder: give --milvus where the parts are merged")
    for name in ("ray_address", "actors", "cpus_per_actor", "gpus_per_actor", "parts"):
        if not options.ray and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for --ray, which is missing")


def _milvus(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments that put the index into Milvus, if it is to be there."""
    if not options.milvus:
        return {}
    token = os.environ.get("MILVUS_TOKEN")
    return {"backend": "milvus", "uri": options.milvus, "collection": options.collection, "token": token}


if __name__ == "__main__":
    main()
