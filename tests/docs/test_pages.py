"""Every page: its snippets run, its commands are accepted by the real parsers, its files and links exist."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import TrainingArguments, pipeline

from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from modeling_fromage.index.backends import BACKENDS
from tests.helpers import pages
from tests.helpers.open_clip import write_vit
from tests.helpers.paths import IMAGES, PARITY, ROOT
from training.arguments import parse_config
from training.cli import COMMANDS
from training.evaluation import EVALUATORS

CASE = PARITY / "case_a_opt_tied"
EMOJI = ("1f427.twemoji", "1f989.twemoji", "1f451.twemoji")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with what the pages name: photos, pairs, a model, and the output of a quickstart."""
    monkeypatch.chdir(tmp_path)
    photos = sorted(IMAGES.glob("*.png"))[:10]
    Path("photos").mkdir()
    for photo in photos:
        shutil.copy(photo, "photos")
    lines = [f"thing number {number}\tphotos/{photo.name}\n" for number, photo in enumerate(photos)]
    Path("pairs.tsv").write_text("caption\timage\n" + "".join(lines))
    for name, chosen in (("cat", photos[:4]), ("dog", photos[4:])):
        Path("classes", name).mkdir(parents=True)
        for photo in chosen:
            shutil.copy(photo, Path("classes", name))
    shutil.copytree(CASE / "fromage_model", "fromage_model")
    write_vit(Path("open_clip_vit"))
    tiny = make_tiny_checkpoint(tmp_path / "org")
    quickstart = Path("outputs", "quickstart")
    (quickstart / "data" / "images").mkdir(parents=True)
    for photo, name in zip(photos, EMOJI, strict=False):
        shutil.copy(photo, quickstart / "data" / "images" / f"{name}.png")
    model, processor = FromageForConditionalGeneration.from_pretrained(tiny), FromageProcessor.from_pretrained(tiny)
    model.save_pretrained(quickstart / "model", save_backbones=True)
    processor.save_pretrained(quickstart / "model")
    files = sorted((quickstart / "data" / "images").glob("*.png"))
    rows = [{"image": str(file), "caption": file.stem} for file in files]
    index = FromageImageIndex.build(model, processor, rows, show_progress=False)
    index.save_pretrained(quickstart / "index")
    return tmp_path


def run_snippets(page: str) -> dict:
    """The page's Python snippets, run one after the other in one namespace."""
    code = pages.with_tiny_backbones("\n".join(pages.blocks(page, "python")), CASE)
    code = code.replace("modeling_fromage.training", "training")  # its name in a checkout
    scope: dict = {"__name__": "snippets"}
    sys.modules["snippets"] = type(sys)("snippets")  # where dataclasses look for it
    try:
        exec(compile(code, page, "exec"), scope)  # noqa: S102
    finally:
        del sys.modules["snippets"]
    return scope


def test_readme_snippets(place, capsys):
    scope = run_snippets("README.md")
    assert len(scope["pipe"].search("red", top_k=3)) == 3
    assert capsys.readouterr().out


def test_use(place):
    scope = run_snippets("docs/use.md")
    assert sorted(scope["ids"][0]) == ["blue", "red"]
    assert {segment["type"] for segment in scope["answer"]} <= {"text", "image"}
    assert len(scope["chat"].messages) == 4 and scope["likelihoods"].shape == (1, 3)
    assert len(scope["output"].ret_embeds) == 1
    assert scope["again"].config.ret_token_id == scope["processor"].ret_token_id


def test_index(place):
    scope = run_snippets("docs/index.md")
    assert len(scope["again"]) == len(scope["index"]) == 10 and scope["image"].size


def test_train(place):
    scope = run_snippets("docs/train.md")
    assert scope["metrics"]["eval_num_pairs"] == 10 and (place / "outputs" / "mine" / "config.json").is_file()


def test_evaluate(place):
    scope = run_snippets("docs/evaluate.md")
    assert 0 <= scope["metrics"]["text_to_image_R@1"] <= 1
    for evaluator in EVALUATORS:
        assert evaluator.name in pages.read("docs/evaluate.md")


def test_extending(place, monkeypatch):
    monkeypatch.setitem(BACKENDS, "truncated", None)  # so that it is taken out again
    scope = run_snippets("docs/extending.md")
    assert scope["index"].backend == "truncated" and 0 <= scope["metrics"]["accuracy"] <= 1
    pairs = Dataset.from_csv("pairs.tsv", sep="\t")
    arguments = TrainingArguments(
        "outputs/hinge", max_steps=1, per_device_train_batch_size=4, report_to="none", save_strategy="no"
    )
    trainer = scope["HingeTrainer"](
        model=scope["model"], args=arguments, train_dataset=pairs, processing_class=scope["processor"]
    )
    before = scope["model"].adapter.visual_projection.weight.clone()
    trainer.train()
    assert not torch.equal(scope["model"].adapter.visual_projection.weight, before)  # only this loss trains it


