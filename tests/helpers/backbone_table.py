"""What the matrix of backbones has found, stored: tests/fixtures/backbones.json, of which docs/backbones.md is made.

A test of the matrix computes its row and compares it with the stored one; with UPDATE_BACKBONES=1 it stores it.
"""

import fcntl
import json
import os
import warnings
from typing import Any

import transformers

from tests.helpers.paths import ROOT

TABLE = ROOT / "tests" / "fixtures" / "backbones.json"
PINNED = "transformers==" + transformers.__version__ in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
Row = dict[str, Any]


def stored(kind: str) -> dict[str, Row]:
    """The rows of `"language_models"`, `"multimodal_models"` or `"vision_models"` by model type."""
    return json.loads(TABLE.read_text(encoding="utf-8")).get(kind, {}) if TABLE.exists() else {}


def check_row(kind: str, model_type: str, row: Row) -> None:
    """Compare a row with the stored one, or store it."""
    if os.environ.get("UPDATE_BACKBONES"):
        _store(kind, model_type, row)
        return
    known = stored(kind).get(model_type)
    if known is None and not PINNED:
        warnings.warn(f"{model_type} is not in the table of backbones: {row}", stacklevel=2)
    else:
        told = f"{model_type} is {row}, not {known}: UPDATE_BACKBONES=1 stores what it is now"
        assert known is not None and _without_bound(row) == _without_bound(known), told
        assert row.get("within", 0.0) <= 10 * known.get("within", 0.0), told  # processors round in their own ways


def _without_bound(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "within"}


def check_complete(kind: str, model_types: list[str]) -> None:
    """Every model type has a row, with the pinned transformers; with another, what has none is only warned of."""
    missing, gone = sorted(set(model_types) - stored(kind).keys()), sorted(stored(kind).keys() - set(model_types))
    if PINNED:
        assert not missing and not gone, f"{kind} without a row: {missing}; rows of none: {gone}"
    elif missing:
        warnings.warn(f"{kind} that are not in the table of backbones: {missing}", stacklevel=2)


def _store(kind: str, model_type: str, row: Row) -> None:
    folder = os.open(TABLE.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of the test processes, one at a time
        table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
        table.setdefault(kind, {})[model_type] = row
        table = {kind: dict(sorted(rows.items())) for kind, rows in sorted(table.items())}
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    finally:
        os.close(folder)
