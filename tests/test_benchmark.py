"""The benchmark: its baseline computes what the model does, it runs, and the README has its numbers."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, OPTConfig

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from tests.test_readme import README
from training import benchmark
from training.baseline import PlainFromage
from training.benchmark import IMAGE_ID, MAX_LENGTH, PRESETS, RET_ID


def test_baseline_has_our_losses_and_gradients():
    preset = PRESETS["tiny"]
    text = OPTConfig(vocab_size=50_272, max_position_embeddings=64, **preset.text)
    language_model = AutoModelForCausalLM.from_config(text).double()
    vision_model = AutoModel.from_config(CLIPVisionConfig(**preset.vision)).double()
    config = FromageConfig.from_vision_text_configs(
        vision_model.config, language_model.config, image_token_id=IMAGE_ID, ret_token_id=RET_ID
    )
    model = FromageForConditionalGeneration(config, language_model, vision_model).train()
    adapter = model.adapter.double()

    trimmed = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=RET_ID + 1, max_position_embeddings=64, **preset.text)
    ).double()
    weights = language_model.state_dict()
    names = [name for name, weight in weights.items() if len(weight) == 50_272]
    trimmed.load_state_dict({**weights, **{name: weights[name][: RET_ID + 1] for name in names}})
    plain = PlainFromage(trimmed, vision_model).double()
    plain.visual_embeddings.load_state_dict(adapter.multi_modal_projector.state_dict())
    plain.visual_fc.load_state_dict(adapter.visual_projection.state_dict())
    plain.text_fc.load_state_dict(adapter.text_projection[0].state_dict())
    with torch.no_grad():
        plain.embeddings.weight[-1] = adapter.ret_embedding.weight[0]
        plain.logit_scale.copy_(adapter.logit_scale)

    batch = benchmark.make_batch(preset, "cpu", torch.float64)
    expected = plain.loss(batch["pixel_values"], batch["tokens"], batch["lengths"])
    expected.backward()
    loss = model(**benchmark.our_inputs(batch)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the baseline takes logits in fp32
    for ours, theirs in [
        (adapter.multi_modal_projector.weight.grad, plain.visual_embeddings.weight.grad),
        (adapter.visual_projection.weight.grad, plain.visual_fc.weight.grad),
        (adapter.text_projection[0].weight.grad, plain.text_fc.weight.grad),
        (adapter.ret_embedding.weight.grad[0], plain.embeddings.weight.grad[-1]),
        (adapter.logit_scale.grad, plain.logit_scale.grad),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_benchmark_runs(tmp_path, capsys):
    benchmark.main(["--preset", "tiny", "--output", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["seconds"]) == set(benchmark.MODES) and all(value > 0 for value in results["seconds"].values())
    assert results["ratios"]["cached"]["operations"] > results["ratios"]["live"]["operations"] > 2
    assert 1 <= results["ratios"]["live"]["operations_over_floor"] < 1.1
    assert results["places"]["tokens"] <= results["places"]["ours"] < results["places"]["baseline"]
    assert len(results["commit"]) == 40 or results["commit"] == "no repository"
    assert "the original's algorithm" in capsys.readouterr().out


def test_readme_has_the_numbers_of_the_results():
    results = benchmark.load_results()
    assert results
    assert benchmark.render(README, results) == README
    for result in results:  # what the README claims of the step
        assert result["ratios"]["live"]["time_over_operations"] >= 1.0
        assert result["ratios"]["cached"]["time_over_operations"] >= 0.9
        assert max(result["ratios"][mode]["memory"] for mode in ("live", "cached")) <= 0.6
        assert min(result["ratios"][mode]["loader_over_step"] for mode in ("live", "cached")) > 1


def test_lengths_are_like_conceptual_captions():
    for count in (16, 180):
        lengths = benchmark.caption_lengths(count)
        assert lengths.float().mean().item() == pytest.approx(11, abs=0.5) and lengths.max() <= MAX_LENGTH
