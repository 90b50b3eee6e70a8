"""What publishing stages, and what it refuses, within this process: nothing is uploaded and nothing is started."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hub_scripts import push_to_hub
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageForConditionalGeneration
from tests.helpers.hub import uploaded
from tests.helpers.source_code import flat_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


class Hub:
    """Takes the calls of `HfApi`; models on it have the license "mit"."""

    def __init__(self):
        self.repositories, self.uploads, self.fault = [], [], None

    def __call__(self, token=None):
        return self

    def model_info(self, name, revision=None):
        assert revision == COMMIT
        return SimpleNamespace(card_data=SimpleNamespace(license="mit"))

    def create_repo(self, repo_id, private, exist_ok):
        self.repositories.append((repo_id, private))

    def upload_folder(self, folder_path, **options):
        if self.fault:
            raise self.fault
        self.uploads.append(uploaded(folder_path, options["ignore_patterns"]))
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/{COMMIT}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint that names backbones of this machine."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("publishing"))


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(push_to_hub, "HfApi", hub)
    monkeypatch.setattr(push_to_hub, "load_as_a_stranger", lambda folder, repo_id: "it loads\n")
    return hub


def push(checkpoint: Path, *options: object):
    push_to_hub.main([str(checkpoint), "org/fromage", *map(str, options)])


def test_what_is_staged(checkpoint, hub, tmp_path, capsys):
    push(checkpoint, "--save-backbones", "--dry-run", "--staging-dir", tmp_path / "staged")
    names = {path.name for path in (tmp_path / "staged").iterdir()}
    assert names == {*SETTINGS, "README.md", "model.safetensors", *(path.name for path in flat_files())}
    tensors = load_file(tmp_path / "staged" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("adapter.")} == {torch.bfloat16}
    assert {name.split(".")[0] for name in tensors} == {"adapter", "language_model", "vision_model"}
    printed = capsys.readouterr().out
    assert "it loads" in printed and f"Staged {len(names)} files" in printed
    assert not hub.repositories and not hub.uploads
    assert str(checkpoint.parent) not in "".join(path.read_text() for path in (tmp_path / "staged").glob("*.json"))


def test_card(checkpoint, hub, tmp_path, monkeypatch):
    load = FromageForConditionalGeneration.from_pretrained

    def load_from_hub(name):
        model = load(name)
        model.config.text_model_id, model.config.vision_model_id = "org/tiny-opt", "org/tiny-clip"
        model.config.text_model_revision = model.config.vision_model_revision = COMMIT
        return model

    adapter = load(checkpoint).adapter
    monkeypatch.setattr(FromageForConditionalGeneration, "from_pretrained", load_from_hub)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"image_to_text": {"R@1": 0.5}, "num_pairs": 1000}))
    push(checkpoint, "--save-backbones", "--dry-run", "--staging-dir", tmp_path / "staged",
         "--results", results, "--datasets", "org/pairs", "org/more", "--text-licence", "bsd")  # fmt: skip
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["org/pairs", "org/more"]
    assert card.data.base_model == ["org/tiny-opt", "org/tiny-clip"] and card.data.library_name == "transformers"
    assert "# fromage\n" in card.text and "holds the frozen backbones" in card.text
    assert "| language model | org/tiny-opt | 01234567 | bsd |" in card.text
    assert "| vision encoder | org/tiny-clip | 01234567 | mit |" in card.text  # as the Hub says
    assert "| image_to_text R@1 | 0.5 |" in card.text and "| num_pairs | 1,000 |" in card.text
    assert "Data: org/pairs, org/more." in card.text
    assert f"{sum(p.numel() for p in adapter.parameters()):,} trained parameters" in card.text
    assert 'from_pretrained("org/fromage", trust_remote_code=True)' in card.text
    assert "{{" not in card.text and "{%" not in card.text


def test_card_has_what_training_measured(checkpoint, hub, tmp_path):
    checkpoint = shutil.copytree(checkpoint.parent, tmp_path / "copy") / checkpoint.name
    metrics = {"eval_loss": 2.5, "eval_runtime": 3.25, "train_samples_per_second": 80.0, "log_history": [1]}
    (checkpoint / "all_results.json").write_text(json.dumps(metrics))
    push(checkpoint, "--save-backbones", "--dry-run", "--staging-dir", tmp_path / "staged")
    text = ModelCard.load(tmp_path / "staged" / "README.md").text
    assert "| eval_loss | 2.5 |" in text and "Data: not stated." in text
    assert not any(name in text for name in ("runtime", "per_second", "log_history"))


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ([], None, "not on the Hub"),  # backbones of this machine
        (["--results", "results.json", "--save-backbones"], None, "cannot be read.*--results takes a JSON file"),
        (["--results", "results.json", "--save-backbones"], "{", "cannot be read"),
        (["--results", "results.json", "--save-backbones"], "[1]", "are a list; expected metrics by their names"),
    ],
)
def test_what_is_refused(checkpoint, hub, tmp_path, monkeypatch, capsys, options, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("results.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        push(checkpoint, *options)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert re.search(message, error.splitlines()[-1])
    assert not hub.repositories and not hub.uploads


def test_one_commit(checkpoint, hub, capsys):
    push(checkpoint, "--save-backbones", "--private", "--token", "hf_secret")
    assert hub.repositories == [("org/fromage", True)] and len(hub.uploads) == 1
    assert {"README.md", "model.safetensors", "pipeline_fromage.py"} <= hub.uploads[0]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"https://hub/org/fromage/commit/{COMMIT}" and "hf_secret" not in printed


def test_what_names_files_of_this_machine_stays_here(checkpoint, hub, tmp_path):
    """Even where the folder of a run is staged in."""
    for name in ("_bad_examples.jsonl", "_bad_examples/00000-7.jsonl", "_shard_indexes/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"place": str(tmp_path)}))
    push(checkpoint, "--save-backbones", "--staging-dir", tmp_path)
    assert "README.md" in hub.uploads[0] and not any("_bad" in name or "_shard" in name for name in hub.uploads[0])


def test_an_upload_that_breaks_off(checkpoint, hub, capsys):
    hub.fault = OSError("Connection reset by peer")
    with pytest.raises(SystemExit) as exit_:
        push(checkpoint, "--save-backbones")
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "broke off: Connection reset by peer" in error and "run the same command again" in error


def test_what_does_not_load_is_not_uploaded(checkpoint, hub, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(push_to_hub, "HfApi", hub)
    snippets = []

    def run(command, input, **options):
        snippets.append(input)
        return subprocess.CompletedProcess(command, 1, "", "KeyError: 'fromage'")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="does not load where this package is missing:\nKeyError: 'fromage'"):
        push(checkpoint, "--save-backbones")
    assert "AutoModel.from_pretrained" in snippets[0] and "org/fromage" not in snippets[0]
    assert not hub.repositories and not hub.uploads
