"""What the trained model does on held-out images: recall, caption loss, captions, and rankings."""

import math
from typing import Any

import torch

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageImageIndex,
    FromageProcessor,
    FromageTrainer,
)

from ..evaluation.captioning import generate_captions, score_captions
from .data import Split

_KS = (1, 5, 10)


def evaluate(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    collator: FromageDataCollator,
    trainer: FromageTrainer,
    held_out: Split,
) -> dict[str, Any]:
    """Recall in both directions, caption loss with the right and with shuffled images, captions, and the training log.

    The figures are saved for the model card.
    """
    metrics = trainer.evaluate()
    collator.training = False
    n = len(held_out.captions)
    figures: dict[str, Any] = {"num_pairs": n, "steps": trainer.state.global_step}
    for direction in ("text_to_image", "image_to_text"):
        figures[direction] = {f"R@{k}": metrics[f"eval_{direction}_R@{k}"] for k in _KS}
        figures[direction]["R@1_95%"] = wilson_interval(figures[direction]["R@1"], n)
    rows = list(range(n))
    for name, order in (("caption_loss", rows), ("caption_loss_shuffled_images", rows[n // 2 :] + rows[: n // 2])):
        figures[name], _, _ = score_captions(model, collator, held_out.features, order, held_out.captions)
    trainer.save_metrics("all", figures, combined=False)
    return {
        **figures,
        "chance": {f"R@{k}": min(1.0, k / n) for k in _KS},
        "captions": generate_captions(model, processor, held_out.features, max_new_tokens=16),
        "log_history": trainer.state.log_history,
    }


def wilson_interval(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate among n (Wilson score)."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def search_texts(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    texts: list[str],
    index: FromageImageIndex,
    top_k: int,
) -> list[list[str]]:
    """Ids of the `top_k` images that are most similar to each text."""
    inputs = processor(text=[processor.retrieval_text(text) for text in texts], return_tensors="pt", padding=True)
    embeds = model.get_text_embeds(inputs["input_ids"], inputs["attention_mask"])
    return index.search(embeds, min(top_k, len(index)))[0]
