"""The README: no output stands in it that a stored run did not print, and its claims are true."""

import json

import torch
from transformers import CLIPVisionConfig, OPTConfig

from modeling_fromage import FromageConfig
from modeling_fromage.adapter_fromage import FromageAdapter
from tests.helpers.pages import read
from tests.helpers.store_quickstart import STORED, render


def test_outputs_are_those_of_the_stored_run():
    text = read("README.md")
    assert render(text, json.loads(STORED.read_text(encoding="utf-8"))) == text


def test_outputs_are_rendered_behind_their_snippets():
    results = json.loads(STORED.read_text(encoding="utf-8"))
    page = "```python\nprint(1)\n```\n\n```text\nold\n```\n\n```python\nx = 2\n```\n"
    results["readme"] = [{"code": "print(1)\n", "output": "1\n"}, {"code": "x = 2\n", "output": ""}]
    rendered = render(page, results)
    assert rendered == "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nx = 2\n```\n"
    assert render(rendered, {**results, "readme": []}).count("```text") == 0


def test_length_and_size():
    """About a hundred lines, and the size of the trained part that it states."""
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    text_config = OPTConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, ffn_dim=16384)
    vision_config = CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    config = FromageConfig.from_vision_text_configs(vision_config, text_config)
    with torch.device("meta"):
        adapter = FromageAdapter(config, 4096, 4096)
    count = sum(parameter.numel() for parameter in adapter.parameters())
    assert f"{2 * count / 1e6:.0f} MB in bfloat16" in text
