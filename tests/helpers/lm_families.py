"""A tiny random language model of every model type that AutoModelForCausalLM takes."""

import dataclasses
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCAB = 98  # `<|image|>` and `[RET]` are the LM's own last two rows: it is the truth about them
IMAGE, RET, PAD = 96, 97, 1
MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MULTIMODAL_TYPES = sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())

# What a configuration's fields of these names are made; most families need no more.
SIZES = {
    "vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": None, "pad_token_id": PAD,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_head_dim": 8,
    "sliding_window": 64, "query_pre_attn_scalar": 8, "tie_word_embeddings": False, "is_decoder": True,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 24, "shared_intermediate_size": 24, "first_k_dense_replace": 1,
    "moe_shared_expert_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 64, "index_head_dim": 8, "index_n_heads": 16,
    # linear attention and states
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "state_size": 8, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, "chunk_size": 8,
    # encoders and decoders
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "ffn_dim": 48,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    # parts for images and sound
    "image_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2, "vision_output_dim": 32, "out_hidden_size": 32,
}  # fmt: skip
_GEMMA = {"tie_word_embeddings": True}
_GEMMA_LAYERS = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA2 = {"expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 1, "conv_kernel": 4}
_PER_LAYER_INPUTS = {**_GEMMA_LAYERS, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
                     "num_kv_shared_layers": 0}  # fmt: skip
_GEMMA3N = {**_PER_LAYER_INPUTS, "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [48, 48],
            "activation_sparsity_pattern": [0.0, 0.0]}  # fmt: skip
_ASSISTANT = {"backbone_hidden_size": 32,
              "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
                              "num_kv_shared_layers": 2, "global_head_dim": 8,
                              "layer_types": ["sliding_attention", "full_attention"]}}  # fmt: skip
_DOTS3 = {**_LATENT, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
          "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
          "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
_INKLING = {"layer_types": ["hybrid_sliding", "hybrid"], "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
            "swa_head_dim": 8, "sliding_window_size": 64, "d_rel": 4, "rel_extent": 16,
            "unpadded_vocab_size": VOCAB}  # fmt: skip

# What else some of them need.
ODD: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_HYBRID, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full", "scale_embedding": True},
    "codegen": {"rotary_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "ctrl": {"dff": 48},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": _DOTS3,
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": 64},
    "emu3": {"vocabulary_map": {"<image>": IMAGE}},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3, "embedding_multiplier": 2.0},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_t8", "hidden_size": 384, "num_classes": 2}},
    "florence_vision": {"patch_size": [7, 3, 3, 3], "num_heads": [1, 2, 3, 4], "num_groups": [1, 2, 3, 4],
                        "embed_dim": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "projection_dim": 32},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA_LAYERS,
    "gemma3n_text": _GEMMA3N,
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.125}, "num_classes": 2},
    "gemma4_assistant": _ASSISTANT,
    "gemma4_text": {**_PER_LAYER_INPUTS, "global_head_dim": 8},
    "gemma4_unified_assistant": _ASSISTANT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_text": {**_INKLING, "layer_types": ["sliding_attention", "full_attention"]},
    "inkling_text": _INKLING,
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "kimi_linear": {**_HYBRID, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_LATENT, "num_layers": 1, "zero_expert_num": 2},
    "mamba2": _MAMBA2,
    "minicpm3": {**_LATENT, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16},
    "minimax": {**_HYBRID, "block_size": 4},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4, "blank_token_id": VOCAB - 1},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2},
                        "audio_config": {"projection_hidden_size": 32, "projection_bias": False}},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_core_tiny_patch16_384", "num_classes": 2,
                                        "model_args": {"embed_dim": 32, "num_heads": 4, "depth": 2}}},
    "phi4_multimodal_audio": {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
                              "nemo_conv_channels": 32, "num_blocks": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
                        "tie_word_embeddings": True},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "lsh"],
                 "num_buckets": 4, "feed_forward_size": 48, "attention_head_size": 8},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "qwen3_asr": {"eos_token_id": 2},
    "qwen4_exp_text": {**_HYBRID, "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 64, "indexer_compress_ratio": 4},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "pronunciation_vocab_size": VOCAB,
                 "shape_vocab_size": VOCAB},
    "rwkv": {"attention_hidden_size": 32},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "xlm": {"causal": True, "pad_index": IMAGE},  # it counts pad tokens in its texts
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "mode": "inference"},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4, "attention_head_dim": 16},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1,
               "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1, "hybrid_layer_ids": [1],
               "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A model type's configuration with small numbers in the place of its defaults."""
    return _shrunk(CONFIG_MAPPING[model_type], {**ODD.get(model_type, {}), **overrides})


def _shrunk(config_class: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    names, aliases = {field.name for field in dataclasses.fields(config_class)}, config_class.attribute_map
    values = {key: size for name, size in SIZES.items() for key in (name, aliases.get(name)) if key in names}
    values |= own
    for name, default in getattr(config_class, "sub_configs_defaults", {}).items():
        model_type = getattr(default, "model_type", None)
        sub_class = (
            CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else getattr(default, "config_class", default)
        )
        values[name] = _shrunk(sub_class, {**ODD.get(sub_class.model_type, {}), **own.get(name, {})})
    return config_class(**values)


def make_lm(family: str, spread: float = 1.0, **overrides: Any) -> PreTrainedModel:
    """A random LM of a model type, or a multimodal model that holds one, in eval mode.

    Args:
        spread: Multiplies its matrices, so that attention and caps matter.
    """
    torch.manual_seed(3)
    config = tiny_config(family, **overrides)
    multimodal = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and (
        "text_config" in config.sub_configs or family in MULTIMODAL_TYPES
    )
    auto_class: Any = AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM
    model = auto_class.from_config(config).eval()
    model.generation_config.forced_eos_token_id = None  # of Bart
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model
