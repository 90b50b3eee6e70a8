"""Training with the Hugging Face Trainer."""

from .callbacks import NormalizeRetEmbeddingCallback
from .data_collator import FromageDataCollator
from .heartbeat import watched_processes
from .trainer import FromageTrainer

__all__ = ["FromageDataCollator", "FromageTrainer", "NormalizeRetEmbeddingCallback", "watched_processes"]
