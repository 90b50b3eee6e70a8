"""FROMAGe (arXiv 2301.13823) for the Hugging Face ecosystem."""

from .io.torchvision_operators import supply_missing_operators

supply_missing_operators()  # before transformers looks for torchvision

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_fromage import FromageConfig
from .images_fromage import ImageLimits, UnreadableImageError
from .index.index import FromageImageIndex
from .modeling_fromage import FromageForConditionalGeneration, FromageOutput
from .pipeline_fromage import TASK, FromageChat, FromagePipeline
from .processing_fromage import FromageProcessor
from .trainer.data_collator import FromageDataCollator
from .trainer.trainer import FromageTrainer, NormalizeRetEmbeddingCallback
from .version import __version__
from .vision_efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

AutoConfig.register("fromage", FromageConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(FromageConfig, FromageForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FromageConfig, FromageProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=FromagePipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)
# Checkpoints carry the code, so that `trust_remote_code=True` loads them where this package is not installed.
FromageConfig.register_for_auto_class()
FromageForConditionalGeneration.register_for_auto_class("AutoModel")
FromageProcessor.register_for_auto_class()

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "FromageChat",
    "FromageConfig",
    "FromageDataCollator",
    "FromageForConditionalGeneration",
    "FromageImageIndex",
    "FromageOutput",
    "FromagePipeline",
    "FromageProcessor",
    "FromageTrainer",
    "ImageLimits",
    "NormalizeRetEmbeddingCallback",
    "UnreadableImageError",
    "__version__",
]
