"""Evaluations from Python: data and settings, called with a model in hand."""

import inspect
import json

import pytest

from tests.helpers.backbones import PARITY, make_model, make_processor
from training.evaluate import make_parser
from training.evaluation import EVALUATORS, CaptioningEvaluator, VisdialEvaluator, VistEvaluator

IMAGES = PARITY / "common" / "images"


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [f"a thing of number {i}\t{IMAGES / f'img_{i:03d}.png'}" for i in range(6)]
    path.write_text("caption\timage\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_metrics_by_names_with_directions(pairs):
    evaluator = CaptioningEvaluator(data=pairs, tasks=["retrieval", "perplexity"])
    model, processor = make_model("opt_clip"), make_processor()
    metrics, results = evaluator(model, processor), evaluator.run(model, processor).results
    assert evaluator.primary_metric == "text_to_image_R@1" and evaluator.greater_is_better
    for direction in ("text_to_image", "image_to_text"):
        for name, value in results["retrieval"][direction]["ours"].items():
            assert metrics[f"{direction}_{name}"] == value
    assert metrics["perplexity"] == results["perplexity"]["perplexity"] and metrics["text_to_image_N"] == 6
    assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_primary_metrics(tmp_path):
    lower = CaptioningEvaluator(data="x", tasks=["perplexity"])
    assert lower.primary_metric == "perplexity" and not lower.greater_is_better
    assert CaptioningEvaluator(data="x", tasks=["captions", "perplexity"]).primary_metric == "CIDEr"
    of_answers = VisdialEvaluator(data=tmp_path, images=tmp_path)
    assert of_answers.primary_metric == "dialogue_to_answer_MRR"
    assert VisdialEvaluator(data=tmp_path, images=tmp_path, dense=tmp_path).primary_metric == "dialogue_to_answer_NDCG"
    figures = {"answers": {"ours": {"MRR": 0.5, "MRR_by_round": [0.5]}, "dual encoder": {"MRR": 0.25}},
               "retrieval": {"10": {"image_to_dialogue": {"ours": {"R@1": 0.125}}}}}  # fmt: skip
    assert of_answers.metrics(figures) == {
        "dialogue_to_answer_MRR": 0.5,
        "dialogue_to_answer_dual_encoder_MRR": 0.25,
        "rounds_10_image_to_dialogue_R@1": 0.125,
    }
    of_retrieval = VisdialEvaluator(data=tmp_path, images=tmp_path, tasks=["retrieval"])
    assert of_retrieval.primary_metric in of_retrieval.metrics(figures)
    of_stories = VistEvaluator(data=[tmp_path], images=tmp_path)
    figures = {"settings": {"5 captions + 4 images": {"ours": {"R@1": 0.5, "N": 4}}}}
    assert of_stories.metrics(figures)[of_stories.primary_metric] == 0.5


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda cls: cls.name)
def test_every_argument_is_an_option(evaluator):
    """So the command can make any of them: its options are the arguments, and its defaults theirs."""
    options = make_parser().parse_args([evaluator.name, "MODEL", "--data", "x", "--images", "y"])
    for name, argument in inspect.signature(evaluator).parameters.items():
        if name == "scores":  # the command's own place for it
            continue
        assert hasattr(options, name), name
        if name == "protocol":
            assert evaluator.protocols[options.protocol] is argument.default
        elif argument.default is not inspect.Parameter.empty and name != "images":
            found = getattr(options, name)
            assert found == (list(argument.default) if isinstance(found, list) else argument.default), name


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda cls: cls.name)
def test_protocols_say_their_names(evaluator):
    assert all(protocol.name == name for name, protocol in evaluator.protocols.items())


def test_an_evaluation_of_ones_own(tmp_path, monkeypatch, capsys):
    """One class, and its name in EVALUATORS: the command takes it."""
    from pathlib import Path
    from typing import ClassVar

    from training import evaluate
    from training.evaluation.evaluator import Evaluation, Evaluator

    class WidthEvaluator(Evaluator):
        """The width of the shared space."""

        name: ClassVar[str] = "width"
        sections: ClassVar[dict[str, str]] = {"space": "shared"}
        primary_metric = "shared_width"
        data_files: ClassVar[list[Path]] = []

        @classmethod
        def add_options(cls, parser):
            pass

        def run(self, model, processor):
            return Evaluation({"space": {"width": float(model.config.projection_dim)}}, {})

    make_model("opt_clip").save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(evaluate, "EVALUATORS", (*EVALUATORS, WidthEvaluator))
    evaluate.main(["width", str(tmp_path / "model"), "--output", str(tmp_path / "width.json")])
    assert json.loads((tmp_path / "width.json").read_text())["primary_metric"] == {"shared_width": 16.0}
    assert "space: width 16.0000" in capsys.readouterr().out
