"""What an evaluation reports: the mean of each loss, and recall among all pairs."""

from typing import Any

import torch

from ..training_losses_fromage import LOSS_WEIGHTS
from .ranking import recall_in_both_directions


def mean_losses_and_recall(predictions: dict[str, Any]) -> dict[str, float]:
    """Metrics of the outputs of an evaluation.

    Args:
        predictions (`dict`): Of N pairs, by name: each loss, (N,), that of a batch once a pair; `image_embeds` and
            `text_embeds`, (N, projection_dim).
    """
    # The Trainer's own mean of the loss counts the last, smaller batch of a stream as a whole one.
    names = [name for name in ("loss", *LOSS_WEIGHTS) if name in predictions]
    metrics = {name: float(torch.as_tensor(predictions[name]).float().mean()) for name in names}
    if "image_embeds" in predictions:
        embeds = (torch.as_tensor(predictions[name]) for name in ("image_embeds", "text_embeds"))
        metrics |= recall_in_both_directions(*embeds)
    return metrics


__all__ = ["mean_losses_and_recall"]
