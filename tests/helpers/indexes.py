"""Random indexes, brute force to compare them with, small pictures, and interruptions."""

import io
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import shards as shards_module
from modeling_fromage.index import writer as writer_module

DIM = 16
VALUES = [True, False, None, 3, 2.5, "3", "it's", 'say "x"', 0.1]
KEYS = ["kind", 'a "quoted" key', "it's", "dotted.key", "$.path"]
WHERES = [
    *(None, {"kind": [2.5, "it's", None]}, {'a "quoted" key': VALUES[4:], "it's": [False, "3", 'say "x"', 3]}),
    *({"dotted.key": value} for value in VALUES),
    {"$.path": [*range(4, 1500), 2.5]},
]


class Entry(NamedTuple):
    id: str
    row: torch.Tensor
    facts: dict[str, Any]


def make_entries(count: int, distinct: int = 0, name: str = "image") -> list[Entry]:
    """Random ones; of only `distinct` rows where it is given, so that ties are certain."""
    rows, rng = torch.randn(distinct or count, DIM), random.Random(0)
    numbers = [rng.randrange(distinct) if distinct else i for i in range(count)]
    facts = [{key: rng.choice(VALUES) for key in KEYS if rng.random() < 0.9} for _ in range(count)]
    return [Entry(f"{name} {i}", rows[numbers[i]], facts[i]) for i in range(count)]


def columns(entries: list[Entry]) -> tuple[torch.Tensor, list[str], list[dict[str, Any]]]:
    return torch.stack([e.row for e in entries]), [e.id for e in entries], [e.facts for e in entries]


def index_of(entries: list[Entry], **kwargs) -> FromageImageIndex:
    return FromageImageIndex(*columns(entries), **kwargs)


def fits(facts: dict[str, Any], where: dict[str, Any] | None) -> bool:
    wanted = {name: value if isinstance(value, list) else [value] for name, value in (where or {}).items()}
    return all(name in facts and facts[name] in values for name, values in wanted.items())


def assert_searches(index: FromageImageIndex, entries: list[Entry], queries: torch.Tensor, top_k: int, **kwargs):
    """`index.search` finds what sorting all of `entries` does, ties by position; `top_k` at most."""
    exclude = kwargs.get("exclude_ids") or []
    banned = exclude if exclude and isinstance(exclude[0], list) else [exclude] * len(queries)
    fitting = [i for i, entry in enumerate(entries) if fits(entry.facts, kwargs.get("where"))]
    left = [[i for i in fitting if entries[i].id not in names] for names in banned]
    if not kwargs.get("where"):
        top_k = min(top_k, *map(len, left), len(entries))
    ids, scores, metadata = index.search(queries, top_k, **kwargs)
    longest = min(top_k, max(map(len, left)))
    assert scores.shape == (len(queries), longest)
    rows = F.normalize(columns(entries)[0], dim=-1).to(index.dtype).float()
    for q, query in enumerate(F.normalize(queries, dim=-1)):
        cosines = (rows * query).sum(-1, dtype=torch.float64).float().tolist()  # row by row: alike for like rows
        best = sorted((-cosines[i], i) for i in left[q])[:top_k]
        assert ids[q] == [entries[i].id for _, i in best]
        assert metadata[q] == [entries[i].facts for _, i in best]
        padding = [-torch.inf] * (longest - len(best))
        assert scores[q].tolist() == pytest.approx([*(-negative for negative, _ in best), *padding], abs=1e-6)


def contents(index: FromageImageIndex) -> tuple:
    """All that can be seen of an index, to be compared bit by bit."""
    ids, scores, metadata = index.search(torch.eye(index.dim)[:3], len(index))
    return index.ids, index.metadata, index.embeds.tolist(), ids, scores.tolist(), metadata, index.skipped


def small_shards(monkeypatch, rows: int):
    for module in (shards_module, writer_module):
        monkeypatch.setattr(module, "SHARD_ROWS", rows)


class Killed(BaseException):
    """Passes every `except Exception`, as a kill does."""


def dies_at(call: int, function, calls: list):
    """`function`, noted in `calls`; the `call`-th of which raises instead."""

    def run(*args, **kwargs):
        calls.append(function.__name__)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    return run


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    picture(seed).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def write_pictures(folder: Path, *names: str):
    """Picture i under the i-th name; those called broken are none."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image" if "broken" in name else png(seed))
