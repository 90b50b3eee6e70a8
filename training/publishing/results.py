"""Results files, and the Markdown tables rendered from them."""

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

from modeling_fromage.file_writing_fromage import replace_file

from .provenance import checkout

STORED = Path(str(resources.files(__package__.rpartition(".")[0]) / "results"))  # of published runs


def results_folder() -> Path:
    """The default folder of results: the stored ones if the current folder is this code's checkout, otherwise
    `outputs/benchmarks`."""
    here = Path("training", "results")
    return here if here.resolve() == STORED.resolve() and checkout() is not None else Path("outputs", "benchmarks")


def results_file(text: str) -> Path:
    """An argparse type: the path of a results file. A folder is refused before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; expected a JSON file")
    return path


def add_output_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--output`, by default the file of this name in the folder of results."""
    path = results_folder() / name
    parser.add_argument("--output", type=results_file, default=path, help=f"JSON file; by default {path}")


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(results, indent=1) + "\n").encode())


def read_results(pattern: str) -> list[dict[str, Any]]:
    """The stored results whose file names match `pattern`."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(STORED.glob(pattern))]


def replace_between(text: str, name: str, tables: list[str], by: str) -> str:
    """`text` with `tables` between the markers of this name, if it has them."""
    start, end = f"<!-- {name}: rendered by {by} -->", f"<!-- end of {name} -->"
    before, mark, rest = text.partition(start)
    if not mark:
        return text
    after = rest.partition(end)[2]
    return "\n".join([before + start, *(f"\n{table}\n" for table in tables), end]) + after


def render_pages(name: str, tables: list[str], by: str) -> None:
    """Write `tables` into the Markdown pages of the checkout that have markers of this name.

    Raises:
        ValueError: The code is not in a checkout, or no page has the markers.
    """
    root = checkout()
    if root is None:
        raise ValueError("Tables are rendered into the repository's pages: run this in a checkout.")
    found = False
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if f"<!-- {name}: rendered by {by} -->" in text:
            found = True
            replace_file(page, replace_between(text, name, tables, by).encode())
    if not found:
        raise ValueError(f"No page has the line <!-- {name}: rendered by {by} -->, where the table would go.")
