"""Training with the Hugging Face Trainer."""

from .data_collator import FromageDataCollator
from .trainer import FromageTrainer, NormalizeRetEmbeddingCallback

__all__ = ["FromageDataCollator", "FromageTrainer", "NormalizeRetEmbeddingCallback"]
