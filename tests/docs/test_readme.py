"""The README's snippet runs, with tiny backbones in place of those it names; its commands exist."""

import re

import pytest

from hub_scripts import build_image_index, convert_original_checkpoint, make_tiny_checkpoint, push_to_hub
from modeling_fromage import FromageForConditionalGeneration
from tests.helpers.documents import README
from tests.helpers.paths import PARITY, ROOT
from training import benchmark, benchmark_answers, benchmark_index, evaluate, quickstart, train


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    case = PARITY / "case_a_opt_tied"
    for name, folder in (("openai/clip-vit-base-patch32", "vision_model"), ("facebook/opt-125m", "language_model")):
        assert name in snippet
        snippet = snippet.replace(name, str(case / folder))
    scope = {}
    exec(snippet, scope)  # noqa: S102
    assert isinstance(scope["model"], FromageForConditionalGeneration)
    assert sorted(scope["ids"][0]) == ["blue", "red"]
    assert {segment["type"] for segment in scope["answer"]} <= {"text", "image"}
    assert len(scope["chat"].messages) == 4 and len(scope["index"]) == 2 and scope["index"].backend == "faiss"
    assert len(scope["output"].ret_embeds) == 1
    assert scope["again"].config.to_dict()["ret_token_id"] == scope["processor"].ret_token_id


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets and all(f"\n{target}:" in makefile for target in targets)
    for path in re.findall(r"[\w/]+\.(?:yaml|py)\b", README):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("page", ["README.md", "docs/differences.md", "CONTRIBUTING.md"])
def test_rows_have_the_cells_of_their_tables(page):
    """A bar within a cell, as in the image token, would cut it in two."""
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert tables


@pytest.mark.parametrize(
    "main",
    [
        train.main,
        quickstart.main,
        push_to_hub.main,
        make_tiny_checkpoint.main,
        build_image_index.main,
        convert_original_checkpoint.main,
        benchmark.main,
        evaluate.main,
        benchmark_answers.main,
        benchmark_index.main,
    ],
)
def test_help(main, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0 and len(capsys.readouterr().out) > 200


def test_tiny_checkpoint_is_always_the_same(tmp_path):
    folders = [make_tiny_checkpoint.make_tiny_checkpoint(tmp_path / name) for name in "ab"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
