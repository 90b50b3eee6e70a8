"""The README's snippet runs, with tiny backbones in place of those it names; its commands exist."""

import re
from pathlib import Path

from modeling_fromage import FromageForConditionalGeneration
from tests.backbones import PARITY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    case = PARITY / "case_a_opt_tied"
    for name, folder in (("openai/clip-vit-base-patch32", "vision_model"), ("facebook/opt-125m", "language_model")):
        assert name in snippet
        snippet = snippet.replace(name, str(case / folder))
    scope = {}
    exec(snippet, scope)  # noqa: S102
    assert isinstance(scope["model"], FromageForConditionalGeneration)
    assert sorted(scope["ids"][0]) == ["blue", "red"]
    assert len(scope["output"].ret_embeds) == 1


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets and all(f"\n{target}:" in makefile for target in targets)
    for path in re.findall(r"[\w/]+\.(?:yaml|py)\b", README):
        assert (ROOT / path).is_file(), path
