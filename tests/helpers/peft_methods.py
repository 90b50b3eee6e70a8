"""PEFT's methods, as small as they go: those that change layers, and those that put something before the text."""

from collections.abc import Callable

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

WITHIN_LM = r"language_model\..*\.(q_proj|v_proj)"
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda **kwargs: LoraConfig(r=2, init_lora_weights="gaussian", **kwargs),
    "rslora": lambda **kwargs: LoraConfig(r=2, use_rslora=True, **kwargs),
    "dora": lambda **kwargs: LoraConfig(r=2, use_dora=True, **kwargs),
    "ia3": lambda **kwargs: IA3Config(feedforward_modules=[], **kwargs),
    "loha": lambda **kwargs: LoHaConfig(r=2, **kwargs),
    "lokr": lambda **kwargs: LoKrConfig(r=2, **kwargs),
    "oft": lambda **kwargs: OFTConfig(oft_block_size=4, r=0, **kwargs),
    "boft": lambda **kwargs: BOFTConfig(boft_block_size=4, **kwargs),
    "vera": lambda **kwargs: VeraConfig(r=4, **kwargs),
    "adalora": lambda **kwargs: AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=2, tfinal=5, **kwargs),
}
PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}
