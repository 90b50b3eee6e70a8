"""Training with the Hugging Face Trainer."""

from .callbacks import NormalizeRetEmbeddingCallback
from .data_collator import FromageDataCollator
from .trainer import FromageTrainer

__all__ = ["FromageDataCollator", "FromageTrainer", "NormalizeRetEmbeddingCallback"]
