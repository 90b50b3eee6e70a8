"""The training files that come with the package: their arithmetic, and a few steps of each at tiny size."""

import math
import re

import pytest
import torch
from transformers import set_seed

from modeling_fromage import FromageForConditionalGeneration
from tests.helpers.paths import ROOT
from tests.helpers.recipes import CONFIGS, PUBLISHED, RECIPES, parameters, write_data, write_tiny_backbones
from training.arguments import parse_config
from training.train import assemble, main

ELSEWHERE = {"qwen3_8b_nf4_lora"}  # tests/backbones: for bitsandbytes
ROW = re.compile(r"#   ([\w'(), .-]+?),? +([\d.]+) M parameters x ([\d.]+) bytes += ([\d.]+)")
ACTIVATIONS = re.compile(r"#   activations, (\d+) pairs x (\d+) tokens x (\d+) layers x (\d+) kB += ([\d.]+)")


def test_every_recipe_is_here():
    assert set(RECIPES) == PUBLISHED.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_arithmetic_of_memory(recipe):
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    arguments, data, args = parse_config(recipe, [])
    text_config, vision_config = PUBLISHED[recipe]
    lm, encoder = parameters(text_config), parameters(vision_config)
    width = getattr(vision_config, "hidden_sizes", [vision_config.to_dict().get("hidden_size")])[-1]
    hidden, k, q = text_config.hidden_size, arguments.num_image_tokens, arguments.projection_dim
    linear = sum(m.weight.numel() for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    count = sum(p.numel() for p in lm.parameters())
    trained = (width + 1) * hidden * k + (width + 1) * q + (hidden + 1) * q + hidden + 1
    if arguments.lora_rank:
        layers = [m for n, m in lm.named_modules() if n.rpartition(".")[2] in ("q_proj", "v_proj")]
        trained += sum(arguments.lora_rank * (m.in_features + m.out_features) for m in layers)
    known = {"vision model": sum(p.numel() for p in encoder.parameters()), "trained parts": trained}
    if arguments.quantization:
        known |= {"linear layers in nf4": linear, "embeddings and the rest": count - linear}
    else:
        known["language model"] = count
    rows = {name: tuple(map(float, numbers)) for name, *numbers in ROW.findall(text)}
    assert rows.keys() == known.keys()
    for name, (millions, size, gigabytes) in rows.items():
        assert millions == pytest.approx(known[name] / 1e6, abs=0.5 if known[name] > 1e8 else 0.05)
        assert gigabytes == pytest.approx(known[name] * size / 1e9, abs=0.0051)
    itemsize = getattr(torch, arguments.dtype).itemsize
    assert rows["vision model"][1] == itemsize and rows["trained parts"][1] == 4 * 4
    (activations,) = ACTIVATIONS.findall(text)
    pairs, tokens, layers, kilobytes, gigabytes = map(float, activations)
    assert pairs == (arguments.gradient_cache_chunk_size or args.per_device_train_batch_size)
    assert tokens == data.max_length + k and layers == text_config.num_hidden_layers
    assert gigabytes == pytest.approx(math.prod((pairs, tokens, layers, kilobytes)) / 1e6, abs=0.0051)
    listed = [float(number) for number in re.findall(r"^#   .*= ([\d.]+)$", text, re.MULTILINE)]
    assert sum(listed[:-1]) == pytest.approx(listed[-1], abs=0.0051)
    for size in re.findall(r"card of (\d+) GB", text):
        assert listed[-1] < 0.9 * int(size)


def test_the_page_lists_them_with_their_memory():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) GB \|$", (ROOT / "docs/train.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == RECIPES
    for name, gigabytes in rows:
        (total,) = re.findall(r"^#   in all += ([\d.]+)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
        assert gigabytes == f"{float(total):.1f}"


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in ELSEWHERE])
def test_a_few_steps(recipe, tmp_path):
    changes = write_tiny_backbones(recipe, tmp_path) | write_data(tmp_path)
    output = tmp_path / "out"
    metrics = main([recipe, *(f"{k}={v}" for k, v in changes.items()), f"output_dir={output}", "max_steps=2",
                    "dataloader_num_workers=0"])  # fmt: skip
    assert metrics["eval_num_pairs"] == 6 and metrics["train_loss"] > 0
    model = FromageForConditionalGeneration.from_pretrained(output)
    arguments, _, args = parse_config(recipe, [f"{k}={v}" for k, v in changes.items()])
    set_seed(args.seed)
    _, start = assemble(arguments, dtype=arguments.dtype)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    assert moved == {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert [type(part) for part in (model.language_model.config, model.vision_model.config)] == [
        type(config) for config in PUBLISHED[recipe]
    ]


def test_lora_from_a_file(tmp_path):
    changes = write_tiny_backbones("paper", tmp_path) | write_data(tmp_path) | {
        "lora_rank": "2", "lora_dropout": "0.1", "lora_target_modules": "[fc1]", "save_steps": "1", "report_to": "none",
    }  # fmt: skip
    output = tmp_path / "out"
    options = [*(f"{k}={v}" for k, v in changes.items()), f"output_dir={output}", "dataloader_num_workers=0"]
    main(["paper", *options, "max_steps=1"])
    main(["paper", *options, "max_steps=2", "resume_from_checkpoint=true"])
    model = FromageForConditionalGeneration.from_pretrained(output)
    added = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(added) == 2 and all(".fc1." in name and p.abs().sum() > 0 for name, p in added.items())
    (config,) = model.peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 4, 0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_alpha=4", "do nothing without `lora_rank`"),
        ("lora_target_modules=[q_proj]", "do nothing without `lora_rank`"),
        ("quantization=int3", "`quantization` must be one of int8, nf4 or nothing"),
        ("lora_target_modules=q_proj", "`lora_target_modules` must be"),
    ],
)
def test_keys_that_make_no_sense_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        parse_config("paper", [override])


@pytest.mark.parametrize(("key", "package"), [("quantization=nf4", "bitsandbytes"), ("quantization=int8", "torchao")])
def test_what_is_not_installed_is_named(key, package, monkeypatch):
    monkeypatch.setattr("training.arguments.find_spec", lambda name: None)
    arguments, *_ = parse_config("paper", [key])
    with pytest.raises(ImportError, match=f"`{key.replace('=', ': ')}` needs the package {package}: pip install"):
        arguments.quantization_config()
    with pytest.raises(ImportError, match="`lora_rank` needs the package peft"):
        parse_config("paper", ["lora_rank=4"])[0].lora_config()
