"""The Space that holds the page: what is staged, and one commit to a Hub on loopback. tests/apps runs its app.py."""

import ast
import re
import tomllib

import pytest
from huggingface_hub import HfApi, SpaceCard
from packaging.requirements import Requirement

from hub_scripts import push_space
from hub_scripts.demo import make_parser
from modeling_fromage import __version__
from tests.helpers import hub
from tests.helpers.hub_server import hub_server
from tests.helpers.paths import ROOT

NAMES = {"README.md", "app.py", "requirements.txt"}


def push(*options: object) -> None:
    push_space.main(["org/pictures", "--model", "org/fromage", *map(str, options)])


def test_what_is_staged(tmp_path, capsys):
    push("--index", "org/index", "--dry-run", "--staging-dir", tmp_path, "--examples", "a cat", "it's")
    assert {path.name for path in tmp_path.iterdir()} == NAMES and "Staged" in capsys.readouterr().out
    card = SpaceCard.load(tmp_path / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py" and card.data.license == "apache-2.0"
    assert card.data.models == ["org/fromage"] and card.data.datasets == ["org/index"]
    assert card.data.title == "pictures" and "datasets/org/index" in card.text
    assert (tmp_path / "requirements.txt").read_text() == f"modeling-fromage[demo]=={__version__}\n"
    app = (tmp_path / "app.py").read_text()
    (arguments,) = re.findall(r"parse_args\((.*)\)\)", app)
    options = make_parser().parse_args(ast.literal_eval(arguments))
    assert (options.model, options.index, options.examples) == ("org/fromage", "org/index", ["a cat", "it's"])


def test_its_gradio_is_the_tested_one(tmp_path):
    push("--dry-run", "--staging-dir", tmp_path, "--requirement", "git+https://example.org/fromage")
    tested = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints-apps.txt").read_text(), re.MULTILINE))
    sdk = SpaceCard.load(tmp_path / "README.md").data.sdk_version
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["demo"][0]
    assert sdk == tested["gradio"] and Requirement(extra).specifier.contains(sdk)
    assert (tmp_path / "requirements.txt").read_text() == "git+https://example.org/fromage\n"
    assert "no index" in (tmp_path / "README.md").read_text()


def test_one_commit(tmp_path):
    with hub_server() as server:
        command = ("-m", "hub_scripts.push_space", "tester/pictures", "--model", "org/fromage")
        printed = hub.run(server, tmp_path, *command)
        assert "/spaces/tester/pictures/commit/" in printed or "/commit/" in printed.splitlines()[-1]
        commits = server.repositories["spaces/tester/pictures"]
        assert [set(files) for files in commits.values()] == [set(), NAMES]
        hub.run(server, tmp_path, *command, "--title", "Again")  # the Space is there already
        assert b"title: Again" in commits[server.heads["spaces/tester/pictures"]]["README.md"]


def test_a_broken_upload_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(SystemExit):
        push()
    assert "broke off: no route to host. Nothing was committed" in capsys.readouterr().err.splitlines()[-1]
