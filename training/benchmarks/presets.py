"""Shapes of the measured backbones. Weights are random: they do not change the cost of a pass."""

import argparse
from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, OPTConfig, PreTrainedModel

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.io.command_line import device_option

from ..publishing.results import results_file, results_folder


@dataclass
class Preset:
    """Shapes of the two backbones, and the batch.

    Attributes:
        shapes: Names of the backbones.
        device: The default device.
        vocab_size: Size of the tokenizer; the image token and `[RET]` follow it.
        rows: Rows of the language model's embedding matrix, a few more than the tokenizer has.
    """

    shapes: str
    text: dict[str, int]
    vision: dict[str, int]
    batch_size: int
    rounds: int
    dtype: str
    device: str = "cpu"
    vocab_size: int = 50_265  # OPT's tokenizer
    rows: int = 50_272  # of OPT's embedding matrix

    @property
    def image_id(self) -> int:
        return self.vocab_size

    @property
    def ret_id(self) -> int:
        return self.vocab_size + 1


_OPT_125M = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12}  # fmt: skip
_OPT_6_7B = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
             "num_attention_heads": 32}  # fmt: skip
_VIT_B_32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "image_size": 224, "patch_size": 32}  # fmt: skip
_VIT_L_14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "image_size": 224, "patch_size": 14}  # fmt: skip
PRESETS = {
    "cpu": Preset("OPT-125m and ViT-B/32", _OPT_125M, _VIT_B_32, batch_size=16, rounds=15, dtype="float32"),
    "cpu_bf16": Preset("OPT-125m and ViT-B/32", _OPT_125M, _VIT_B_32, batch_size=16, rounds=15, dtype="bfloat16"),
    "paper": Preset(
        "OPT-6.7B and ViT-L/14", _OPT_6_7B, _VIT_L_14, batch_size=180, rounds=9, dtype="bfloat16", device="cuda"
    ),
    "tiny": Preset(
        "tiny shapes",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8},
        batch_size=4, rounds=3, dtype="float32", vocab_size=993, rows=1000,
    ),
}  # fmt: skip
MAX_LENGTH = 24  # tokens of a caption, BOS and [RET] included


def make_backbones(preset: Preset, device: str, rows: int | None = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A language model of `rows` vocabulary rows (the preset's by default) and a vision encoder, in eval mode."""
    torch.manual_seed(0)
    dtype = getattr(torch, preset.dtype)
    text = OPTConfig(vocab_size=rows or preset.rows, max_position_embeddings=2048, **preset.text)
    with torch.device(device):
        language_model = AutoModelForCausalLM.from_config(text, dtype=dtype)
        vision_model = AutoModel.from_config(CLIPVisionConfig(**preset.vision), dtype=dtype)
    return language_model.eval(), vision_model.eval()


def join(
    preset: Preset, language_model: PreTrainedModel, vision_model: PreTrainedModel
) -> FromageForConditionalGeneration:
    """Our model from two backbones."""
    config = FromageConfig.from_vision_text_configs(
        vision_model.config, language_model.config, image_token_id=preset.image_id, ret_token_id=preset.ret_id
    )
    model = FromageForConditionalGeneration(config, language_model, vision_model)
    model.adapter.to(language_model.device)
    return model.eval()


def add_preset_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--preset`, `--device` and `--output`."""
    parser.add_argument("--preset", default="cpu", choices=sorted(PRESETS))
    parser.add_argument("--device", type=device_option, help="cpu or cuda; by default cuda for the paper's shapes only")
    default = f"{results_folder()}/{name}_PRESET.json"
    parser.add_argument("--output", type=results_file, help=f"JSON file; by default {default}")


def choose_device(preset: str, device: str | None) -> str:
    """The requested device; by default a GPU for the paper's shapes and the CPU for others.

    Raises:
        ValueError: A GPU is needed, and there is none.
    """
    device = device or PRESETS[preset].device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--preset {preset} needs a GPU, and torch sees none.")
    return device