TRY_DIFFS = """
from tests.helpers.checkpoints import assemble
from tests.helpers.paths import PARITY
from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration
from PIL import Image
model, processor = assemble(PARITY / "case_a_opt_tied", projector_type="gated", contrastive_loss_type="hinge")
batch = FromageDataCollator(processor)([{"image": Image.new("RGB", (8, 8)), "caption": name} for name in ("a", "b")])
output = model.train()(**batch)
output.loss.backward()
assert model.adapter.multi_modal_projector.gate.weight.grad.abs().sum() > 0
(a, b), (c, d) = output.logits_per_image.tolist()
hinges = sum(max(0, 1 + other - own) for own in (a, d) for other in (b, c)) / 2
assert abs(output.contrastive_loss - hinges) < 1e-4
model.save_pretrained("gated")
assert FromageForConditionalGeneration.from_pretrained("gated").config.projector_type == "gated"
"""


def test_diffs_apply_and_run(tmp_path):
    for folder in ("modeling_fromage", "hub_scripts", "tests/helpers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")
    diffs = pages.blocks("docs/extending.md", "diff")
    subprocess.run(["git", "apply"], cwd=tmp_path, input="".join(diffs), text=True, check=True)
    assert len(diffs) == 2
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", TRY_DIFFS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]


# ---- commands ----


class Accepted(Exception):
    """The parser took the arguments."""


@pytest.fixture
def parse_only(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Accepted(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The module that a line runs, and its arguments."""
    if words[0] == "fromage":
        return COMMANDS[words[1]].module, words[2:]
    at = words.index("-m")
    return words[at + 1].removeprefix("modeling_fromage."), words[at + 2 :]


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_are_accepted(page, place, parse_only):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for yaml_block in pages.blocks(page, "yaml"):
        Path("mine.yaml").write_text(pages.with_tiny_backbones(yaml_block, CASE))
    for words in pages.commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] in ("fromage", "torchrun") or words[1:2] == ["-m"] and words[2] not in ("build", "venv"):
            module, arguments = module_and_arguments(words)
            with pytest.raises(Accepted) as accepted:
                import_module(module).main(arguments)
            if module == "training.train":
                options = accepted.value.args[0]
                parse_config(options.config, options.overrides)
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words) if "pip" in words else ""):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), words


@pytest.mark.parametrize("page", pages.PAGES)
def test_modules_and_paths_exist(page):
    text = pages.read(page)
    for module in re.findall(r"`python -m ((?:training|hub_scripts|tests)[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for path in set(re.findall(r"`((?:modeling_fromage|training|hub_scripts|tests|docs)/[\w/.-]*)`", text)):
        assert (ROOT / path).exists(), path
    for target in pages.links(page):
        assert target.exists(), target


def test_commands_of_the_install_page_are_all_there_are():
    rows = re.findall(r"^\| `fromage ([\w-]+)` \| `python -m ([\w.]+)`", pages.read("docs/install.md"), re.MULTILINE)
    assert dict(rows) == {name: command.module for name, command in COMMANDS.items()}


def test_the_readme_links_to_every_page():
    linked = {target.resolve() for page in ("README.md", "CONTRIBUTING.md") for target in pages.links(page)}
    assert {path.resolve() for path in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("page", pages.PAGES)
def test_rows_have_the_cells_of_their_tables(page):
    """A bar within a cell, as in the image token, would cut it in two."""
    for table in re.findall(r"(?:^\|.*\n)+", pages.read(page), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def command(name: str, *arguments: str) -> None:
    import_module(COMMANDS[name].module).main(list(arguments))


def test_from_pairs_to_search(place):
    """The README's commands from a table of pairs to an index, on ten pictures."""
    (text,) = pages.blocks("README.md", "yaml")
    config = yaml.safe_load(pages.with_tiny_backbones(text, CASE))
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    command("train", "mine.yaml", "per_device_train_batch_size=5", "learning_rate=3.0e-4", "max_steps=1",
            "use_cpu=true", "report_to=none")  # fmt: skip
    evaluation = ["--data", "pairs.tsv", "--tasks", "retrieval", "perplexity", "--device", "cpu"]
    command("evaluate", "captions", "outputs/mine", *evaluation)
    command("index", "outputs/mine", "photos/", "photos-index", "--device", "cpu")
    assert len(FromageImageIndex.from_pretrained("photos-index")) == 10


def test_the_authors_model(place):
    """The README's commands for it, on a checkpoint in the authors' format."""
    backbones = ["--language-model", str(CASE / "language_model"), "--vision-model", str(CASE / "vision_model")]
    command("convert", "--checkpoint-dir", "fromage_model", "--output-dir", "my-fromage", *backbones)
    command("index", "my-fromage", "photos/", "photos-index", "--device", "cpu")
    pipe = pipeline("interleaved-generation", model="my-fromage", index="photos-index", image_root="photos")
    assert pipe.search("a cat", top_k=1)[0]["image"].size


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        command(name, "--help")
    assert exit_.value.code == 0 and len(capsys.readouterr().out) > 200


def test_tiny_checkpoint_is_always_the_same(tmp_path):
    folders = [make_tiny_checkpoint(tmp_path / name) for name in "ab"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
