"""Pushing to and pulling from a Hub, through the real client, against a server on loopback."""

import json
import re
from pathlib import Path

import pytest
import torch

from hub_scripts import push_to_hub
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage.io.model_card import numbers
from tests.helpers.hub import run
from tests.helpers.hub_server import HubServer, hub_server
from tests.helpers.open_clip import write_vit
from tests.helpers.strangers import ask_stranger

ASSEMBLE = """
import sys
from modeling_fromage import FromageForConditionalGeneration, FromageProcessor

vision, text = VISION, "org/tiny-opt"
processor = FromageProcessor.from_vision_text_pretrained(vision, text, num_image_tokens=2)
model = FromageForConditionalGeneration.from_vision_text_pretrained(
    vision, text, processor=processor, projection_dim=16
)
model.save_pretrained(sys.argv[1])
processor.save_pretrained(sys.argv[1])
if len(sys.argv) > 2:
    model.push_to_hub(sys.argv[2])
    processor.push_to_hub(sys.argv[2])
"""

PUSH_AGAIN = """
import sys, time
from hub_scripts import push_to_hub

time.sleep = lambda seconds: None  # between the client's attempts
push_to_hub.load_as_a_stranger = lambda folder, repo_id: ""  # as the dry run did
push_to_hub.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(directory)
    return directory


@pytest.fixture
def hub(tiny):
    with hub_server() as server:
        for repo, folder in (("org/tiny-opt", "language_model"), ("org/tiny-clip", "vision_model")):
            server.commit(repo, {path.name: path.read_bytes() for path in (tiny / folder).iterdir()})
        yield server


def assemble(hub: HubServer, tmp_path: Path, *arguments: str, vision: str = "org/tiny-clip") -> Path:
    (tmp_path / "assemble.py").write_text(f"VISION = {vision!r}\n{ASSEMBLE}")
    run(hub, tmp_path, "assemble.py", "model", *arguments)
    return tmp_path / "model"


def ask(hub: HubServer, tmp_path: Path, repo: str) -> list:
    return ask_stranger(repo, tmp_path, **hub.environment)


def test_push_and_pull(hub, tmp_path):
    folder = assemble(hub, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_model_id"] == "org/tiny-opt"
    first_commit = hub.heads["org/tiny-opt"]
    assert config["text_model_revision"] == first_commit  # a commit, though none was asked for

    (tmp_path / "results.json").write_text(json.dumps({"text_to_image": {"R@1": 0.25}, "num_pairs": 1530, "log": [1]}))
    (tmp_path / "again.py").write_text(PUSH_AGAIN)
    push = ["model", "org/fromage", "--results", "results.json", "--data", "made up"]
    printed = run(hub, tmp_path, "-m", "hub_scripts.push_to_hub", *push, "--dry-run")
    assert "without this package" in printed and "org/fromage" not in hub.heads

    hub.faults["upload"] = 100
    error = run(hub, tmp_path, "again.py", *push, ok=False)
    assert "broke off" in error and "run the same command again" in error
    assert hub.repositories["org/fromage"][hub.heads["org/fromage"]] == {}  # nothing was committed
    hub.faults["upload"] = 0
    printed = run(hub, tmp_path, "again.py", *push)
    assert f"/org/fromage/commit/{hub.heads['org/fromage']}" in printed

    files = hub.repositories["org/fromage"][hub.heads["org/fromage"]]
    card = files["README.md"].decode()
    assert "| text_to_image R@1 | 0.25 |" in card and "| num_pairs | 1,530 |" in card and "Data: made up." in card
    assert re.search(rf"\| language model \| org/tiny-opt \| {first_commit[:8]} \| see there \|", card)
    assert "base_model:\n- org/tiny-opt\n- org/tiny-clip" in card
    assert len(files["model.safetensors"]) < 12_000  # no backbones

    # The backbone's repository moves on; the checkpoint does not follow.
    changed = dict(hub.repositories["org/tiny-opt"][first_commit])
    changed["model.safetensors"] = changed["model.safetensors"][:-4] + b"\0\0\0\0"
    hub.commit("org/tiny-opt", changed)

    hub.faults["download"] = 100
    with pytest.raises(AssertionError, match="ConnectionError: Loading org/fromage broke off.*Call again"):
        ask(hub, tmp_path, "org/fromage")
    hub.faults["download"] = 0
    found = ask(hub, tmp_path, "org/fromage")
    for logits, embeds in found:
        assert torch.equal(logits, found[0][0]) and embeds.shape == (1, 16)
    snapshot = tmp_path / "hf_home" / "hub" / "models--org--tiny-opt" / "snapshots"
    assert [path.name for path in snapshot.iterdir()] == [first_commit]


def test_an_encoder_of_open_clip(hub, tmp_path):
    """Named by its repository and commit, and loaded from there, by a stranger too, without open_clip."""
    write_vit(tmp_path / "vit")
    first_commit = hub.commit("org/vit", {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()})
    folder = assemble(hub, tmp_path, vision="open_clip:hf-hub:org/vit")
    config = json.loads((folder / "config.json").read_text())
    named = [config[f"vision_model_{field}"] for field in ("library", "id", "revision")]
    assert named == ["open_clip", "org/vit", first_commit]
    assert config["vision_model_fingerprint"].keys() == {"open_clip_model.safetensors"}
    run(hub, tmp_path, "-m", "hub_scripts.push_to_hub", "model", "org/fromage")
    card = hub.repositories["org/fromage"][hub.heads["org/fromage"]]["README.md"].decode()
    assert "base_model:\n- org/tiny-opt\n- org/vit" in card
    hub.commit("org/vit", {"README.md": b"moved on"})
    assert len(ask(hub, tmp_path, "org/fromage")) == 3


def test_both_spellings_of_license():
    for word in ("license", "licence"):
        options = push_to_hub.make_parser().parse_args(
            ["model", "org/name", f"--{word}", "mit", f"--text-{word}", "a", f"--vision-{word}", "b"]
        )
        assert (options.license, options.text_license, options.vision_license) == ("mit", "a", "b")


def test_names_of_results_stay_in_their_cell_of_the_card():
    hostile = "R@1 | 0.99 |\n\n# Best <img src=x> [of](http://all) `*\\\x1b[2J"
    ((name, value),) = numbers({"nested": {hostile: 0.25}, "log": [1]})
    assert value == "0.25" and name.isprintable()
    assert name.startswith(r"nested R@1 \| 0.99 \|\\n\\n# Best \<img src=x\> \[of\](http://all) \`\*")
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<>\[\]`*]", name)


def test_push_from_the_model_itself(hub, tmp_path):
    assemble(hub, tmp_path, "org/mine")
    files = hub.repositories["org/mine"][hub.heads["org/mine"]]
    assert {"config.json", "model.safetensors", "modeling_fromage.py", "processor_config.json"} <= files.keys()
    assert str(tmp_path) not in files["config.json"].decode()
    found = ask(hub, tmp_path, "org/mine")
    assert found[0][1].shape == (1, 16)


def test_a_changed_backbone_is_not_pushed_by_reference(hub, tmp_path):
    change = """
model.get_input_embeddings().weight.data[5] += 1
model.push_to_hub("org/changed")
"""
    (tmp_path / "change.py").write_text(f"VISION = 'org/tiny-clip'\n{ASSEMBLE}{change}")
    error = run(hub, tmp_path, "change.py", "model", "org/mine", ok=False)
    assert re.search("ValueError: The language model has other weights than org/tiny-opt.*save_backbones=True", error)
    assert "org/mine" in hub.heads and "org/changed" not in hub.heads


def test_local_backbones_are_not_pushed_by_reference(hub, tiny, tmp_path, capsys):
    arguments = [str(tiny / "fromage"), "org/tiny"]
    with pytest.raises(SystemExit):
        push_to_hub.main(arguments)
    assert "not on the Hub" in capsys.readouterr().err
    run(hub, tmp_path, "-m", "hub_scripts.push_to_hub", *arguments, "--save-backbones")
    files = hub.repositories["org/tiny"][hub.heads["org/tiny"]]
    assert "holds the frozen backbones" in files["README.md"].decode() and len(files["model.safetensors"]) > 100_000
