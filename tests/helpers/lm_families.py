"""Tiny language models of many families."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 98  # `<|image|>` and `[RET]` are the LM's own last two rows: it is the truth about them
IMAGE, RET, PAD = 96, 97, 1
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": None, "pad_token_id": PAD}
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False}  # fmt: skip
_GEMMA = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
         "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "max_position_embeddings": 128}  # fmt: skip
_BERT = {**_LLAMA, "is_decoder": True, "tie_word_embeddings": True}
_MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2, "head_dim": 16, "num_heads": 4,
           "n_groups": 1, "chunk_size": 8, "conv_kernel": 4}  # fmt: skip

FAMILIES = {
    # controls
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 64},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _LLAMA,
    "qwen3_moe": {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "decoder_sparse_step": 1},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    "phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "granite": {**_LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {**_LLAMA, "logit_scale": 0.25, "tie_word_embeddings": True},
    # positions or windows that padding and packing disturb
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bart": _BART,
    "trocr": {"hidden_size": 32, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
              "decoder_ffn_dim": 48, "max_position_embeddings": 128},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4,
                "window_size": 6, "max_position_embeddings": 128},
    # states beside attention, or instead of it
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    "lfm3": {**_LLAMA, "layer_types": ["conv", "full_attention"]},
    "minimax": {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4,
                "layer_types": ["linear_attention", "full_attention"]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": _MAMBA2,
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "jamba": {**_LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    "bamba": {**_LLAMA, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
              "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "zamba2": {**_LLAMA, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8,
               "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 8, "num_mem_blocks": 1,
               "hybrid_layer_ids": [1], "num_key_value_heads": 4},
    "falcon_h1": {**_LLAMA, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                  "mamba_n_groups": 1, "mamba_chunk_size": 8, "lm_head_multiplier": 0.3, "embedding_multiplier": 2.0},
    "nemotron_h": {**_LLAMA, "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3,
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
                   "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                   "moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1},
    "qwen3_next": {**_LLAMA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4},
    "granitemoehybrid": {**_LLAMA, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 24, "mamba_n_heads": 4,
                         "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "recurrent_gemma": {**_LLAMA, "lru_width": 32, "attention_window_size": 8,
                        "block_types": ["recurrent", "attention"],
                        "head_dim": 8, "tie_word_embeddings": True},
    "xlstm": {"hidden_size": 32, "embedding_dim": 32, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4,
              "chunk_size": 8, "mode": "inference"},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    # embeddings that the embedding module scales
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 64},
    "gemma3_text": {**_GEMMA, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {**_GEMMA, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
                     "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                     "num_kv_shared_layers": 0, "altup_num_inputs": 2, "intermediate_size": [48, 48],
                     "activation_sparsity_pattern": [0.0, 0.0]},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 128},
    "biogpt": {**{k: v for k, v in _LLAMA.items() if "key_value" not in k}},
    "bigbird_pegasus": {**_BART, "attention_type": "original_full", "scale_embedding": True},
    "minicpm3": {**_LLAMA, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16, "q_lora_rank": 16,
                 "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                 "num_key_value_heads": 4},
    # heads of more than a matrix
    "bert": _BERT,
    "roberta": _BERT,
    "rembert": {**_BERT, "input_embedding_size": 32, "output_embedding_size": 48},
    "modernbert-decoder": {**_LLAMA, "local_attention": 64},
    # a router that is a linear layer; embeddings scaled in place; no embeddings without ids; not causal
    "phimoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "dff": 48},
    "gemma4_text": {**_GEMMA, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
                    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
                    "global_head_dim": 8},
    "cpmant": {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}  # fmt: skip


def make_lm(family: str, spread: float = 1.0, **overrides) -> PreTrainedModel:
    """A random LM of a family, in eval mode; `spread` multiplies its matrices, so that attention and caps matter."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.forced_eos_token_id = None  # of Bart
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model
