"""The maps from an image's features to its visual tokens (section 3.1), and the paper's with less and more to them.

Axes: N images, m patch tokens, k visual tokens per image, W the width of a feature vector, D the LM's input width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_fromage import FromageConfig

_HEAD_WIDTH = 64


class FromageMultiModalProjector(nn.Linear):
    """Maps an image's pooled features to its `k` visual tokens, side by side: (N, W) -> (N, k * D)."""


class _Mlp(nn.Sequential):
    """A hidden layer of D units, as in LLaVA 1.5: (..., W) -> (..., width)."""

    def __init__(self, feature_width: int, hidden_width: int, width: int):
        super().__init__(nn.Linear(feature_width, hidden_width), nn.GELU(), nn.Linear(hidden_width, width))


class PatchProjector(nn.Module):
    """One map of all patches, averaged to `k` groups in reading order: (N, (1 + m) * W) -> (N, k * D)."""

    def __init__(self, each: nn.Module, num_vectors: int, num_image_tokens: int):
        super().__init__()
        self.each, self.num_vectors, self.num_image_tokens = each, num_vectors, num_image_tokens

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        patches = features.unflatten(-1, (self.num_vectors, -1))[:, 1:]  # the first is the pooled vector
        groups = F.adaptive_avg_pool1d(patches.transpose(1, 2), self.num_image_tokens).transpose(1, 2)
        return self.each(groups).flatten(1)


class _CrossAttention(nn.Module):
    """Queries (N, k, W) attend to vectors (N, 1 + m, W), in several heads.

    Each map is called as a module: torch's `MultiheadAttention` reads its output's weight past one, and LoRA on that
    would be without effect.
    """

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = next(count for count in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % count == 0)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        maps = (self.query, queries), (self.key, vectors), (self.value, vectors)
        heads = [linear(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear, inputs in maps]
        return self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class _ResamplerLayer(nn.Module):
    """Queries attend to an image's vectors, and pass through an MLP; both behind a layer norm and beside a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.query_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _CrossAttention(width)
        self.mlp = _Mlp(width, 2 * width, width)

    def forward(self, queries: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        queries = queries + self.attention(self.query_norm(queries), vectors)
        return queries + self.mlp(self.mlp_norm(queries))


class Resampler(nn.Module):
    """`k` learned queries that attend to an image's pooled vector and its patches: (N, (1 + m) * W) -> (N, k * D)."""

    def __init__(self, config: FromageConfig, feature_width: int, input_width: int):
        super().__init__()
        self.num_vectors = 1 + config.vision_patch_tokens
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_image_tokens, feature_width))
        self.norm = nn.LayerNorm(feature_width)
        self.layers = nn.ModuleList(_ResamplerLayer(feature_width) for _ in range(config.resampler_num_layers))
        self.output_norm, self.output = nn.LayerNorm(feature_width), nn.Linear(feature_width, input_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        vectors = self.norm(features.unflatten(-1, (self.num_vectors, -1)))
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, vectors)
        return self.output(self.output_norm(queries)).flatten(1)


def make_projector(config: FromageConfig, feature_width: int, input_width: int) -> nn.Module:
    """The projector that a configuration asks for: (N, (1 + m) * W) -> (N, k * D)."""
    if config.projector_type == "resampler":
        return Resampler(config, feature_width, input_width)
    patches = config.vision_patch_tokens
    width = input_width if patches else config.num_image_tokens * input_width
    if config.projector_type == "linear":
        each: nn.Module = FromageMultiModalProjector(feature_width, width)
    else:
        each = _Mlp(feature_width, input_width, width)
    return PatchProjector(each, 1 + patches, config.num_image_tokens) if patches else each


def init_weights(module: nn.Module) -> None:
    """The initial values of a trained module that is new: those of the authors' for what is linear."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, Resampler):
        init.normal_(module.queries, std=0.02)


__all__ = ["FromageMultiModalProjector", "PatchProjector", "Resampler", "init_weights", "make_projector"]
