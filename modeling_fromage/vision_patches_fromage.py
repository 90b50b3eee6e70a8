"""Patch tokens: what an encoder gives for the parts of an image, averaged to a few vectors.

Axes: N images, T tokens of an image, W their width, h and w the height and width of the grid of patches, m patch
tokens.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel


def pooled_patches(
    hidden: torch.Tensor, pixel_values: torch.Tensor, vision_model: PreTrainedModel, layer: int, count: int
) -> torch.Tensor:
    """Patch tokens (N, m, W), row by row: the means over the squares of a grid of `count`, m, in an encoder's tokens
    (N, T, W) or feature map (N, W, h, w) for `pixel_values` (N, channels, height, width).

    Raises:
        ValueError: The tokens are no grid, or the grid has fewer patches.
    """
    grid = hidden if hidden.dim() == 4 else _grid_of_tokens(hidden, pixel_values, vision_model, layer)
    side, (height, width) = math.isqrt(count), grid.shape[-2:]
    if side > min(height, width):
        raise ValueError(
            f"{type(vision_model).__name__} has {height} x {width} patches for an image of {pixel_values.shape[-2]} x "
            f"{pixel_values.shape[-1]}, and {count} patch tokens are {side} x {side}. Set `vision_patch_tokens` to "
            f"{min(height, width) ** 2} at most."
        )
    return nn.functional.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def _grid_of_tokens(
    hidden: torch.Tensor, pixel_values: torch.Tensor, vision_model: PreTrainedModel, layer: int
) -> torch.Tensor:
    """The patches (N, W, h, w) among tokens (N, T, W), which other tokens may stand before.

    An encoder in stages (Swin's kind) merges patches: only after its last stage is their order known to be row by row.
    """
    name, fields, total = type(vision_model).__name__, vision_model.config.to_dict(), hidden.shape[1]
    embedding = next((each for each in vision_model.modules() if isinstance(each, nn.Conv2d)), None)
    if embedding is not None:
        rows, columns = (size // step for size, step in zip(pixel_values.shape[-2:], embedding.stride, strict=True))
        if not fields.get("depths"):
            before = total - rows * columns
            if before in (0, 1, 1 + (fields.get("num_register_tokens") or 0)):  # none, CLS, or registers too
                return hidden[:, before:].transpose(1, 2).unflatten(2, (rows, columns))
        elif layer == -1 and fields.get("num_query_pool", len(fields["depths"])) >= len(fields["depths"]) - 1:
            merged = math.isqrt(rows * columns // total)
            if merged and (rows // merged) * (columns // merged) == total:
                return hidden.transpose(1, 2).unflatten(2, (rows // merged, columns // merged))
    raise ValueError(
        f"The {total} tokens of {name} (`vision_feature_layer={layer}`) for an image of {pixel_values.shape[-2]} x "
        f"{pixel_values.shape[-1]} are not known to be a grid of patches. Set `vision_patch_tokens=0`, or take another "
        "vision model."
    )


__all__ = ["pooled_patches"]
