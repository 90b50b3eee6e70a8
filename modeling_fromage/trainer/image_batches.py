"""The images of a batch's examples, as the model takes them."""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing_fromage import FromageProcessor
from .bad_examples import BadExampleError


def images_of(example: dict[str, Any]) -> list[Any]:
    """The image of a pair, or those of a document, decoded."""
    image = example["image"]
    return image if isinstance(image, list) else [image]


def image_tensors(processor: FromageProcessor, examples: list[Any]) -> dict[str, torch.Tensor]:
    """`pixel_values` (num_images, ...) of prepared examples; nothing of cached features. An example with an image that
    the image processor refuses makes way for its substitute in the list.

    Raises:
        ValueError: Some examples have cached features, and others have not.
    """
    cached = ["pooled_image_features" in example for example in examples]
    if all(cached):
        return {}
    if any(cached):
        raise ValueError(
            f"Example {cached.index(True)} of a batch has cached `pooled_image_features`, and example "
            f"{cached.index(False)} has an image. Give features to all examples, or to none."
        )
    try:
        return _process(processor, examples)
    except Exception:  # whatever it raises for a picture says nothing about others
        if not any([_replaces(processor, examples, row) for row in range(len(examples))]):
            raise
        return _process(processor, examples)


def pooled_features(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`pooled_image_features` (num_images, vision width): one of a pair, several of a document."""
    rows = [torch.as_tensor(example["pooled_image_features"]) for example in examples]
    return {"pooled_image_features": torch.cat([row if row.dim() == 2 else row[None] for row in rows])}


def _process(processor: FromageProcessor, examples: list[Any]) -> dict[str, torch.Tensor]:
    images = [image for example in examples for image in images_of(example)]
    return {"pixel_values": processor.image_processor(images, return_tensors="pt")["pixel_values"]}


def _replaces(processor: FromageProcessor, examples: list[Any], row: int) -> bool:
    """Whether an example had to be replaced: the image processor raises for its images alone."""
    is_replaced = False
    while True:
        try:
            _process(processor, [examples[row]])
            return is_replaced
        except Exception as error:
            refused = BadExampleError("image processor raises", f"{type(error).__name__}: {error}")
            examples[row] = examples[row].replaced(refused)
            is_replaced = True


__all__ = ["image_tensors", "images_of", "pooled_features"]
