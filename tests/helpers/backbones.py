"""Tiny random backbones, made on the spot."""

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    ResNetConfig,
    ViTConfig,
)

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, FromageProcessor
from tests.helpers.paths import PARITY

VOCAB = 500  # of the parity tokenizer, without the two tokens

_OPT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 128,
    "hidden_size": 32,
}
_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_CONFIGS = {
    "opt": lambda: OPTConfig(vocab_size=512, word_embed_proj_dim=32, **_OPT),
    "opt_350m": lambda: OPTConfig(vocab_size=512, word_embed_proj_dim=16, do_layer_norm_before=False, **_OPT),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, bos_token_id=2, eos_token_id=2, n_embd=32, n_layer=2, n_head=4, n_positions=128
    ),
    "llama": lambda: LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, num_key_value_heads=2, **_LLAMA),
    "granite": lambda: GraniteConfig(vocab_size=VOCAB, num_key_value_heads=2, logits_scaling=4.0, **_LLAMA),
    "mistral": lambda: MistralConfig(vocab_size=VOCAB, num_key_value_heads=2, sliding_window=4, **_LLAMA),
    "gemma2": lambda: Gemma2Config(
        vocab_size=512, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, **_LLAMA
    ),
}
VISION_CONFIGS = {
    "clip": lambda: CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     image_size=32, patch_size=8),
    "vit": lambda: ViTConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                             image_size=32, patch_size=8),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
}  # fmt: skip
BACKBONES = {
    "opt_clip": ("opt", "clip"),
    "opt350m_vit": ("opt_350m", "vit"),
    "gpt2_resnet": ("gpt2", "resnet"),
    "llama_clip": ("llama", "clip"),
    "gemma2_vit": ("gemma2", "vit"),
    "granite_vit": ("granite", "vit"),
}


def make_model(name: str, **config_kwargs) -> FromageForConditionalGeneration:
    text, vision = BACKBONES.get(name) or name.split("_")
    torch.manual_seed(1)
    language_model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text]())
    vision_model = AutoModel.from_config(VISION_CONFIGS[vision]())
    kwargs = {"image_token_id": VOCAB, "ret_token_id": VOCAB + 1, "num_image_tokens": 2, "projection_dim": 16}
    config = FromageConfig.from_vision_text_configs(
        vision_model.config, language_model.config, **{**kwargs, **config_kwargs}
    )
    return FromageForConditionalGeneration(config, language_model, vision_model).eval()


def make_processor(
    case: str = "case_a_opt_tied", num_image_tokens: int = 2, num_ret_tokens: int = 1
) -> FromageProcessor:
    folder = PARITY / case
    return FromageProcessor.from_vision_text_pretrained(
        str(folder / "vision_model"),
        str(folder / "language_model"),
        num_image_tokens=num_image_tokens,
        num_ret_tokens=num_ret_tokens,
    )
