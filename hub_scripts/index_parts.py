"""What every process that builds a part of an index does, whoever starts it."""

import argparse
import os
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor, ImageLimits


def load_model(options: argparse.Namespace) -> FromageForConditionalGeneration:
    model = AutoModel.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    if model.config.model_type != "fromage":
        raise ValueError(f"{options.model} has a model of type {model.config.model_type!r}; expected 'fromage'.")
    return model.eval().to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_processor(options: argparse.Namespace) -> FromageProcessor:
    return AutoProcessor.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)


def images_of(options: argparse.Namespace) -> str | list[str]:
    """What [`FromageImageIndex.build`] takes."""
    return options.images[0] if len(options.images) == 1 else options.images


def build_part(
    options: argparse.Namespace,
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    directory: str | os.PathLike[str],
    shard: tuple[int, int] | None,
    show_progress: bool = True,
    **backend: Any,
) -> FromageImageIndex:
    """Build one part of an index, or all of it, or go on with it where it was interrupted."""
    return FromageImageIndex.build(
        model,
        processor,
        images_of(options),
        batch_size=options.batch_size,
        save_directory=directory,
        dtype=getattr(torch, options.dtype),
        num_workers=options.num_workers,
        limits=ImageLimits(timeout=options.timeout),
        shard=shard,
        show_progress=show_progress,
        **backend,
    )
