"""What the repository says of itself is true: the workflow runs what `.ci/run` runs, by targets that exist."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_workflow_calls_make_targets_alone():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert all(re.fullmatch(r"make [\w-]+", command) for command in commands)
    called = {command.removeprefix("make ") for command in commands}
    assert called <= targets()
    assert called == set(
        re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_hooks_call_make_targets():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (hook,) = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert hook["entry"].removeprefix("make ") in targets()
