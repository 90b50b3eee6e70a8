"""What one vector stands for an image: a pooled one of a frozen encoder, and where they are wanted, patches behind it.

Axes: N images, T tokens of an image, h and w the height and width of a feature map, m patch tokens, W the width of
each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_fromage import FromageConfig
from .vision_patches_fromage import pooled_patches


@dataclass(frozen=True)
class ImageVector:
    """How an encoder's output becomes one vector an image, (N, (1 + m) W): the pooled vector, then m patch tokens, side
    by side. So whatever caches, loads or passes on a vector need not know of them.

    Args:
        pooling (`str`, defaults to `"pooler"`), layer (`int`, defaults to -1), patch_tokens (`int`, defaults to 0):
            `vision_pooling`, `vision_feature_layer` and `vision_patch_tokens` of [`FromageConfig`].
    """

    pooling: str = "pooler"
    layer: int = -1
    patch_tokens: int = 0

    @classmethod
    def of(cls, config: FromageConfig) -> "ImageVector":
        return cls(config.vision_pooling, config.vision_feature_layer, config.vision_patch_tokens)

    def __str__(self) -> str:
        layer = "" if self.layer == -1 else f", layer {self.layer}"
        return self.pooling + layer + (f", {self.patch_tokens} patch tokens" if self.patch_tokens else "")

    def encode(
        self, vision_model: PreTrainedModel, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[ModelOutput, torch.Tensor]:
        """The output of an encoder for `pixel_values` (N, channels, height, width), and the images' vectors.

        Raises:
            ValueError: The output has nothing that could be taken.
        """
        if self.layer != -1:
            kwargs["output_hidden_states"] = True
        output = vision_model(pixel_values, return_dict=True, **kwargs)
        return output, self.of_output(output, vision_model, pixel_values)

    def of_output(self, output: ModelOutput, vision_model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """The vectors (N, (1 + m) W) of an encoder's output."""
        name = type(vision_model).__name__
        pooled = _pool(output, self.pooling, self.layer, name, pixel_values)
        if not self.patch_tokens:
            return pooled
        hidden = _hidden_states(output, self.layer, name, pixel_values, "`vision_patch_tokens`")
        patches = pooled_patches(hidden, pixel_values, vision_model, self.layer, self.patch_tokens)
        if pooled.shape[-1] != patches.shape[-1]:
            raise ValueError(
                f"The pooled vector of {name} (`vision_pooling={self.pooling!r}`) has {pooled.shape[-1]} entries, and "
                f"its patch tokens have {patches.shape[-1]}; they must be of one width. Set `vision_pooling='mean'` or "
                "'cls'."
            )
        return torch.cat([pooled, patches.flatten(1)], dim=1)


def _pool(output: ModelOutput, pooling: str, layer: int, model_name: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """One vector per image, (N, width)."""
    if pooling == "pooler":
        pooled = output.get("pooler_output")
        if pooled is None:
            raise ValueError(
                f"{model_name} has no pooled output. Set `vision_pooling='cls'` or `vision_pooling='mean'` in the "
                "configuration, or use a vision model with a pooler."
            )
        if pooled.dim() < 2 or pooled[0].numel() != max(pooled.shape[1:]):  # ResNet gives (N, C, 1, 1)
            raise ValueError(
                f"The pooled output of {model_name} has shape {tuple(pooled.shape)}, not a vector for each image. Set "
                "`vision_pooling='cls'` or `vision_pooling='mean'` in the configuration."
            )
        return pooled.flatten(1)
    hidden = _hidden_states(output, layer, model_name, pixel_values, "`vision_pooling='cls'` and `'mean'`")
    if pooling == "mean":
        return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.flatten(2).mean(dim=2)
    if hidden.dim() != 3:
        raise ValueError(
            f"`vision_pooling='cls'` needs a sequence of tokens, but {model_name} gives {tuple(hidden.shape)}."
        )
    return hidden[:, 0]


def _hidden_states(
    output: ModelOutput, layer: int, model_name: str, pixel_values: torch.Tensor, what: str
) -> torch.Tensor:
    """The tokens (N, T, width) or the feature map (N, width, h, w) of a layer of an encoder, which `what` needs."""
    hidden = output.get("last_hidden_state") if layer == -1 else _of_layer(output, layer, model_name)
    if hidden is None and output.get("feature_maps"):  # of a backbone
        hidden = output["feature_maps"][-1]
    if isinstance(hidden, (list, tuple)):  # of timm's wrapper with `features_only`, likewise
        hidden = hidden[-1]
    if hidden is None or hidden.dim() not in (3, 4):
        found = "none" if hidden is None else f"of shape {tuple(hidden.shape)}"
        remedy = "`vision_patch_tokens=0`" if "patch" in what else "`vision_pooling='pooler'`"
        raise ValueError(
            f"{what} need the hidden states of {model_name}, tokens or a feature map, and found {found}. Set {remedy}, "
            "or take another vision model."
        )
    if hidden.dim() == 4 and _has_channels_last(hidden, pixel_values):
        return hidden.movedim(-1, 1)
    count = len(pixel_values)
    if hidden.dim() == 3 and len(hidden) == 1 and hidden.shape[1] % count == 0:  # Pixtral lays a batch in one row
        return hidden.view(count, -1, hidden.shape[-1])
    return hidden


def _of_layer(output: ModelOutput, layer: int, model_name: str) -> torch.Tensor:
    hidden = output.get("hidden_states")
    if not hidden:
        raise ValueError(
            f"{model_name} gives no hidden states of its layers. Leave `vision_feature_layer` out, or take another "
            "vision model."
        )
    if not -len(hidden) <= layer < len(hidden):
        raise ValueError(
            f"`vision_feature_layer` is {layer}, but {model_name} has hidden states {-len(hidden)}..{len(hidden) - 1}."
        )
    return hidden[layer]


def _has_channels_last(feature_map: torch.Tensor, pixel_values: torch.Tensor) -> bool:
    """Whether (N, h, w, width) and not (N, width, h, w) has the proportions of the images, up to rounding."""
    height, width = pixel_values.shape[-2:]
    first, last = (
        abs(h * width - w * height) <= max(height, width) for h, w in (feature_map.shape[2:], feature_map.shape[1:3])
    )
    return last and not first


__all__ = ["ImageVector"]
