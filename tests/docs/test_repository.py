"""What the repository says about itself is true: its workflow, its lowest versions, its exceptions from type checks."""

import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from hub_scripts.push_space import GRADIO
from tests.helpers.browser import find_browser

ROOT = Path(__file__).parents[2]
CODE = ("modeling_fromage", "training", "hub_scripts", "tests")
MAX_TYPE_IGNORES = 20


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_the_workflow_calls_make_targets_alone():
    steps = [step for job in workflow()["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert all(re.fullmatch(r"make [\w-]+", command) for command in commands)
    called = {command.removeprefix("make ") for command in commands}
    assert called <= targets()
    local = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(local) == {"quality", "test", "test-vision", "test-apps"} and called == {*local, "test-lowest", "build"}


def test_hooks_call_make_targets():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (hook,) = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert hook["entry"].removeprefix("make ") in targets()


def test_the_lowest_versions_are_those_that_are_tested():
    """Each `>=` of pyproject.toml is a `==` of constraints-lowest.txt; what the tests alone use is left free there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    stated = project["dependencies"] + [line for name in ("train", "index", "quickstart") for line in extras[name]]
    requirements = [Requirement(line) for line in stated if not line.startswith("modeling-fromage")]
    lowest = {r.name.lower(): s.version for r in requirements for s in r.specifier if s.operator == ">="}
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: tested.get(name) for name in lowest} == lowest


def constraints(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_page_is_tested_with_the_same_versions_but_for_pillow():
    """Gradio holds Pillow below 13."""
    ours, theirs = constraints("constraints.txt"), constraints("constraints-apps.txt")
    assert {name for name, version in ours.items() if theirs.get(name) != version} == {"pillow"}
    assert theirs.keys() - ours.keys() == {
        *("fastapi", "gradio", "gradio_client", "ipykernel", "nbclient", "openai", "playwright", "prometheus_client"),
        *("milvus-lite", "pymilvus", "ray", "starlette", "uvicorn"),
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    _, gradio = map(Requirement, extras["demo"])
    for requirement in map(Requirement, extras["serve"]):
        assert requirement.specifier.contains(theirs[requirement.name])
    assert gradio.specifier.contains(theirs["gradio"]) and theirs["gradio"] == GRADIO


def test_a_machine_without_a_browser_says_so_last(tmp_path):
    """And ends as the tests did."""
    for status in (0, 3):
        (tmp_path / "make").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / "make").chmod(0o755)
        (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")  # it finds no browser
        (tmp_path / "python3").chmod(0o755)
        (tmp_path / "apt-get").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "apt-get").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        run = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
        assert run.returncode == status and run.stdout.splitlines()[-1] == "BROWSER TESTS NOT RUN"


def test_the_browser_is_looked_for_with_the_standard_library_alone():
    """CI asks the machine's own Python."""
    assert "python3 tests/helpers/browser.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "tests/helpers/browser.py"], capture_output=True, text=True
    )
    assert (run.returncode == 0) == (find_browser() is not None) and "Traceback" not in run.stderr


def test_exceptions_from_type_checks_are_few_and_have_reasons():
    """`# type: ignore[code]` is followed by its reason, in a comment of the same line or of the line before."""
    found = []
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        if "fixtures" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        comments = {
            token.start[0]: token.string
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        }
        for line, comment in comments.items():
            if match := re.search(r"#\s*type:\s*ignore(\[[\w, -]+\])?\s*(.*)", comment):
                reason = match[2].strip(" #()") or comments.get(line - 1, "").strip("# ")
                found.append((f"{path.relative_to(ROOT)}:{line}", match[1], reason))
    assert not [where for where, code, reason in found if not code or not reason]
    assert len(found) <= MAX_TYPE_IGNORES, found


def test_mypy_is_not_told_to_look_away():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    sections = [tools["mypy"], *tools["mypy"].get("overrides", [])]
    assert not any(section.get("ignore_errors") or section.get("disable_error_code") for section in sections)
