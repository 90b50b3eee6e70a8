"""Hard negatives of a batch's examples: further images, that no text is to find."""

from typing import Any

import torch
from transformers.utils import logging

from ..images_fromage import load_rgb_image
from ..processing_fromage import FromageProcessor
from .bad_examples import BadExampleError, as_bad

logger = logging.get_logger(__name__)


def check_negatives(example: dict[str, Any], count: int) -> None:
    """Raise a `BadExampleError` where `count` are to be drawn of negatives that are no list, or are pictures beside
    cached features."""
    if not count:
        return
    for name in ("negative_images", "negative_image_features"):
        found = example.get(name)
        if found is not None and (isinstance(found, (str, bytes, dict)) or not hasattr(found, "__len__")):
            raise BadExampleError(f"{name} is no list", repr(found)[:100])
    is_cached = example.get("pooled_image_features") is not None
    other = "negative_images" if is_cached else "negative_image_features"
    if example.get(other) is not None:
        raise BadExampleError(
            f"{other} with {'cached features' if is_cached else 'an image'}",
            "an image and its negatives are both pictures, or both cached features (`pooled_image_features`, "
            "`negative_image_features`). Train without `feature_cache`, or with `hard_negatives=0`",
        )


def has_negatives(example: dict[str, Any]) -> bool:
    return any(example.get(name) is not None for name in ("negative_images", "negative_image_features"))


def draw_negatives(processor: FromageProcessor, examples: list[Any], count: int, seed: int) -> dict[str, torch.Tensor]:
    """`negative_pixel_values` or `negative_image_features` (num_negatives, ...): `count` of each example's, drawn
    without replacement, or all where it has fewer; nothing where no example has any.

    One that cannot be read is passed over for another. An example of which none can be read makes way in the list for
    its substitute, if it has one.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[torch.Tensor]] = {"negative_pixel_values": [], "negative_image_features": []}
    for row in range(len(examples)):
        features = examples[row].get("negative_image_features")
        if features is not None:
            rows = torch.as_tensor(features)
            found["negative_image_features"].append(rows[torch.randperm(len(rows), generator=generator)[:count]])
            continue
        while True:
            try:
                found["negative_pixel_values"] += _pictures(processor, examples[row], count, generator)
                break
            except BadExampleError as error:
                examples[row] = examples[row].replaced(error)
    return {name: torch.cat(tensors) for name, tensors in found.items() if tensors}


def _pictures(
    processor: FromageProcessor, example: dict[str, Any], count: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Up to `count` of an example's negatives, each as `pixel_values` (1, ...)."""
    sources = example.get("negative_images")
    if sources is None or not len(sources):
        return []
    pixels: list[torch.Tensor] = []
    problem: Exception | None = None
    for number in torch.randperm(len(sources), generator=generator).tolist():
        if len(pixels) == count:
            break
        try:
            image = load_rgb_image(sources[number])
            pixels.append(processor.image_processor([image], return_tensors="pt")["pixel_values"])
        except Exception as error:  # whatever a decoder or the image processor raises for this picture
            problem = error
            logger.warning_once(f"A hard negative cannot be used, and another is taken for it: {error}")
    if not pixels and problem is not None:
        told = as_bad(problem)
        raise BadExampleError("no usable negative image", f"{told.reason}: {told.detail}") from problem
    return pixels


__all__ = ["check_negatives", "draw_negatives", "has_negatives"]
