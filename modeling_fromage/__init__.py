"""FROMAGe (arXiv 2301.13823) for the Hugging Face ecosystem."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_fromage import FromageConfig
from .data_collator_fromage import FromageDataCollator
from .modeling_fromage import FromageForConditionalGeneration, FromageOutput
from .processing_fromage import FromageProcessor
from .retrieval_fromage import FromageImageIndex
from .trainer_fromage import FromageTrainer, NormalizeRetEmbeddingCallback
from .version import __version__
from .vision_efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

AutoConfig.register("fromage", FromageConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(FromageConfig, FromageForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FromageConfig, FromageProcessor, exist_ok=True)
# Checkpoints carry the code, so that `trust_remote_code=True` loads them where this package is not installed.
FromageConfig.register_for_auto_class()
FromageForConditionalGeneration.register_for_auto_class("AutoModel")
FromageProcessor.register_for_auto_class()

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "FromageConfig",
    "FromageDataCollator",
    "FromageForConditionalGeneration",
    "FromageImageIndex",
    "FromageOutput",
    "FromageProcessor",
    "FromageTrainer",
    "NormalizeRetEmbeddingCallback",
    "__version__",
]
