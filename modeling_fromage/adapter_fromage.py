"""Everything that FROMAGe trains: the maps between the frozen backbones, and `[RET]` (sections 3.1 and 3.2).

Axes: N images, k visual tokens per image, D the LM's input width, H its head's width, M texts, r `[RET]` tokens at the
end of each, q the width of the shared image-text space.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .backbones_fromage import hidden_state_width, weight_of
from .configuration_fromage import FromageConfig
from .late_interaction_fromage import similarities
from .projectors_fromage import make_projector
from .vision_fromage import vision_feature_size

_NOISE = 0.1  # of the deviation of the LM's rows: `[RET2]`, ... do not start as copies of `[RET]`
LOGIT_BIAS = -10.0  # to begin with, as in SigLIP's paper: at first nearly all pairs of a batch are taken for negatives


class FromageAdapter(nn.Module):
    """All trained tensors. They stay in fp32 whatever the dtype of the backbones.

    Args:
        config ([`FromageConfig`]): The sizes.
        input_width (`int`): D, the width of the LM's input embeddings.
        head_width (`int`): H, the width of the hidden states that its output head takes.
    """

    weight: None = None  # which some of PEFT's methods ask of every module that they unwrap (merge_and_unload)

    def __init__(self, config: FromageConfig, input_width: int, head_width: int):
        super().__init__()
        self.num_image_tokens = config.num_image_tokens
        self.feature_dropout = nn.Dropout(config.image_feature_dropout)
        self.num_vectors = 1 + config.vision_patch_tokens
        self.feature_width, rest = divmod(vision_feature_size(config), self.num_vectors)
        if rest:
            raise ValueError(
                f"`vision_feature_size` is {config.vision_feature_size}, which is no multiple of {self.num_vectors}: "
                "of the pooled vector and `vision_patch_tokens` patches. Leave it out, and it is measured."
            )
        self.multi_modal_projector = make_projector(config, self.feature_width, input_width)
        self.visual_projection = nn.Linear(self.feature_width, config.projection_dim)
        self.has_several_queries = config.ret_aggregation == "max"
        states = 1 if self.has_several_queries else config.num_ret_tokens
        self.text_projection = nn.ModuleList(
            nn.Linear(states * hidden_state_width(config.text_config, layer, head_width), config.projection_dim)
            for layer in config.text_embed_layers
        )
        self.ret_embedding = nn.Embedding(config.num_ret_tokens, input_width)
        tied = config.tie_ret_embedding and input_width == head_width
        self.ret_lm_head = None if tied else nn.Linear(head_width, config.num_ret_tokens, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        has_bias = config.contrastive_loss_type == "siglip"
        self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS)) if has_bias else None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FromageAdapter":
        """Move tensors as in torch, but never below fp32: `half()` and `to(dtype)` are meant for the backbones."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            is_narrower = tensor.is_floating_point() and converted.dtype.itemsize < min(tensor.dtype.itemsize, 4)
            return tensor.to(converted.device, torch.float32) if is_narrower else converted

        return super()._apply(convert, recurse)

    # ---- images ---------------------------------------------------------------------------------------------------

    def visual_tokens(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled image features (N, vision width) -> visual tokens (N, k, D)."""
        return self.multi_modal_projector(self._features(pooled)).unflatten(-1, (self.num_image_tokens, -1))

    def image_embeds(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled image features (N, vision width) -> unit-norm embeddings (N, q), of the pooled vector alone."""
        vectors = self._features(pooled)[..., : self.feature_width]
        return nn.functional.normalize(self.visual_projection(vectors), dim=-1)

    def check_features(self, pooled: torch.Tensor) -> None:
        """Raise a `ValueError` where pooled image features (N, vision width) are those of another encoder."""
        if pooled.shape[-1] != self.num_vectors * self.feature_width:
            vectors = f"{self.num_vectors} vectors of " if self.num_vectors > 1 else ""
            raise ValueError(
                f"`pooled_image_features` has {pooled.shape[-1]} entries an image, and this model's images have "
                f"{vectors}{self.feature_width}. Encode the images with this model."
            )

    def _features(self, pooled: torch.Tensor) -> torch.Tensor:
        self.check_features(pooled)
        return self.feature_dropout(pooled.to(self.logit_scale))

    def logits_per_image(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Contrastive logits (N, M) of unit-norm embeddings of images (N, q) and texts (M, q), or (M, r, q)."""
        logits = similarities(self.logit_scale.exp() * image_embeds, text_embeds)
        return logits if self.logit_bias is None else logits + self.logit_bias

    def scalars(self) -> list[nn.Parameter]:
        """What these logits are made of beside embeddings: the scale, and with SigLIP's loss the bias."""
        return [scalar for scalar in (self.logit_scale, self.logit_bias) if scalar is not None]

    def init_scalars(self, config: FromageConfig) -> None:
        """Start the scale and the bias, unless they have been loaded."""
        init.constant_(self.logit_scale, config.logit_scale_init_value)
        if self.logit_bias is not None:
            init.constant_(self.logit_bias, LOGIT_BIAS)

    @torch.no_grad()
    def clamp_logit_scale(self, largest: float | None) -> None:
        """Cut what cosines are multiplied by to `largest`, if that is given, as CLIP's authors do after each step."""
        if largest is not None:
            self.logit_scale.clamp_(max=math.log(largest))

    # ---- text -----------------------------------------------------------------------------------------------------

    def text_embeds(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states of the `[RET]` tokens side by side, (M, r * width) for each of `text_embed_layers` -> unit-norm
        embeddings (M, q), or (M, r, q) where each token makes a query."""
        if self.has_several_queries:
            layers = [hidden.unflatten(-1, (self.ret_embedding.num_embeddings, -1)) for hidden in layers]
        projected = [
            projection(hidden.to(self.logit_scale))
            for hidden, projection in zip(layers, self.text_projection, strict=True)
        ]
        return nn.functional.normalize(sum(projected[1:], projected[0]), dim=-1)

    def ret_rows(self) -> torch.Tensor:
        """Input embeddings of `[RET]`, (num_ret_tokens, D); looked up, so that the hooks of offloading run."""
        return self.ret_embedding(torch.arange(self.ret_embedding.num_embeddings, device=self.logit_scale.device))

    def ret_head_rows(self) -> torch.Tensor:
        """Output-head rows of `[RET]`, (num_ret_tokens, H); those of a separate head by what it makes of unit
        vectors."""
        if self.ret_lm_head is None:
            return self.ret_rows()
        width = self.ret_lm_head.in_features
        return self.ret_lm_head(torch.eye(width, device=self.logit_scale.device, dtype=self.logit_scale.dtype)).t()

    @torch.no_grad()
    def init_ret(self, input_embeddings: nn.Module, output_embeddings: nn.Module, ret_token_id: int) -> None:
        """Start each `[RET]` token from the LM's row of its id where it has one (parity), else from its mean row; those
        behind the first with a little noise, of a fixed seed."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.ret_embedding, input_embeddings)]
        if self.ret_lm_head is not None:
            pairs.append((self.ret_lm_head, output_embeddings))
        for ours, theirs in pairs:
            rows = weight_of(theirs)
            if not rows.is_floating_point():
                raise ValueError(
                    f"`[RET]` cannot start from the rows of {type(theirs).__name__}, whose weight is packed in "
                    f"{rows.dtype}. Leave the embeddings out of the quantisation, as both libraries do by default."
                )
            mean = rows.float().mean(dim=0)
            ids = range(ret_token_id, ret_token_id + self.ret_embedding.num_embeddings)
            start = torch.stack([rows[i].float() if i < len(rows) else mean for i in ids])
            noise = torch.randn(start[1:].shape, generator=torch.Generator().manual_seed(0))
            start[1:] += _NOISE * rows.float().std() * noise.to(start)
            weight_of(ours).copy_(start)

    @torch.no_grad()
    def normalize_ret(self, norm: float) -> None:
        """Rescale each `[RET]` row to `norm`."""
        weight = self.ret_embedding.weight
        weight.mul_(norm / weight.norm(dim=-1, keepdim=True))


def trained_state(adapter: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their plain names; those of the active copy where PEFT has wrapped it."""
    wrapper: Any = adapter
    if "modules_to_save" in dict(adapter.named_children()):
        return wrapper.modules_to_save[wrapper.active_adapters[0]].state_dict()
    return adapter.state_dict()


__all__ = ["FromageAdapter", "trained_state"]
