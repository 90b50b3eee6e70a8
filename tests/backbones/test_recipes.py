"""Training files that quantise the language model, for a few steps at tiny size."""

import pytest
import torch
from transformers import set_seed

from modeling_fromage import FromageForConditionalGeneration
from tests.helpers.checkpoints import TRAINED_KEYS
from tests.helpers.recipes import write_data, write_tiny_backbones
from training.arguments import parse_config
from training.train import assemble, main

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("qwen3_8b_nf4_lora", []), ("qwen3_siglip2", ["quantization=int8"])],
    ids=lambda value: str(value),
)
def test_a_few_steps(recipe, more, tmp_path):
    changes = write_tiny_backbones(recipe, tmp_path) | write_data(tmp_path)
    options = [*(f"{key}={value}" for key, value in changes.items()), *more]
    output = tmp_path / "out"
    metrics = main([recipe, *options, f"output_dir={output}", "max_steps=3", "dataloader_num_workers=0"])
    assert metrics["eval_num_pairs"] == 6
    arguments, _, args = parse_config(recipe, options)
    loaded = FromageForConditionalGeneration.from_pretrained(
        output, quantization_config=arguments.quantization_config(), dtype=arguments.dtype
    )
    assert loaded.language_model.is_quantized
    set_seed(args.seed)
    _, start = assemble(arguments, dtype=arguments.dtype)
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert all(p.dtype == torch.float32 for p in start.parameters() if p.requires_grad)
    assert any("lora_A" in name for name in trained) if arguments.lora_rank else trained == TRAINED_KEYS
    state, before = loaded.state_dict(), start.state_dict()
    for name in trained - {"adapter.logit_scale"}:
        assert not torch.equal(state[name], before[name]), name


def test_the_quantisation_that_a_file_names(tmp_path):
    changes = write_tiny_backbones("qwen3_8b_nf4_lora", tmp_path)
    arguments, *_ = parse_config("qwen3_8b_nf4_lora", [f"{key}={value}" for key, value in changes.items()])
    _, model = assemble(arguments, dtype=arguments.dtype)
    config = model.language_model.config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    (peft_config,) = model.peft_config.values()
    assert (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (16, 32, 0.05)
    assert sum(type(module).__module__ == "peft.tuners.lora.bnb" for module in model.modules()) == 4
