"""The benchmark of the server runs on a small random model: no error, the same answers, a proper status for all."""

import json

from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from tests.helpers.pipelines import COLOURS, picture
from training import benchmark_serving


def test_benchmark_runs(tmp_path, capsys):
    checkpoint = make_tiny_checkpoint(tmp_path)
    model = FromageForConditionalGeneration.from_pretrained(checkpoint)
    processor = FromageProcessor.from_pretrained(checkpoint)
    pictures = [picture(name) for name in COLOURS]
    FromageImageIndex.build(model, processor, pictures, show_progress=False).save_pretrained(tmp_path / "index")
    benchmark_serving.main([
        str(checkpoint), "--index", str(tmp_path / "index"), "--clients", "6", "--minutes", "0.05", "--prompts", "6",
        "--hostile-minutes", "0.05", "--connections", "200", "--max-tokens", "6", "--output", str(tmp_path / "r.json"),
    ])  # fmt: skip
    results = json.loads((tmp_path / "r.json").read_text())
    assert not results["load"]["errors"] and results["load"]["requests"] > 6 and results["same_answers_after_kill"]
    assert results["load"]["answers_that_differ"] <= 0.01 * results["load"]["requests"]
    assert not results["attack"]["improper"] and not results["attack"]["good"]["errors"]
    assert all(results["attack"]["hostile"].values()) and sum(results["attack"]["connections"].values()) == 200
    assert "Hostile clients were answered" in capsys.readouterr().out
