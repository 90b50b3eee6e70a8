"""What a run ends with: the best model, the curves, and a model card that says what was measured."""

import json

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from modeling_fromage import FromageForConditionalGeneration
from modeling_fromage.io.model_card import CardFacts, eval_results, numbers
from tests.helpers.backbones import PARITY
from training import curves
from training.train import main, name_sources, parse_config

CASE = PARITY / "case_a_opt_tied"
IMAGES = (PARITY / "common" / "images").resolve()
BEST = "eval_text_to_image_R@1"


@pytest.fixture
def config(tmp_path):
    pairs = tmp_path / "pairs.tsv"
    rows = "".join(f"picture {i}\t{IMAGES / f'img_{i:03d}.png'}\n" for i in range(8))
    pairs.write_text(f"caption\timage\n{rows}", encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"language_model: {CASE / 'language_model'}\nvision_model: {CASE / 'vision_model'}\nprojection_dim: 16\n"
        f"train_data: {pairs}\neval_data: {pairs}\noutput_dir: {tmp_path / 'out'}\nlogging_steps: 1\n"
        "per_device_train_batch_size: 4\nlearning_rate: 0.02\nreport_to: none\nuse_cpu: true\ndisable_tqdm: true\n"
        "eval_strategy: steps\neval_steps: 1\neval_samples: 0\nsave_steps: 1\n"
    )
    return str(path)


def test_best_checkpoint_early_stopping_curves_and_card(config, tmp_path):
    """The best of a constant metric is the first: two evaluations later the run stops, and goes back to it."""
    metrics = main([config, "max_steps=6", "learning_rate=0", "load_best_model_at_end=true",
                    f"metric_for_best_model={BEST}", "early_stopping_patience=2", "num_train_epochs=1"])  # fmt: skip
    output = tmp_path / "out"
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and state["best_model_checkpoint"].endswith("checkpoint-1")
    assert state["best_metric"] == metrics[BEST]

    with Image.open(output / curves.FILE) as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors()) > 20

    card = ModelCard.load(output / "README.md")
    found = {result.metric_name.split(" among ")[0]: result for result in card.data.eval_results}
    directions = [
        f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5)
    ]  # of 8, any model finds all by 10
    assert found.keys() == {"captioning_loss", *directions}
    for name, result in found.items():
        assert result.metric_value == metrics[f"eval_{name}"]
        assert (result.dataset_name, result.dataset_split) == ("pairs.tsv", None)
    assert found["text_to_image_R@1"].metric_name.endswith("among 8 pairs")
    assert found["text_to_image_R@5"].metric_type == "recall_at_5"
    assert "Data: pairs.tsv." in card.text
    assert "| learning_rate | 0 |" in card.text and "| steps taken | 3 |" in card.text
    assert f"| eval_loss | {metrics['eval_loss']:.4g} |" in card.text and "eval_runtime" not in card.text
    assert str(tmp_path) not in (output / "README.md").read_text() + (output / "training_run.json").read_text()
    assert "{{" not in card.text and "This repository holds the frozen backbones" in card.text
    model = FromageForConditionalGeneration.from_pretrained(output)
    assert f"{sum(p.numel() for p in model.adapter.parameters()):,} trained parameters" in card.text


def test_the_card_is_of_the_best_model(config, tmp_path):
    metrics = main([config, "max_steps=4", "load_best_model_at_end=true", f"metric_for_best_model={BEST}",
                    "learning_rate=0.05"])  # fmt: skip
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == metrics[BEST] == max(entry[BEST] for entry in state["log_history"] if BEST in entry)
    results = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert {r.metric_value for r in results if r.metric_name.startswith(f"{BEST[5:]} ")} == {metrics[BEST]}


@pytest.mark.parametrize("overrides", [["early_stopping_patience=2"], ["early_stopping_patience=0"]])
def test_early_stopping_without_a_best_model_is_refused(config, overrides):
    with pytest.raises(ValueError, match="early_stopping_patience.*load_best_model_at_end.*metric_for_best_model"):
        parse_config(config, overrides)


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        curves.plot_curves([{"step": 1, "loss": 2.0}], tmp_path)
    assert "pip install matplotlib" in caplog.text and not list(tmp_path.iterdir())


def test_curves_of_a_log():
    history = [
        {"step": 10, "loss": 3.0, "learning_rate": 0.1, "memory_gb": 4.0},
        {"step": 10, "eval_loss": 2.5, BEST: 0.25},
        {"step": 20, "loss": 2.0, "learning_rate": 0.05},
        {"step": 20, "train_runtime": 5.0},
        {"step": 20, "eval_loss": 2.2, BEST: 0.3},
        {"step": 20, "eval_loss": 2.5, BEST: 0.25},  # of the best model, at the end
    ]
    found = curves.curves(history)
    assert found == {"loss": ([10, 20], [3.0, 2.0]), "learning_rate": ([10, 20], [0.1, 0.05]),
                     "eval_loss": ([10, 20], [2.5, 2.2]), BEST: ([10, 20], [0.25, 0.3])}  # fmt: skip


def test_no_chance_levels_among_results():
    results = {"eval_text_to_image_R@1": 0.5, "eval_num_pairs": 1000, "text_to_image": {"R@1": 0.5},
               "chance": {"R@1": 0.001}, "eval_runtime": 3.0}  # fmt: skip
    assert [name for name, _ in numbers(results)] == ["eval_text_to_image_R@1", "eval_num_pairs", "text_to_image R@1",
                                                      "eval_runtime"]  # fmt: skip
    source = {"name": "org/pairs", "split": "validation", "on_hub": True}
    (result,) = eval_results(CardFacts(results, {"data": {"eval": [source]}}))
    assert (result.metric_value, result.dataset_type, result.dataset_split) == (0.5, "org/pairs", "validation")
    assert result.metric_name == "text_to_image_R@1 among 1,000 pairs"
    assert eval_results(CardFacts(results)) == []  # of unknown data


def test_names_of_data(tmp_path):
    (tmp_path / "mine.tsv").touch()
    assert name_sources(str(tmp_path / "mine.tsv"), "train") == [{"name": "mine.tsv", "split": None, "on_hub": False}]
    several = [{"source": "org/a", "weight": 2, "split": "all"}, str(tmp_path), f"{tmp_path}/*.tar"]
    assert name_sources(several, "train") == [
        {"name": "org/a", "split": "all", "on_hub": True},
        {"name": tmp_path.name, "split": "train", "on_hub": False},
        {"name": "*.tar", "split": None, "on_hub": False},
    ]
    assert name_sources(None, "validation") == []
