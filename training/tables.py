"""Results files, and the README's tables that are rendered from them."""

import argparse
import json
from pathlib import Path
from typing import Any

from modeling_fromage.file_writing_fromage import replace_file

from .provenance import ROOT

RESULTS = ROOT / "training" / "results"


def results_file(text: str) -> Path:
    """The path of a results file, for argparse: told of before anything is measured, if it cannot be one."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; expected a JSON file")
    return path


def write_results(path: Path, results: dict[str, Any]):
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(results, indent=1) + "\n").encode())


def read_results(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def replace_between(text: str, name: str, tables: list[str], by: str = "training.benchmark") -> str:
    """`text` with `tables` between its two marks of this name."""
    start, end = f"<!-- {name}: rendered by {by} -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return "\n".join([before + start, *(f"\n{table}\n" for table in tables), end]) + after
