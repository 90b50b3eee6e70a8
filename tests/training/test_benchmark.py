"""The benchmark: its baseline computes what the model does, it runs, and the README has its numbers."""

import json

import pytest
import torch

from tests.helpers.paths import ROOT
from training import benchmark, benchmark_answers, benchmark_index
from training.benchmarks import answers, index, step
from training.benchmarks.presets import MAX_LENGTH, PRESETS
from training.publishing.results import read_results, replace_between


def test_baseline_has_our_losses_and_gradients():
    preset = PRESETS["tiny"]
    sides = answers.Sides(preset, "cpu")
    model, plain = sides.model.double().train(), sides.plain.double()
    adapter = model.adapter.double()
    plain.visual_fc.load_state_dict(adapter.visual_projection.state_dict())
    with torch.no_grad():
        plain.logit_scale.copy_(adapter.logit_scale)

    batch = step.make_batch(preset, "cpu", torch.float64)
    expected = plain.loss(batch["pixel_values"], batch["tokens"], batch["lengths"])
    expected.backward()
    loss = model(**step.our_inputs(preset, batch)).loss
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
    assert set(results["seconds"]) == set(step.MODES) and all(value > 0 for value in results["seconds"].values())
    assert results["ratios"]["cached"]["operations"] > results["ratios"]["live"]["operations"] > 2
    assert 1 <= results["ratios"]["live"]["operations_over_floor"] < 1.1
    assert results["places"]["tokens"] <= results["places"]["ours"] < results["places"]["baseline"]
    assert len(results["commit"]) == 40 or results["commit"] == "no repository"
    assert "the original's algorithm" in capsys.readouterr().out


def test_answers_benchmark_runs(tmp_path, capsys):
    """Both sides write the same tokens, and give candidates the same scores."""
    benchmark_answers.main(["--preset", "tiny", "--rounds", "1", "--output", str(tmp_path / "answers.json")])
    results = json.loads((tmp_path / "answers.json").read_text())
    assert results["same_tokens"] and results["largest_score_difference"] < 1e-3
    assert results["same_ranks"] and results["largest_ranking_difference"] < 1e-3
    assert set(results["ratios"]) == {"8 tokens", "8 tokens, batch 8", "16 tokens", "16 tokens, batch 8",
                                      "100 candidates", "10 x 100 answers"}  # fmt: skip
    assert "the original's algorithm" in capsys.readouterr().out


def test_index_benchmark_runs(tmp_path, capsys):
    sizes = ["--count", "3000", "--preset", "tiny", "--lists", "16", "--images", "64", "--rounds", "2"]
    benchmark_index.main([*sizes, "--output", str(tmp_path / "index.json")])
    results = json.loads((tmp_path / "index.json").read_text())
    assert all(row["recall"] == 1 for row in results["search"].values()) and results["opening"]["count"] == 3000
    assert [row["recall"] for row in results["ivf"]] == sorted(row["recall"] for row in results["ivf"])
    assert results["ivf"][-1]["recall"] == 1  # all lists visited
    assert "IVF" in capsys.readouterr().out


def test_readme_has_the_numbers_of_the_results():
    """And they keep what is claimed."""
    pages = [page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    found = {}
    for name, module in (("benchmark", step), ("answers", answers), ("index", index)):
        found[name] = read_results(f"{name}_*.json")
        tables = [module.table(results) for results in found[name]]
        shown = [page for page in pages if f"<!-- {name}: rendered by training.benchmark -->" in page]
        assert tables and shown
        assert all(replace_between(page, name, tables, "training.benchmark") == page for page in shown)
    steps, answered, indexes = found.values()
    for result in steps:
        assert result["ratios"]["live"]["time_over_operations"] >= 1.0
        assert result["ratios"]["cached"]["time_over_operations"] >= 0.9
        assert max(result["ratios"][mode]["memory"] for mode in ("live", "cached")) <= 0.6
        assert min(result["ratios"][mode]["loader_over_step"] for mode in ("live", "cached")) > 1
    for result in answered:
        least = {"32 tokens": 2, "128 tokens": 6, "32 tokens, batch 8": 8, "100 candidates": 8, "10 x 100 answers": 8}
        assert result["same_tokens"] and result["same_ranks"]
        assert all(result["ratios"][name] >= ratio for name, ratio in least.items())
    for result in indexes:
        assert max(row["ratio"] for row in result["search"].values()) <= 1.2
        assert min(row["recall"] for row in result["search"].values()) == 1.0
        assert result["opening"]["seconds"] < 1 and result["opening"]["bytes"] < 100e6
        assert result["build"]["ratio"] >= 0.9 and result["count"] >= 1_000_000


def test_lengths_are_like_conceptual_captions():
    for count in (16, 180):
        lengths = step.caption_lengths(count)
        assert lengths.float().mean().item() == pytest.approx(11, abs=0.5) and lengths.max() <= MAX_LENGTH
