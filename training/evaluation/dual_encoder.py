"""The baseline: an image-text dual encoder (CLIP, SigLIP), often the one that the model's vision tower comes from."""

from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
)


class DualEncoder:
    """Unit-norm embeddings of images and texts in one space.

    Texts that exceed the text encoder's context are truncated; `truncated` counts them.
    """

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any):
        self.model, self.image_processor, self.tokenizer = model.eval(), image_processor, tokenizer
        self.max_length = model.config.get_text_config().max_position_embeddings
        self.truncated = 0

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
    ) -> "DualEncoder":
        """Load a dual encoder with its image processor and tokenizer.

        Raises:
            ValueError: The checkpoint is not an image-text dual encoder.
        """
        config = AutoConfig.from_pretrained(name, revision=revision)
        if type(config) not in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING:
            raise ValueError(
                f"{name} is a {config.model_type}, which has no text encoder: there is no baseline for it."
                " Leave --dual-encoder out, or name a CLIP or SigLIP model."
            )
        model = AutoModelForZeroShotImageClassification.from_pretrained(name, revision=revision, dtype=dtype)
        processors = [auto.from_pretrained(name, revision=revision) for auto in (AutoImageProcessor, AutoTokenizer)]
        return cls(model.to(device), *processors)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """(channels, height, width)."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def image_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, channels, height, width) -> (N, d), on the CPU, in fp32."""
        output = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1).cpu()

    @torch.no_grad()
    def text_embeds(self, texts: list[str], batch_size: int = 256, show_progress: bool = True) -> torch.Tensor:
        """(N, d), on the CPU, in fp32."""
        embeds = []
        for start in tqdm(range(0, len(texts), batch_size), desc="Encoding texts", disable=not show_progress):
            some = texts[start : start + batch_size]
            ids = self.tokenizer(some).input_ids
            self.truncated += sum(len(row) > self.max_length for row in ids)
            inputs = self.tokenizer(
                some, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            output = self.model.get_text_features(**inputs)
            embeds.append(F.normalize(output.pooler_output.float(), dim=-1).cpu())
        return torch.cat(embeds)
