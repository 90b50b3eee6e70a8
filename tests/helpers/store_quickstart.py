"""Store a run of the quickstart, and what the README's snippets print with its model.

    make quickstart
    .venv/bin/python -m tests.helpers.store_quickstart

Writes training/results/quickstart.json, docs/quickstart.png, and the outputs in README.md.
"""

import contextlib
import io
import json
import re
import shutil
from typing import Any

from modeling_fromage.file_writing_fromage import replace_file
from tests.helpers.pages import blocks, read
from tests.helpers.paths import ROOT
from training.publishing.results import replace_between

STORED = ROOT / "training" / "results" / "quickstart.json"
RUN = ROOT / "outputs" / "quickstart"
_SNIPPET = re.compile(r"(^```python\n(.*?)^```\n)(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)


def run_snippets() -> list[dict[str, str]]:
    """The README's Python snippets, run one after the other, and what each printed."""
    scope: dict[str, Any] = {}
    ran = []
    for code in blocks("README.md", "python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, scope)  # noqa: S102
        ran.append({"code": code, "output": printed.getvalue()})
    return ran


def render(text: str, results: dict[str, Any]) -> str:
    """The README with what the stored run printed and measured; without outputs where the run has none of a snippet."""
    outputs = {snippet["code"]: snippet["output"] for snippet in results.get("readme", [])}

    def with_output(match: re.Match[str]) -> str:
        output = outputs.get(match[2])
        return f"{match[1]}\n```text\n{output}```\n" if output else match[1]

    redrawn, new = results["tests"]["redrawn"], results["tests"]["new"]
    sentence = (
        f"Drawn by `make quickstart` in {results['seconds'] / 60:.0f} minutes, set-up not counted "
        f"({results['hardware']}). Among "
        f"{redrawn['num_pairs']} drawings by a hand that it never saw draw them, it finds "
        f"{100 * redrawn['text_to_image']['R@5']:.0f} % by name within the first five (chance: "
        f"{100 * redrawn['chance']['R@5']:.0f} %), and of {new['num_pairs']} things that it never saw at all "
        f"{100 * new['text_to_image']['R@5']:.0f} % (chance: {100 * new['chance']['R@5']:.0f} %)."
    )
    text = replace_between(text, "quickstart", [sentence], by="tests.helpers.store_quickstart")
    return _SNIPPET.sub(with_output, text)


def main() -> None:
    results = json.loads((RUN / "results.json").read_text(encoding="utf-8"))
    with contextlib.chdir(ROOT):
        results["readme"] = run_snippets()
    replace_file(STORED, (json.dumps(results, indent=1) + "\n").encode())
    shutil.copy(RUN / "report.png", ROOT / "docs" / "quickstart.png")
    replace_file(ROOT / "README.md", render(read("README.md"), results).encode())


if __name__ == "__main__":
    main()
