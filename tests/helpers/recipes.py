"""The training files that come with the package: as published, and with tiny backbones of the same architecture."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DINOv3ViTConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
    ResNetConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

from tests.helpers.backbones import VOCAB
from tests.helpers.open_clip import write_vit
from tests.helpers.paths import IMAGES, PARITY

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
RECIPES = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"quickstart"})  # which is made from PyPI's packages

_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
           "patch_size": 14}  # fmt: skip
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
           "patch_size": 14, "image_size": 384}  # fmt: skip
_VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "patch_size": 16, "image_size": 224}  # fmt: skip
# The sizes that their repositories name. Both of Qwen's have heads of 128.
PUBLISHED: dict[str, tuple[PreTrainedConfig, PreTrainedConfig]] = {
    "gpt2_resnet50": (
        GPT2Config(),
        ResNetConfig(depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048], embedding_size=64),
    ),
    "paper": (
        OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32,
                  num_attention_heads=32, vocab_size=50272, max_position_embeddings=2048),
        CLIPVisionConfig(**_CLIP_L),
    ),
    "qwen3_siglip2": (
        Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                    num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
        SiglipVisionConfig(**_VIT_B),
    ),
    "llama3_dinov3": (
        LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
        DINOv3ViTConfig(**_VIT_B, num_register_tokens=4),
    ),
    "gemma3_siglip": (
        Gemma3TextConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
                         num_key_value_heads=4, head_dim=256, vocab_size=262208, tie_word_embeddings=True),
        SiglipVisionConfig(**_SO400M),
    ),
    "smollm3_datacomp": (
        SmolLM3Config(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                      num_key_value_heads=4, vocab_size=128256, tie_word_embeddings=True),
        CLIPVisionConfig(**_CLIP_L),
    ),
    "qwen3_8b_nf4_lora": (
        Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                    num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
        SiglipVisionConfig(**_SO400M),
    ),
}  # fmt: skip

_LM = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 2,
       "pad_token_id": 1}  # fmt: skip
_VIT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "patch_size": 8, "image_size": 32}  # fmt: skip
TINY: dict[type[PreTrainedConfig], Callable[[], PreTrainedConfig]] = {
    GPT2Config: lambda: GPT2Config(vocab_size=VOCAB, bos_token_id=2, eos_token_id=2, n_embd=64, n_layer=2, n_head=4),
    OPTConfig: lambda: OPTConfig(
        hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
    LlamaConfig: lambda: LlamaConfig(**_LM),
    Qwen3Config: lambda: Qwen3Config(**_LM, head_dim=16),
    Gemma3TextConfig: lambda: Gemma3TextConfig(**_LM, head_dim=16, query_pre_attn_scalar=16),
    SmolLM3Config: lambda: SmolLM3Config(**_LM),
    CLIPVisionConfig: lambda: CLIPVisionConfig(**_VIT),
    SiglipVisionConfig: lambda: SiglipVisionConfig(**_VIT),
    DINOv3ViTConfig: lambda: DINOv3ViTConfig(**_VIT, num_register_tokens=1),
    ResNetConfig: lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
}


def write_tiny_backbones(recipe: str, folder: Path) -> dict[str, str]:
    """Folders of random backbones of the recipe's architectures, as keys of a training file."""
    for part, published, auto in zip(
        ("language_model", "vision_model"), PUBLISHED[recipe], (AutoModelForCausalLM, AutoModel), strict=True
    ):
        skip = shutil.ignore_patterns("*.safetensors", "config.json")
        shutil.copytree(PARITY / "case_a_opt_tied" / part, folder / part, ignore=skip)
        config = TINY[type(published)]()
        if isinstance(config, Gemma3TextConfig):  # from 4B up there are multimodal checkpoints alone
            config = Gemma3Config(
                text_config=config, vision_config=SiglipVisionConfig(**_VIT), mm_tokens_per_image=4, image_token_index=3
            )
            auto = AutoModelForImageTextToText
        auto.from_config(config).save_pretrained(folder / part)
    keys = {part: str(folder / part) for part in ("language_model", "vision_model")}
    if "vision_model: open_clip:" in (CONFIGS / f"{recipe}.yaml").read_text():
        write_vit(folder / "open_clip")
        keys["vision_model"] = f"open_clip:local-dir:{folder / 'open_clip'}"
    return keys


def write_data(folder: Path) -> dict[str, str]:
    """A table of six pairs, as keys of a training file."""
    lines = [f"thing number {i}\t{path.resolve()}\n" for i, path in enumerate(sorted(IMAGES.glob("*.png"))[:6])]
    (folder / "pairs.tsv").write_text("caption\timage\n" + "".join(lines))
    return {"train_data": str(folder / "pairs.tsv"), "eval_data": str(folder / "pairs.tsv")}


def parameters(config: PreTrainedConfig) -> torch.nn.Module:
    """The model of a published configuration, without memory for its weights."""
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        return auto.from_config(config)
