"""The quickstart from end to end on tiny backbones and made-up data."""

import base64
import json
import os
import shutil

import datasets
import pytest

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from tests.helpers.backbones import PARITY
from training import quickstart

SMALL = ["per_device_train_batch_size=4", "use_cpu=true"]


def test_quickstart_with_own_backbones_and_data(tmp_path, capsys):
    case, output = PARITY / "case_a_opt_tied", tmp_path / "out"
    images = (PARITY / "common" / "images").resolve()
    rows = (PARITY / "common" / "captions.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [row.split("\t") for row in rows if row.count("\t") == 1]
    table = tmp_path / "data.tsv"
    lines = [f"{caption}\t{images / image}\n" for caption, image in rows]
    table.write_text("caption\timage\n" + "".join(lines), encoding="utf-8")
    options = ["--language-model", str(case / "language_model"), "--vision-model", str(case / "vision_model")]
    options += ["--data", str(table), "--output-dir", str(output), "--train-minutes", "0.1", "--prompts", "a cat"]
    quickstart.main(
        [
            "max_steps=3",
            "retrieval_warm_start_steps=5",
            "per_device_train_batch_size=4",
            "logging_steps=1",
            "use_cpu=true",
            *options,
        ]
    )

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    held_out = round(0.1 * len(lines) + 0.5)
    (test,) = results["tests"].values()
    assert test["num_pairs"] == len(test["captions"]) == len(test["rankings"]) == held_out
    assert results["steps"] == 3
    assert test["text_to_image"]["R@10"] == 1.0  # no more than ten pairs
    assert test["caption_loss"] > 0 and test["caption_loss_shuffled_images"] > 0
    assert [answer["prompt"] for answer in results["prompts"]] == ["a cat"]
    assert [turn["role"] for turn in results["conversation"]] == ["user", "model"] * 3
    printed = capsys.readouterr().out
    assert "This takes about" in printed and str(output) in printed and "Try next" in printed
    assert (output / "report.png").stat().st_size > 10_000
    assert "a cat" in (output / "report.html").read_text(encoding="utf-8")

    model = FromageForConditionalGeneration.from_pretrained(output / "model")
    FromageProcessor.from_pretrained(output / "model").check_config(model.config)
    index = FromageImageIndex.from_pretrained(output / "index")
    assert len(index) == len(lines)
    index.check_model(model)
    assert index.embeds.shape == (len(lines), model.config.projection_dim)
    answers = [turn for turn in results["conversation"] if "image_caption" in turn]
    for turn in answers:
        assert index.get(turn["image"])["caption"] == turn["image_caption"]


def rows_of(kind, tmp_path):
    """A table, or a folder, of captioned images: one of them occurs twice, one cannot be read."""
    images = sorted((PARITY / "common" / "images").glob("*.png"))[:11]
    contents = [path.read_bytes() for path in [*images, images[0]]]
    captions = [f"thing number {i}" for i in range(12)]
    if kind == "bytes":
        rows = [{"bytes": content, "path": None} for content in [*contents, b"no image"]]
        features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": rows, "caption": [*captions, "broken"]}, features=features)
        (tmp_path / "data").mkdir()
        table.to_parquet(tmp_path / "data" / "train.parquet")
        return tmp_path / "data"
    if kind == "urls":
        names = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in contents]
        names.append("https://127.0.0.1:9/private.png")  # refused without a connection
    else:
        (tmp_path / "photos").mkdir()
        for path in images:
            shutil.copy(path, tmp_path / "photos")
        names = [f"photos/{path.name}" for path in [*images, images[0]]] + ["photos/missing.png"]
    lines = [f"{caption}\t{name}" for caption, name in zip([*captions, "broken"], names, strict=True)]
    (tmp_path / "data.tsv").write_text("caption\timage\n" + "\n".join(lines) + "\n")
    return tmp_path / "data.tsv"


@pytest.mark.parametrize("kind", ["urls", "bytes", "files"])
def test_data_of_every_kind(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case, data = PARITY / "case_a_opt_tied", rows_of(kind, tmp_path)
    options = ["--language-model", str(case / "language_model"), "--vision-model", str(case / "vision_model")]
    options += ["--data", os.path.relpath(data), "--output-dir", "out", "--train-minutes", "0.1", "--prompts", "a cat"]
    quickstart.main(
        ["max_steps=1", "retrieval_warm_start_steps=2", "per_device_train_batch_size=4", "use_cpu=true", *options]
    )

    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [turn["role"] for turn in results["conversation"]] == ["user", "model"] * 3
    index = FromageImageIndex.from_pretrained("out/index", image_root=tmp_path)
    assert len(index) == (11 if kind == "files" else 12)  # the same file once
    for image_id in index.ids:
        assert index.load_image(image_id).size and index.get(image_id)["caption"].startswith("thing number")
    answers = [turn for turn in results["conversation"] if "image_caption" in turn]
    assert answers and all(index.get(turn["image"])["caption"] == turn["image_caption"] for turn in answers)
    kept = json.loads((tmp_path / "out" / "model" / "all_results.json").read_text())
    for kind in ("text_to_image", "num_pairs"):
        assert kept["held out"][kind] == results["tests"]["held out"][kind]
    processor = FromageProcessor.from_pretrained("out/model")
    assert (processor.caption_prefix, processor.caption_suffix) == ("A picture of", "\n")  # of quickstart.yaml


def test_nothing_to_train_on(tmp_path, capsys):
    """Said before training, in one line."""
    table = tmp_path / "data.tsv"
    table.write_text("caption\timage\n" + "a cat\tnone.png\n" * 12)
    case = PARITY / "case_a_opt_tied"
    options = ["--language-model", str(case / "language_model"), "--vision-model", str(case / "vision_model")]
    with pytest.raises(SystemExit):
        quickstart.main(["use_cpu=true", *options, "--data", str(table), "--output-dir", str(tmp_path / "out")])
    assert "None of the 10 images can be read. Check the paths or URLs" in capsys.readouterr().err.splitlines()[-1]
