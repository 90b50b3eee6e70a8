"""The image index against brute force, and against what kills, damage, tables and the Hub do to its files."""

import base64
import copy
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import faiss
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex
from modeling_fromage.images_fromage import ImageLimits, UnreadableImageError
from modeling_fromage.index import builder as builder_module
from modeling_fromage.index import files as files_module
from modeling_fromage.index import index as index_module
from modeling_fromage.index import store as storage_module
from modeling_fromage.index.files import IndexWriter
from modeling_fromage.index.search import top_k_in_order
from modeling_fromage.index.sources import image_sources
from modeling_fromage.index.store import CorruptIndexError
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.hub_server import hub_server

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
    for module in (files_module, index_module):
        monkeypatch.setattr(module, "SHARD_ROWS", rows)


@pytest.fixture(params=[7, 65_536])
def shard_rows(request, monkeypatch):
    small_shards(monkeypatch, request.param)


# ---- searching and changing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "stored"), [(1, False), (5, True)])
def test_search_is_brute_force(tmp_path, shard_rows, dtype, count, stored):
    entries, queries, rng = make_entries(60, distinct=9), torch.randn(count, DIM), random.Random(1)
    index = index_of(entries, dtype=dtype)
    if stored:
        index.save_pretrained(tmp_path)
        index = FromageImageIndex.from_pretrained(tmp_path)
    ids = [entry.id for entry in entries]
    excluded = [None, ids[:9], [rng.sample(ids, rng.randrange(9)) for _ in range(count)]]
    for deleted in ([], ids[::4]):
        index.delete(deleted)
        left = [entry for entry in entries if entry.id not in deleted]
        assert_searches(index, left, queries, 60)
        for exclude_ids, where in itertools.product(excluded, WHERES):
            assert_searches(index, left, queries, 5, exclude_ids=exclude_ids, where=where)


def test_identical_images_tie_wherever_they_are():
    """A matrix product rounds the same pair of vectors differently at the edges of its blocks."""
    entries = make_entries(1003, distinct=30)
    assert_searches(index_of(entries), entries, torch.randn(index_module._QUERIES_AT_A_TIME + 44, DIM), 20)
    query, rounded = F.normalize(torch.randn(1, DIM), dim=-1), torch.ones(1, 200) + 1e-6 * torch.randn(1, 200)
    assert top_k_in_order(rounded, query.repeat(200, 1), query, 3)[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 0}, "`top_k` is 0, but the index has 5 images"),
        ({"top_k": 6}, "`top_k` is 6, but the index has 5 images"),
        ({"top_k": 5, "exclude_ids": ["image 1", "image 3"]}, r"has 4 images to choose from \(of 5\)"),
        ({"top_k": 5, "exclude_ids": [[], ["image 1"]], "embeds": torch.ones(2, DIM)}, "has 4 images"),
        ({"top_k": 0, "where": {"kind": "3"}}, "`top_k` is 0"),
        ({"where": "kind"}, "`where` is a dict"),
        ({"where": {"kind": float("nan")}}, "JSON cannot hold"),
        ({"exclude_ids": [None]}, "are strings"),
        ({"embeds": torch.full((1, DIM), float("nan"))}, "NaN"),
        ({"embeds": torch.full((1, DIM), 1e300, dtype=torch.float64)}, "infinite"),
        ({"embeds": torch.ones(1, DIM + 1)}, r"Expected embeddings \(N, 16\), got \(1, 17\)"),
        ({"embeds": torch.ones(DIM)}, "Expected embeddings"),
        ({"exclude_ids": [["image 1"]] * 2}, "2 lists of excluded ids for 1 queries"),
    ],
)
def test_bad_searches(kwargs, message):
    index = index_of(make_entries(6))
    index.delete(["image 3"])
    with pytest.raises(ValueError, match=message):
        index.search(**{"embeds": torch.ones(1, DIM), **kwargs})


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_add_and_delete(tmp_path, shard_rows, stored, backend):
    entries, queries = make_entries(33), torch.randn(3, DIM)
    index = index_of(entries[:20], backend=backend)
    if stored:
        index.save_pretrained(tmp_path)
        index = FromageImageIndex.from_pretrained(tmp_path)
    index.add(torch.empty(0, DIM), [])
    assert_searches(index, entries[:20], queries, 20)
    index.add(*columns(entries[20:30]))
    index.delete(["image 2", "image 25", "image 2"])
    again = Entry("image 2", torch.randn(DIM), {"again": True})
    index.add(*columns([*entries[30:], again]))
    entries = [entry for entry in entries if entry.id not in ("image 2", "image 25")] + [again]
    assert (len(index), index.ids, index.metadata) == (32, *columns(entries)[1:])
    assert torch.equal(index.embeds, F.normalize(columns(entries)[0], dim=-1))
    assert "image 25" not in index and "image 2" in index and index.get("image 2") == {"again": True}
    with pytest.raises(KeyError, match="image 25"):
        index.get("image 25")
    assert_searches(index, entries, queries, 32)
    assert_searches(index, entries, queries, 4, exclude_ids=["image 7", "image 25"])


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_refused_changes_change_nothing(backend):
    index, rows = index_of(make_entries(6), backend=backend), torch.randn(2, DIM)
    index.delete(["image 3"])
    before = contents(index)
    for arguments, message in [
        ((rows, ["new", "image 0"]), "unique"),
        ((rows, ["new", "new"]), "unique"),
        ((rows, ["new"]), "2 embeddings, 1 ids and 1 metadata"),
        ((rows, ["new", "newer"], [{}, {"score": float("nan")}]), "JSON"),
        ((rows / 0, ["new", "newer"]), "infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.add(*arguments)
        assert contents(index) == before and "new" not in index and len(index) == 5
    with pytest.raises(KeyError, match="image 9.*nothing was removed"):
        index.delete(["image 0", "image 9"])
    assert contents(index) == before


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "a b#c%20d?e=f"])
@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "faiss"), (torch.float16, "flat")])
def test_round_trip(tmp_path, shard_rows, name, dtype, backend):
    index = index_of(make_entries(20, distinct=15), dtype=dtype, backend=backend, model_fingerprint="some model")
    for deleted in ([], ["image 0", "image 9"]):  # the second time over the first, which is also what is read from
        index.delete(deleted)
        index.save_pretrained(tmp_path / name)
        known = contents(index)
        index = FromageImageIndex.from_pretrained(tmp_path / name)
        assert contents(index) == known
        assert (index.dtype, index.backend, index.model_fingerprint) == (dtype, backend, "some model")
        kinds = Counter(re.split("[-.]", path.name)[0] for path in (tmp_path / name).iterdir())
        assert kinds.pop("embeds") == -(-len(index) // files_module.SHARD_ROWS)
        assert kinds == {"index": 1, "entries": 1, **({"backend": 1} if backend == "faiss" else {})}


def test_files_are_read_when_they_are_needed(tmp_path, monkeypatch):
    small_shards(monkeypatch, 7)
    index_of(make_entries(20), backend="faiss").save_pretrained(tmp_path)
    reads: Counter[str] = Counter()

    def count(module, name):
        read = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path: reads.update([path.suffix]) or read(path))

    count(storage_module, "load_file")
    count(storage_module, "crc32_of_file")
    count(index_module, "crc32_of_file")
    index = FromageImageIndex.from_pretrained(tmp_path)
    assert len(index) == 20 and "faiss" in repr(index) and not reads
    for _ in range(2):  # checked once
        index.search(torch.randn(2, DIM), 20)
        assert reads == {".safetensors": 3, ".sqlite": 1, ".faiss": 1}


def test_damage_is_found(tmp_path, monkeypatch):
    small_shards(monkeypatch, 7)
    index_of(make_entries(20), backend="faiss").save_pretrained(tmp_path)
    files = sorted(path for path in tmp_path.iterdir() if path.name != "index.json")
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        places = (0, 20, len(data) // 2, len(data) - 1)
        damaged = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in places]
        damaged += [data[:-1], b"", data + b"\0", None]
        if path.suffix == ".safetensors":  # the numbers' own checksum does not tell what kind of numbers they are
            damaged.append(data.replace(b'"F32"', b'"I32"'))
        for content in damaged:
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(CorruptIndexError, match=re.escape(str(path))):
                index = FromageImageIndex.from_pretrained(tmp_path)
                assert content is not None and len(content) == len(data)  # else it was to be found at once
                index.search(torch.randn(2, DIM), 20)
        path.write_bytes(data)
    assert len(FromageImageIndex.from_pretrained(tmp_path).search(torch.randn(2, DIM), 20)[0][0]) == 20


def test_damaged_lists_and_paths_out_of_the_folder(tmp_path):
    folder = tmp_path / "index"
    index_of(make_entries(5)).save_pretrained(folder)
    listing, shard = folder / "index.json", next(folder.glob("embeds-*"))
    text = listing.read_text()
    state = json.loads(text)
    broken = ["", "{", "[]", text.replace("float32", "gloat32"), text.replace('"count": 5', '"count": 6', 1)]
    broken += [json.dumps({key: value for key, value in state.items() if key != lost}) for lost in state]
    broken += [text.replace('"crc32"', '"crc"', 1), text.replace('"file"', '"fill"', 1)]
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    for content in broken:
        listing.write_text(content)
        with pytest.raises(CorruptIndexError, match=r"index\.json"):
            FromageImageIndex.from_pretrained(folder)
    shard.unlink()
    for outside in (f"../{shard.name}", str(tmp_path / shard.name), ".."):
        listing.write_text(text.replace(shard.name, outside))
        with pytest.raises(CorruptIndexError, match=re.escape(str(folder))):
            FromageImageIndex.from_pretrained(folder)
    listing.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2.*Upgrade"):
        FromageImageIndex.from_pretrained(folder)
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="holds no image index"):
        FromageImageIndex.from_pretrained(folder)


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


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_an_interrupted_save_leaves_a_whole_index(tmp_path, monkeypatch, backend):
    small_shards(monkeypatch, 7)
    old, new = index_of(make_entries(9)), index_of(make_entries(20, name="new"), backend=backend)
    whole, died = {"old": contents(old), "new": contents(new)}, []
    for call in itertools.count(1):
        old.save_pretrained(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".sqlite", ".safetensors"}
        with monkeypatch.context() as patch:
            calls: list[str] = []
            for place, name in ((files_module, "save_file"), (os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, dies_at(call, getattr(place, name), calls))
            try:
                new.save_pretrained(tmp_path)
                break
            except Killed:
                found = contents(FromageImageIndex.from_pretrained(tmp_path))
                died.append((calls[-1], next(name for name in whole if whole[name] == found)))
    saving = 2 * 3 + (backend == "faiss") + 1  # the old one is there until all is written; then its files are removed
    assert [name for _, name in died[:saving]] == ["old"] * saving and set(died[saving:]) == {("unlink", "new")}
    assert {name for name, _ in died[:saving]} == {"save_file", "replace"}
    assert len(list(tmp_path.iterdir())) == 3 + 2 + (backend == "faiss")  # nothing is left of all the attempts


# ---- building -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_model("opt_clip")


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


def make_source(kind: str, folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, str]]:
    """`images` with pictures 0 and 2, and some that cannot be indexed; more arguments for `build`; and what to expect:
    metadata by id, and reasons by id."""
    write_pictures(folder, "a.png", "broken.png", "sub dir/b.png", "notes.txt")
    a, broken, b = (str(folder / name) for name in ("a.png", "broken.png", "sub dir/b.png"))
    url, urls = (f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}" for seed in (2, 0))
    table, cells = folder / f"table.{kind}", [("id", "image", "caption"), ("x", "a.png", "one"), ("y",)]
    if kind == "tsv":
        table.write_text("\n".join(map("\t".join, [*cells, ("z", b, "three")])))
    if kind == "csv":  # with the mark that spreadsheets begin it with
        cells = [("image", "url", "id"), ("", urls, "x, 1"), ("gone.png", "", "y"), ("", url, "z")]
        table.write_text("\ufeff" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in cells), "utf-8")
    photos = {"photo": [{"bytes": png(0)}, {"bytes": b"no"}, {"path": b}], "id": [7, 8, 9], "label": [0, 1, 2]}
    rows = [
        {"image": picture(0), "id": "x", "score": 0.5, "missing": float("nan"), "box": [1, 2]},
        {"path": Path(broken), "id": "y"},
        {"url": url, "id": "z"},
        {"image": {"bytes": png(3)}, "id": "x"},
    ]
    lists = {"ids": ["x", "y", "z", "x"], "metadata": [{"n": n} for n in range(4)]}
    images = [picture(0), "gone.png", picture(2), picture(3)]
    twice, of_rows = {"y": "no image", "x": "id occurs twice"}, {"x": {"score": 0.5}, "z": {"url": url}}
    return {
        "folder": (folder, {}, {name: {"path": name} for name in ("a.png", "sub dir/b.png")},
                   {"broken.png": "no image"}),
        "tsv": (table, {}, {"x": {"caption": "one", "path": "a.png"},
                            "z": {"caption": "three", "path": "sub dir/b.png"}}, {"y": "not found"}),
        "csv": (table, {}, {"x, 1": {"image": "", "url": urls}, "z": {"image": "", "url": url}}, {"y": "not found"}),
        "dataset": (datasets.Dataset.from_dict(photos).cast_column("photo", datasets.Image()), {},
                    {"7": {"label": 0}, "9": {"label": 2, "path": b}}, {"8": "no image"}),
        "images": (images, lists, {"x": {"n": 0}, "z": {"n": 2}}, {**twice, "y": "not found"}),
        "paths": ([a, broken, Path(b)], {}, {"0": {"path": a}, "2": {"path": b}}, {"1": "no image"}),
        "rows": (rows, {}, of_rows, twice),
        "generator": ((row for row in rows), {}, of_rows, twice),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tsv", "csv", "dataset", "images", "paths", "rows", "generator"])
@pytest.mark.parametrize("saved", [False, True])
def test_build(tmp_path, model, processor, caplog, kind, saved):
    images, kwargs, metadata, reasons = make_source(kind, tmp_path / "images")
    kwargs = {**kwargs, "batch_size": 3 if saved else 4, "save_directory": tmp_path / "index" if saved else None}
    index = FromageImageIndex.build(model, processor, images, show_progress=False, **kwargs)
    assert dict(zip(index.ids, index.metadata, strict=True)) == metadata
    assert {row["id"]: row["reason"] for row in index.skipped} == reasons and len(index.skipped) == len(reasons)
    assert f"Indexed 2 of {2 + len(reasons)} images; skipped {len(reasons)}: 1 " in caplog.text
    assert all(f"1 {reason}" in caplog.text for reason in reasons.values())
    pixels = processor.image_processor([picture(0), picture(2)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.allclose(index.embeds, model.get_image_embeds(pixels), atol=1e-5)
    for image_id, seed in zip(index.ids, (0, 2), strict=True):
        if metadata[image_id].keys() & {"path", "url"} or kind in ("images", "rows"):
            assert np.array_equal(index.load_image(image_id), picture(seed))
        else:
            with pytest.raises(UnreadableImageError, match="no path or url"):
                index.load_image(image_id)


def test_images_in_memory_tie_and_are_forgotten(model, processor):
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    index = FromageImageIndex.build(model, processor, [red, blue, red], batch_size=2)
    assert index.search(index.embeds[:1], top_k=3)[0] == [["0", "2", "1"]]
    index.delete(["1"])
    index.add(index.embeds[:1], ["1"])
    with pytest.raises(UnreadableImageError, match="no path or url"):
        index.load_image("1")


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        ([], {}, "at least one image. Indexed 0 of 0"),
        (["gone.png", "gone.jpg"], {}, "Indexed 0 of 2 images; skipped 2: 2 not found"),
        *((images, {}, "Expected a folder") for images in ("picture.png", b"bytes", {"image": "a.png"}, 5)),
        ([{"picture": 1}], {}, "Row 0 has none of the columns"),
        ([picture(0)], {"ids": ["a", "b"]}, "2 ids for 1 images"),
        ([picture(0)], {"metadata": []}, "0 metadata entries for 1 images"),
        (iter([picture(0)]), {"ids": ["a"]}, "1 ids for a stream"),
        ([picture(0)], {"dtype": torch.bfloat16}, "float32 or torch.float16"),
    ],
)
def test_bad_builds(tmp_path, monkeypatch, model, processor, images, kwargs, message):
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 1)
    with pytest.raises(ValueError, match=message):
        FromageImageIndex.build(model, processor, images, save_directory=tmp_path, **kwargs)
    assert len(FromageImageIndex.build(model, processor, [picture(0)], save_directory=tmp_path)) == 1  # no trace


NAMES = [f"{i:02}.png" for i in range(5)] + ["broken.png"] + [f"sub/{i:02}.png" for i in range(7)]
BATCHES = 7  # of two
KILLED = """
import os, signal, sys
from modeling_fromage import FromageImageIndex
from modeling_fromage.index import builder
from tests.helpers.backbones import make_model, make_processor

builder.CHECKPOINT_EVERY = 4
model = make_model("opt_clip")
embed, calls = model.get_image_embeds, []
model.get_image_embeds = lambda pixels: (
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 5 else calls.append(1) or embed(pixels)
)
FromageImageIndex.build(model, make_processor(), sys.argv[1], batch_size=2, save_directory=sys.argv[2])
"""


class Build:
    """The same call again and again, with the model's calls counted."""

    def __init__(self, folder: Path, model, processor):
        self.model, self.processor = model, processor
        self.images, self.index = folder / "images", folder / "index"
        write_pictures(self.images, *NAMES)

    def __call__(self, die_at: int = 0, model=None, **kwargs) -> FromageImageIndex:
        model, self.calls = model or self.model, []
        kwargs = {"batch_size": 2, "save_directory": self.index, "show_progress": False, **kwargs}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "get_image_embeds", dies_at(die_at, model.get_image_embeds, self.calls))
            return FromageImageIndex.build(model, self.processor, self.images, **kwargs)

    def killed(self, *args, **kwargs):
        with pytest.raises(Killed):
            self(*args, **kwargs)


@pytest.fixture
def build(tmp_path, monkeypatch, model, processor):
    small_shards(monkeypatch, 5)
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 4)
    return Build(tmp_path, model, processor)


@pytest.mark.parametrize("call", range(1, BATCHES + 1))
def test_a_killed_build_goes_on(build, call):
    kwargs = {"dtype": torch.float16, "backend": "faiss"} if call % 2 else {}
    whole, done = contents(build(save_directory=None, **kwargs)), (call - 1) // 2 * 2  # batches before the checkpoint
    build.killed(call, **kwargs)
    with pytest.raises(FileNotFoundError, match="unfinished.*Call `build`" if done else "no image index"):
        FromageImageIndex.from_pretrained(build.index)
    build.killed(1, **kwargs)  # and again, in the first batch
    assert len(list(build.index.glob("embeds-*"))) <= 3  # those that they have outgrown are gone
    assert contents(build(**kwargs)) == whole and len(build.calls) == BATCHES - done
    assert contents(build(**kwargs)) == whole and not build.calls  # now it opens it
    assert len(list(build.index.iterdir())) == 3 + 2 + call % 2


def test_a_build_killed_between_its_files_goes_on(tmp_path, monkeypatch, build):
    kwargs = {"batch_size": 8, "backend": "faiss"}
    whole = contents(build(save_directory=None, **kwargs))
    for call in itertools.count(1):
        build.index = tmp_path / f"index {call}"
        with monkeypatch.context() as patch:
            calls: list[str] = []
            for place, name in ((os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, dies_at(call, getattr(place, name), calls))
            try:
                build(**kwargs)
                break
            except Killed:
                pass
        assert contents(build(**kwargs)) == whole
    assert call > 12


def test_sigkill(build):
    command = [sys.executable, "-c", KILLED, str(build.images), str(build.index)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    index = build()
    assert len(build.calls) == BATCHES - 4  # two checkpoints of two batches
    assert contents(index) == contents(build(save_directory=None))


@pytest.mark.parametrize("finished", [False, True])
def test_only_the_same_build_goes_on(build, finished):
    known = contents(build()) if finished else build.killed(6)
    other = make_model("opt_clip")
    other.adapter.visual_projection.weight.data *= 2
    for kwargs in ({"model": other}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match="index of other images, or by another" if finished else "other settings"):
            build(**kwargs)
    (build.images / NAMES[1]).rename(build.images / "00b.png")
    with pytest.raises(ValueError, match="index of other images" if finished else "images differ from those"):
        build()
    assert not build.calls
    (build.images / "00b.png").rename(build.images / NAMES[1])
    if finished:
        assert contents(build()) == known and not build.calls
    else:
        next(build.index.glob("entries-*.sqlite")).unlink()
        with pytest.raises(CorruptIndexError, match="entries-"):
            build()


def test_an_interrupted_save_is_no_unfinished_build(monkeypatch, build):
    index = build()
    known = contents(index)
    index.delete([NAMES[0]])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files_module.IndexWriter, "_write", dies_at(1, files_module.IndexWriter._write, []))
        index.save_pretrained(build.index)
    assert contents(build()) == known and not build.calls
    index.save_pretrained(build.index)  # which is no longer what was built
    with pytest.raises(ValueError, match="index of other images"):
        build()


# ---- FAISS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"factory": "IVF4,Flat", "nprobe": 4, "training_size": 150}])
def test_faiss_finds_what_flat_search_does(tmp_path, monkeypatch, options):
    small_shards(monkeypatch, 50)
    entries, queries = make_entries(400), torch.randn(5, DIM)
    index_of(entries[:380], backend="faiss", **options).save_pretrained(tmp_path)
    index = FromageImageIndex.from_pretrained(tmp_path)
    index.add(*columns(entries[380:]))
    assert_searches(index, entries, queries, 10)
    best = index.search(queries, 40)[0]
    assert_searches(index, entries, queries, 10, exclude_ids=best)
    assert_searches(index, entries, queries, 10, exclude_ids=best[0], where=WHERES[1])
    deleted = {name for names in best for name in names}
    index.delete(list(deleted))
    entries = [entry for entry in entries if entry.id not in deleted]
    assert_searches(index, entries, queries, 10)
    index.save_pretrained(tmp_path)  # in which the positions move up
    index = FromageImageIndex.from_pretrained(tmp_path)
    expected = {"factory": "Flat", "nprobe": None, "training_size": 200_000, **options}
    assert index.backend == "faiss" and index._faiss.options == expected
    assert_searches(index, entries, queries, 10)
    assert_searches(index.use_backend("flat"), entries, queries, 10)


def test_faiss_is_exact_where_its_lists_hold_too_few():
    entries, queries = make_entries(200), torch.randn(5, DIM)
    index = index_of(entries, backend="faiss", factory="IVF16,Flat", nprobe=1)
    near = index.search(queries, 3)[1]
    assert_searches(index, entries, queries, 150)
    assert_searches(index, entries, queries, 3, where={"kind": VALUES})  # filters are exact, too
    best = index.use_backend("flat").search(queries, 3)[1]
    assert (near <= best).all() and (near < best).any()  # otherwise approximate


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("faiss", {"factory": "nonsense"}, "does not know the factory string 'nonsense'"),
        ("faiss", {"factory": "IVF100,Flat"}, "cannot train 'IVF100,Flat' on 20 embeddings"),
        ("milvus", {}, "milvus' is not in this version"),
        ("lucene", {}, "Unknown backend 'lucene'"),
        ("flat", {"nprobe": 2}, r"takes no options, got \['nprobe'\]"),
    ],
)
def test_refused_backends(backend, options, message):
    index = index_of(make_entries(20), backend="faiss")
    with pytest.raises(ValueError, match=message):
        index.use_backend(backend, **options)
    assert index.backend == "faiss"  # as it was


# ---- many indexes, many models, the Hub ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge_is_one_index(tmp_path, shard_rows, dtype):
    entries = make_entries(40)
    parts = [index_of(entries[i : i + 15], dtype=dtype) for i in (0, 15, 30)]
    parts[1].save_pretrained(tmp_path)
    merged = FromageImageIndex.merge([parts[0], tmp_path, parts[2]])
    assert contents(merged) == contents(index_of(entries, dtype=dtype))
    merged.delete(["image 20"])
    assert contents(FromageImageIndex.merge([merged])) == contents(merged)
    others = make_entries(3, name="other")
    stamped, narrow = index_of(others, dtype=dtype), FromageImageIndex(torch.randn(2, 8), ["a", "b"], dtype=dtype)
    stamped.model_fingerprint = "another model"
    unlike = index_of(others, dtype=torch.float32 if dtype == torch.float16 else torch.float16)
    for other in (stamped, narrow, unlike):
        with pytest.raises(ValueError, match="one model and kind"):
            FromageImageIndex.merge([merged, other])
    for several, message in (([merged, merged], "unique"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            FromageImageIndex.merge(several)


def test_images_are_found_from_whatever_they_were_added_by(tmp_path, monkeypatch, model, processor):
    small_shards(monkeypatch, 1)
    for name in ("one", "two"):
        write_pictures(tmp_path / name, f"{name}.png", f"broken {name}.png")
    first, second = (FromageImageIndex.build(model, processor, tmp_path / name) for name in ("one", "two"))
    merged = FromageImageIndex.merge([first, second])
    first.add_images(model, processor, tmp_path / "two")
    for index in (merged, first):
        index.add_images(model, processor, [tmp_path / "one" / "one.png"], ids=["listed"])
        index.add_images(model, processor, [picture(3)], ids=["memory"])
        before = contents(index)
        with pytest.raises(ValueError, match="unique"):
            index.add_images(model, processor, [picture(4), picture(5)], ids=["new", "memory"])
        assert contents(index) == before  # not in part either
        assert index.ids == ["one.png", "two.png", "listed", "memory"]
        assert [row["id"] for row in index.skipped] == ["broken one.png", "broken two.png"]
        for name, seed in zip(index.ids, (0, 0, 0, 3), strict=True):
            assert np.array_equal(index.load_image(name), picture(seed))
        assert torch.equal(index.embeds[0], index.embeds[1]) and torch.equal(index.embeds[0], index.embeds[2])


def test_model_stamp(tmp_path, model, processor):
    model.save_pretrained(tmp_path, save_backbones=True, adapter_dtype=torch.bfloat16)
    other = FromageForConditionalGeneration.from_pretrained(tmp_path)
    weight = other.adapter.visual_projection.weight
    assert not torch.equal(weight, model.adapter.visual_projection.weight)
    index, query = FromageImageIndex.build(model, processor, [picture(0)]), torch.randn(1, DIM)
    assert index.model_fingerprint == model.retrieval_fingerprint() == other.retrieval_fingerprint()
    assert index.search(query, model=other)[0] == [["0"]]
    weight.data[0, 0] += 0.1
    unstamped = FromageImageIndex(index.embeds, ["0"])
    for use in (
        lambda index: index.check_model(other),
        lambda index: index.search(query, model=other),
        lambda index: index.add_images(other, processor, [picture(1)], ids=["1"]),
    ):
        with pytest.raises(ValueError, match="was made by the model"):
            use(index)
        use(unstamped)
    assert len(index) == 1 and len(unstamped) == 2
    with pytest.raises(ValueError, match="width"):
        FromageImageIndex(torch.randn(1, 8), ["0"]).add_images(model, processor, [picture(1)], ids=["1"])


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_push_and_pull(tmp_path, monkeypatch, hub, model, processor, backend):
    small_shards(monkeypatch, 2)
    repo, images = "datasets/org/index", tmp_path / "images"
    write_pictures(images, "a.png", "sub/b.png", "broken.png", "c.png")
    write_pictures(tmp_path, "secret.png")
    index = FromageImageIndex.build(model, processor, images, backend=backend)
    index.add(torch.randn(1, DIM), ["escape"], [{"path": "../secret.png"}])
    address = index.push_to_hub("org/index", token="hf_test")
    assert address.endswith(f"/{repo}/commit/{hub.heads[repo]}")

    def pull(**kwargs):
        return FromageImageIndex.from_pretrained("org/index", token="hf_test", cache_dir=tmp_path / "cache", **kwargs)

    first, pulled, rooted = hub.heads[repo], pull(), pull(image_root=images)
    files = hub.repositories[repo][first]
    assert len(files) == 4 + (backend == "faiss") and not any(str(tmp_path).encode() in data for data in files.values())
    assert contents(pulled)[:-1] == contents(index)[:-1]
    assert pulled.skipped == [{"id": "broken.png", "source": "broken.png", "reason": "no image"}]
    assert (pulled.backend, pulled.model_fingerprint) == (backend, model.retrieval_fingerprint())

    # A repository must not be able to name files of the machine that loads it.
    assert np.array_equal(rooted.load_image("a.png"), picture(0))
    assert np.array_equal(index.load_image("escape"), picture(0))
    rooted.add(torch.randn(1, DIM), ["absolute"], [{"path": str(tmp_path / "secret.png")}])
    monkeypatch.chdir(images)
    merged = FromageImageIndex.merge([rooted])
    pulled.save_pretrained(tmp_path / "copy")
    copied = FromageImageIndex.from_pretrained(tmp_path / "copy")
    refused = [(pulled, "a.png"), (copied, "a.png")]
    refused += [(one, name) for one in (rooted, merged) for name in ("escape", "absolute")]
    for one, name in refused:
        with pytest.raises(UnreadableImageError, match="local files are refused"):
            one.load_image(name)

    hub.commit(repo, {**files, "README.md": b"a card"})
    index.delete(["a.png", "escape"])
    index.push_to_hub("org/index", token="hf_test")
    files = hub.repositories[repo][hub.heads[repo]]
    state = json.loads(files["index.json"])
    listed = [entry["file"] for entry in (*state["shards"], state["entries"], state.get("faiss")) if entry]
    assert sorted(files) == sorted(["README.md", "index.json", *listed])  # those of the first are gone
    assert pull().ids == index.ids and pull(revision=first).ids == pulled.ids
    forged = files["index.json"].replace(b'"image_root": null', b'"image_root": "/"')
    hub.commit(repo, {**files, "index.json": forged})
    assert forged != files["index.json"] and pull().image_root is None


# ---- servers and workers ------------------------------------------------------------------------------------------


def test_threads_search_at_once():
    """As the first requests of a server do."""
    entries = make_entries(2000)
    for _ in range(10):
        index = index_of(entries)
        barrier = threading.Barrier(6)

        def search(index=index, barrier=barrier):
            barrier.wait()
            return index.search(torch.ones(1, DIM), 3)[0]

        with ThreadPoolExecutor(6) as pool:
            found = [future.result() for future in [pool.submit(search) for _ in range(6)]]
        assert found == [found[0]] * 6 and index.embeds.shape == (2000, DIM)


@pytest.mark.parametrize("stored", [False, True])
def test_an_index_can_be_copied_and_pickled(tmp_path, stored):
    index = index_of(make_entries(9))
    if stored:
        index.save_pretrained(tmp_path)
        index = FromageImageIndex.from_pretrained(tmp_path)
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):  # noqa: S301
        assert contents(other) == contents(index)
        other.add(torch.ones(1, DIM), ["new"])
        assert "new" in other and "new" not in index


@pytest.mark.parametrize("kind", ["pil", "bytes", "file"])
def test_other_images_of_the_same_names(tmp_path, kind):
    model, processor = make_model("opt_clip"), make_processor()

    def images(colours):
        rows = [Image.new("RGB", (8, 8), colour) for colour in colours]
        if kind == "pil":
            return rows
        for i, image in enumerate(rows):
            image.save(tmp_path / f"{i}.png")
        paths = [tmp_path / f"{i}.png" for i in range(len(rows))]
        return paths if kind == "file" else [{"image": {"bytes": p.read_bytes(), "path": None}} for p in paths]

    options = {"save_directory": tmp_path / "index", "show_progress": False}
    FromageImageIndex.build(model, processor, images(["red", "green"]), **options)
    with pytest.raises(ValueError, match="other images"):
        FromageImageIndex.build(model, processor, images(["blue", "black"]), **options)


def test_images_from_elsewhere():
    index = index_of(make_entries(3))
    with pytest.raises(UnreadableImageError, match="image_loader"):
        index.load_image("image 1")
    index.image_loader = lambda image_id, facts: Image.new("RGB", (len(image_id), 2))
    assert index.load_image("image 1").size == (7, 2)


@pytest.mark.parametrize("where", ["cwd", "home"])
def test_images_of_a_folder_are_not_read_on_its_word(tmp_path, monkeypatch, model, processor, where):
    """Of an index that was opened: neither by its `image_root`, nor by absolute paths, links or ways up."""
    write_pictures(tmp_path / "photos", "a.png", "sub/b.png")
    write_pictures(tmp_path, "secret.png")
    built = FromageImageIndex.build(model, processor, tmp_path / "photos", save_directory=tmp_path / "index")
    assert np.array_equal(built.load_image("a.png"), picture(0))  # of this process's own images
    again = FromageImageIndex.build(model, processor, tmp_path / "photos", save_directory=tmp_path / "index")
    assert np.array_equal(again.load_image("sub/b.png"), picture(1))  # as it is of the same call, which opens it
    names = {
        "up": "../secret.png",
        "absolute": str(tmp_path / "secret.png"),
        "link": "link.png",
        "nul": "\0",
    }
    built.add(torch.randn(4, DIM), list(names), [{"path": path} for path in names.values()])
    built.save_pretrained(tmp_path / "index")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "index" / "link.png").symlink_to(tmp_path / "secret.png")
    write_pictures(tmp_path / "index", "own.png")

    monkeypatch.chdir(tmp_path / ("photos" if where == "cwd" else "."))
    alone, rooted = (FromageImageIndex.from_pretrained(tmp_path / "index", image_root=root)
                     for root in (None, tmp_path / "photos"))  # fmt: skip
    for index, refused in ((alone, ["a.png", "sub/b.png", *names]), (rooted, names)):
        index.add(torch.randn(2, DIM), ["own", "own absolute"],
                  [{"path": "own.png"}, {"path": str(tmp_path / "index" / "own.png")}])  # fmt: skip
        for name in refused:
            with pytest.raises(UnreadableImageError, match="local files are refused") as error:
                index.load_image(name)
            assert repr(str(tmp_path / "photos")) in str(error.value)  # what to pass
        assert np.array_equal(index.load_image("own absolute"), picture(0))
    assert np.array_equal(alone.load_image("own"), picture(0)) and alone.image_root is None
    assert np.array_equal(rooted.load_image("a.png"), picture(0))
    merged = FromageImageIndex.merge([tmp_path / "index"])
    merged.save_pretrained(tmp_path / "merged")
    for index in (merged, FromageImageIndex.from_pretrained(tmp_path / "merged")):
        with pytest.raises(UnreadableImageError, match=re.escape(repr(str(tmp_path / "photos")))):
            index.load_image("a.png")
        index.image_root = tmp_path / "photos"
        assert np.array_equal(index.load_image("a.png"), picture(0))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]


def pil_images() -> list[Image.Image]:
    """One of every mode, and some whose metadata says how they look."""
    images = [picture(seed).convert("L" if mode == "I;16" else mode if mode != "PA" else "RGB")
              for seed, mode in enumerate(MODES)]  # fmt: skip
    images = [
        image.convert(mode) if mode in ("PA", "I;16") else image for image, mode in zip(images, MODES, strict=True)
    ]
    transparent = picture(20).convert("P")
    transparent.info["transparency"] = 3
    opaque = picture(21)
    opaque.info["transparency"] = opaque.getpixel((0, 0))
    return [*images, transparent, opaque]


def test_images_in_memory_are_saved(tmp_path, monkeypatch, model, processor):
    small_shards(monkeypatch, 4)
    images = pil_images()
    index = FromageImageIndex.build(model, processor, images, show_progress=False)
    index.delete(["2"])
    index.add(torch.randn(1, DIM), ["2"])  # has no image
    pixels = {name: np.asarray(index.load_image(name)) for name in index.ids if name != "2"}
    metadata = index.metadata
    for folder in ("first", "first", "second"):  # over itself, too
        index.save_pretrained(tmp_path / folder)
        index = FromageImageIndex.from_pretrained(tmp_path / folder)
        for one in (index, FromageImageIndex.merge([index]), copy.deepcopy(index)):
            assert {name: np.asarray(one.load_image(name)).tolist() for name in pixels} == {
                name: pixels[name].tolist() for name in pixels
            }
            with pytest.raises(UnreadableImageError, match="no path or url"):
                one.load_image("2")
        assert index.metadata == metadata
        assert len(list((tmp_path / folder).glob("index-images-*"))) == 1  # the older ones are gone
        assert len(list((tmp_path / folder).glob("index-images-*/*"))) == len(images) - 1
    index.delete(index.ids)
    other = tmp_path / "second" / "index-images-mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    FromageImageIndex(torch.randn(1, DIM), ["a"]).save_pretrained(tmp_path / "second")
    assert [path.name for path in (tmp_path / "second").rglob("index-images-*")] == [other.name]  # not ours


def red(index: FromageImageIndex) -> int:
    return index.load_image("0").getpixel((0, 0))[0]


def test_images_outlive_saves_over_themselves(tmp_path, model, processor):
    """An index that is opened, changed and saved into its own folder again and again, as an application does."""
    images = [Image.new("RGB", (9, 9), (level, 0, 0)) for level in (11, 22, 33)]
    index = FromageImageIndex.build(
        model, processor, images, save_directory=tmp_path, backend="faiss", show_progress=False
    )
    for number in range(3):
        assert red(index) == 11 and red(FromageImageIndex.from_pretrained(tmp_path)) == 11
        index.add(torch.randn(1, DIM), [f"new {number}"])
        index.delete([str(number)] if number else [])
        index.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("index-images-*/*"))) == 1
    index, other = (FromageImageIndex.from_pretrained(tmp_path) for _ in range(2))
    assert len(other.embeds) == len(other.ids) == 4  # opened, all but its images
    index.save_pretrained(tmp_path)
    index.save_pretrained(tmp_path / "copy")
    assert red(index) == red(FromageImageIndex.from_pretrained(tmp_path / "copy")) == 11
    with pytest.raises(UnreadableImageError, match="not found .*was saved anew, reopen it"):
        other.load_image("0")
    with pytest.raises(UnreadableImageError, match="not found"):
        other.save_pretrained(tmp_path)  # which would remove the images
    assert red(FromageImageIndex.from_pretrained(tmp_path)) == 11


def test_images_over_the_limits_are_saved_again(tmp_path, monkeypatch):
    index = FromageImageIndex(torch.randn(1, DIM), ["0"])
    index._images[0] = Image.new("RGB", (40, 40), (11, 0, 0))
    index.save_pretrained(tmp_path / "1")
    monkeypatch.setattr(ImageLimits, "max_pixels", 1000)
    for number in (1, 2):
        FromageImageIndex.from_pretrained(tmp_path / str(number)).save_pretrained(tmp_path / str(number + 1))
    assert red(FromageImageIndex.from_pretrained(tmp_path / "3")) == 11


def test_images_of_a_killed_build_are_not_those_of_the_next(tmp_path, monkeypatch, model, processor):
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 2)
    write_pictures(tmp_path, "file.png")
    images = [Image.new("RGB", (9, 9), (level, 0, 0)) for level in (11, 22, 33, 44)]
    options = {"batch_size": 2, "save_directory": tmp_path / "index", "show_progress": False}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(IndexWriter, "add", dies_at(2, IndexWriter.add, []))
        FromageImageIndex.build(model, processor, images, **options)
    assert len(list(tmp_path.glob("index/index-images-*/*"))) == 4
    index = FromageImageIndex.build(model, processor, [*images[:2], str(tmp_path / "file.png")], **options)
    assert red(index) == 11 and np.array_equal(index.load_image("2"), Image.open(tmp_path / "file.png"))
    [folder] = tmp_path.glob("index/index-images-*")
    images[3].save(folder / "3.png")  # whoever put it there
    index = FromageImageIndex.from_pretrained(tmp_path / "index")
    index.add(torch.randn(1, DIM), ["another"])
    with pytest.raises(UnreadableImageError, match="no path or url"):
        index.load_image("another")


def test_a_linked_image_is_refused(tmp_path, model, processor):
    write_pictures(tmp_path, "secret.png")
    FromageImageIndex.build(model, processor, [picture(1)], save_directory=tmp_path / "index")
    [image] = (tmp_path / "index").glob("index-images-*/0.png")
    image.unlink()
    image.symlink_to(tmp_path / "secret.png")
    index = FromageImageIndex.from_pretrained(tmp_path / "index")
    with pytest.raises(UnreadableImageError, match="leads out"):
        index.load_image("0")
    index.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").rglob("*.png"))


def test_an_interrupted_save_keeps_the_images(tmp_path, monkeypatch, model, processor):
    old, new = (FromageImageIndex.build(model, processor, [picture(seed)]) for seed in (0, 1))
    for call in itertools.count(1):
        old.save_pretrained(tmp_path)
        with monkeypatch.context() as patch:
            calls: list[str] = []
            for place, name in ((files_module, "save_file"), (Image.Image, "save"), (os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, dies_at(call, getattr(place, name), calls))
            try:
                new.save_pretrained(tmp_path)
                break
            except Killed:
                found = FromageImageIndex.from_pretrained(tmp_path)
                assert np.array_equal(found.load_image("0"), picture(0 if torch.equal(found.embeds, old.embeds) else 1))
    assert call > 6


def test_published_values_have_no_folders(tmp_path, hub, model, processor):
    write_pictures(tmp_path / "data", "a.png", "b.png", "other.png")
    table = tmp_path / "data" / "table.csv"
    table.write_text("image,file_name,source,label\na.png,other.png,{0}/x,/m/01g317\nb.png,{0}/b.png,see {0}/x.,c\n"
                     .format(tmp_path / "data"))  # fmt: skip
    index = FromageImageIndex.build(model, processor, table)
    assert index.metadata[0]["file_name"] == "other.png"  # as the table has it
    deep = {
        "list": [str(tmp_path / "y"), {str(tmp_path / "k.txt"): r"C:\Users\me\z.png"}],
        "file": f"file://{tmp_path}/f.png",
    }
    index.add(torch.randn(1, DIM), ["deep"], [{**deep, "path": str(tmp_path / "secret.png"), "n": 1, "no": None}])
    index.save_pretrained(tmp_path / "index")
    opened = FromageImageIndex.from_pretrained(tmp_path / "index")
    expected = [
        {"file_name": "other.png", "source": "x", "label": "/m/01g317", "path": "a.png"},
        {"file_name": "b.png", "source": "see x.", "label": "c", "path": "b.png"},
        {"list": ["y", {"k.txt": "z.png"}], "file": "f.png", "path": "secret.png", "n": 1, "no": None},
    ]
    for one in (index, opened):
        one.push_to_hub("org/scrubbed", token="hf_test")
        files = hub.repositories["datasets/org/scrubbed"][hub.heads["datasets/org/scrubbed"]]
        assert not any(str(tmp_path).encode() in data or b"Users" in data for data in files.values())
        pulled = FromageImageIndex.from_pretrained("org/scrubbed", token="hf_test", cache_dir=tmp_path / "cache")
        assert pulled.metadata == expected
    index.add(torch.randn(1, DIM), [str(tmp_path / "id.png")])
    with pytest.raises(ValueError, match="Ids that are paths of this machine"):
        index.push_to_hub("org/scrubbed", token="hf_test")


def test_images_in_memory_are_published(tmp_path, hub, model, processor):
    images = [picture(0), picture(1)]
    for several in (images, images[1:]):
        index = FromageImageIndex.build(model, processor, several, ids=[str(i) for i in range(len(several))])
        index.push_to_hub("org/pil", token="hf_test")
        pulled = FromageImageIndex.from_pretrained("org/pil", token="hf_test", cache_dir=tmp_path / "cache")
        assert all(np.array_equal(pulled.load_image(str(i)), image) for i, image in enumerate(several))
    files = hub.repositories["datasets/org/pil"][hub.heads["datasets/org/pil"]]
    assert sum(name.endswith(".png") for name in files) == 1  # those of the first are gone


# ---- hostile and damaged indexes -----------------------------------------------------------------------------------


def with_entries(folder: Path, *statements: str):
    """Change the entries of a saved index, and sign them."""
    [path] = folder.glob("entries-*.sqlite")
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.executescript(statement)
    connection.close()
    state = json.loads((folder / "index.json").read_text())
    state["entries"].update(bytes=path.stat().st_size, crc32=storage_module.crc32_of_file(path))
    (folder / "index.json").write_text(json.dumps(state))


ENDLESS = "WITH RECURSIVE more(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM more) SELECT n"
VIEW = (
    "ALTER TABLE entries RENAME TO hidden; CREATE VIEW entries AS "
    f"{ENDLESS} AS position, 'image 0' AS id, '{{}}' AS metadata FROM more"
)


@pytest.mark.parametrize(
    "statement",
    [
        VIEW,
        f"DROP TABLE skipped; CREATE VIEW skipped AS {ENDLESS} AS id, '' AS source, '' AS reason FROM more",
        "CREATE TRIGGER t AFTER DELETE ON entries BEGIN DELETE FROM skipped; END",
        f"CREATE VIEW more AS {ENDLESS} FROM more",
        "CREATE TABLE more (x)",
        "CREATE INDEX i ON entries (json_extract(metadata, '$.x'))",
        "DROP TABLE entries; CREATE TABLE entries (position INTEGER PRIMARY KEY, id TEXT, metadata TEXT, more TEXT)",
        "DELETE FROM entries WHERE position = 1",
        "UPDATE entries SET position = 9 WHERE position = 1",
        "INSERT INTO entries VALUES (5, 'more', '{}')",
        "UPDATE entries SET metadata = '[1]'",
        "UPDATE entries SET metadata = NULL",
        "UPDATE entries SET metadata = 'no JSON'",
        "UPDATE entries SET metadata = replace(hex(zeroblob(50000)), '0', '[')",
        "UPDATE entries SET id = x'ff' || position",
        "UPDATE entries SET id = CAST(x'ff' AS TEXT) || position",
    ],
)
def test_hostile_entries(tmp_path, statement):
    index_of(make_entries(5)).save_pretrained(tmp_path)
    with_entries(tmp_path, statement)
    index, errors = FromageImageIndex.from_pretrained(tmp_path), []

    def search():
        with pytest.raises(CorruptIndexError, match="entries-"):
            index.search(torch.ones(1, DIM), 5)
        errors.append("as they should be")

    thread = threading.Thread(target=search, daemon=True)  # which a query that never ends does not hold up
    thread.start()
    thread.join(30)
    assert errors and not thread.is_alive()


def test_random_damage_of_entries_is_told(tmp_path):
    """Damage that is signed: where it is not seen, it is none that stops or hangs a search."""
    index_of(make_entries(40)).save_pretrained(tmp_path)
    [path] = tmp_path.glob("entries-*.sqlite")
    data, listing, rng, found = path.read_bytes(), (tmp_path / "index.json").read_text(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        state = json.loads(listing)
        state["entries"]["crc32"] = storage_module.crc32_of_file(path)
        (tmp_path / "index.json").write_text(json.dumps(state))
        index = FromageImageIndex.from_pretrained(tmp_path)
        try:
            index.search(torch.ones(1, DIM), 5, where={"kind": VALUES}, exclude_ids=["image 3"])
            assert len(index.ids) == len(index.metadata) == 40
            index.skipped  # noqa: B018
            index.delete(index.ids[:2])
            index.search(torch.ones(1, DIM), 38)
        except CorruptIndexError:
            found += 1
    assert found > 100


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda rows: rows[1].fill_(float("nan")), None),
        (lambda rows: rows[1].fill_(float("inf")), None),
        (lambda rows: rows[1].mul_(2), None),
        (lambda rows: rows.resize_(5, DIM + 1), None),
        (lambda rows: rows.resize_(4, DIM), None),
        (lambda rows: rows.resize_(5 * DIM), None),
        (lambda rows: None, torch.float64),
    ],
)
def test_hostile_embeddings(tmp_path, change, dtype):
    index_of(make_entries(5)).save_pretrained(tmp_path)
    [path] = tmp_path.glob("embeds-*")
    rows = load_file(path)["embeds"].clone()
    change(rows)
    save_file({"embeds": rows if dtype is None else rows.to(dtype)}, path)
    state = json.loads((tmp_path / "index.json").read_text())
    crc32 = storage_module.crc32_of(rows if dtype is None else rows.to(dtype))
    state["shards"][0].update(bytes=path.stat().st_size, crc32=crc32)
    (tmp_path / "index.json").write_text(json.dumps(state))
    with pytest.raises(CorruptIndexError, match=r"embeds-|index\.json"):
        FromageImageIndex.from_pretrained(tmp_path).search(torch.ones(1, DIM), 5)


@pytest.mark.parametrize(
    "changes",
    [
        *({"dim": value} for value in (0, -1, 10**30, True, 16.0, "16", None)),
        *({"count": value} for value in (-5, 10**15, 5.0, True)),
        *({"progress": value} for value in (None, [], {"digest": 1}, {"consumed": "x"})),
        *({"image_root": value} for value in (1, ["/"])),
        *({"shards": value} for value in (None, {}, [None], [{"count": 5}])),
        {"images": 3},
        {"model": 3},
        {"entries": []},
        {"faiss": {"file": "x", "bytes": 1, "crc32": 1, "options": {"factory": "Flat"}}},
        {"faiss": {"file": "x", "bytes": 1, "crc32": 1, "options": {"factory": 1, "nprobe": 1, "training_size": 1}}},
        {"faiss": [1]},
        {"shard": {"count": 10**15}},
        {"shard": {"bytes": "many"}},
        {"shard": {"file": 3}},
        {"shard": {"file": "\0"}},
        {"shard": {"crc32": None}},
    ],
)
def test_hostile_lists(tmp_path, changes):
    index_of(make_entries(5)).save_pretrained(tmp_path)
    state = json.loads((tmp_path / "index.json").read_text())
    if "shard" in changes:
        state["shards"][0].update(changes["shard"])
        state["count"] = state["shards"][0]["count"]
    else:
        state.update(changes)
    for name in ("index.json", "building.json"):
        (tmp_path / name).write_text(json.dumps(state))
    with pytest.raises(CorruptIndexError):
        FromageImageIndex.from_pretrained(tmp_path)
    if changes.keys() & {"dim", "count", "progress", "shards", "entries"}:
        with pytest.raises(CorruptIndexError):
            files_module.IndexWriter(tmp_path, {}, resume=True)


def test_nested_lists_and_links(tmp_path):
    folder = tmp_path / "index"
    index_of(make_entries(5), backend="faiss").save_pretrained(folder)
    text = (folder / "index.json").read_text()
    for content in (b"[" * 100_000, b"\xff", b'{"format": 1e999}'):
        (folder / "index.json").write_bytes(content)
        with pytest.raises((CorruptIndexError, ValueError), match=r"index\.json"):
            FromageImageIndex.from_pretrained(folder)
    (folder / "index.json").write_text(text)
    for path in folder.glob("*-*"):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data)
        path.unlink()
        path.symlink_to(tmp_path / path.name)
        with pytest.raises(CorruptIndexError, match="leads out"):
            FromageImageIndex.from_pretrained(folder)
        path.unlink()
        path.write_bytes(data)
    assert len(FromageImageIndex.from_pretrained(folder)) == 5


def test_hostile_faiss_files(tmp_path):
    index_of(make_entries(5), backend="faiss").save_pretrained(tmp_path)
    [path] = tmp_path.glob("*.faiss")
    text = (tmp_path / "index.json").read_text()
    wider, more = faiss.IndexFlatIP(DIM + 1), faiss.IndexFlatIP(DIM)
    wider.add(np.ones((5, DIM + 1), dtype=np.float32))
    more.add(np.ones((6, DIM), dtype=np.float32))
    for data in (b"no index", bytes(faiss.serialize_index(wider)), bytes(faiss.serialize_index(more))):
        path.write_bytes(data)
        state = json.loads(text)
        state["faiss"].update(bytes=len(data), crc32=storage_module.crc32_of_file(path))
        (tmp_path / "index.json").write_text(json.dumps(state))
        with pytest.raises(CorruptIndexError, match=r"\.faiss"):
            FromageImageIndex.from_pretrained(tmp_path).search(torch.ones(1, DIM), 2)


# ---- what is given -------------------------------------------------------------------------------------------------


def test_one_id_is_no_list_of_letters():
    index = FromageImageIndex(torch.eye(4), ["r", "e", "red", "12"])
    query = torch.ones(1, 4)
    assert sorted(index.search(query, 3, exclude_ids="red")[0][0]) == ["12", "e", "r"]
    assert sorted(index.search(query.repeat(2, 1), 3, exclude_ids=["red", ["e"]])[0][1]) == ["12", "r", "red"]
    assert sorted(index.search(query, 3, exclude_ids=np.array(["red"]))[0][0]) == ["12", "e", "r"]
    index.delete("red")
    index.delete(12)
    assert index.ids == ["r", "e"]
    assert FromageImageIndex(torch.eye(2)[:1], "red").ids == ["red"]
    for wrong in (None, b"r", 1.5, ["r"]):
        with pytest.raises(ValueError, match="Image ids are strings"):
            index.delete([wrong])


def test_filters_find_what_there_is():
    facts = [
        {"tags": ["cat", 3, True, None]},
        {"tags": "cat"},
        {"tags": ["dog", "[]"]},
        {"tags": []},
        {"tags": {"cat": 1}},
    ]
    index = FromageImageIndex(torch.eye(5, DIM), list("abcde"), facts)
    for wanted, expected in [
        ("cat", "ab"), (["cat", "dog"], "abc"), ("dog", "c"), (3, "a"), (True, "a"), (None, "a"), ("[]", "c"),
        ("3", ""),
        (np.array(["dog", "cat"]), "abc"), (np.int64(3), "a"), ('["dog"]', ""), ([], ""), (1, "a"), ('{"cat":1}', ""),
    ]:  # fmt: skip
        ids, scores, metadata = index.search(torch.ones(2, DIM), 4, where={"tags": wanted})
        assert ids == [list(expected)] * 2 and scores.shape == (2, len(expected))
        assert metadata == [[facts["abcde".index(name)] for name in expected]] * 2
    ids, scores, _ = index.search(torch.ones(3, DIM), 4, [["a"], [], ["b", "c", "a"]], where={"tags": ["cat", "dog"]})
    assert ids == [["b", "c"], ["a", "b", "c"], []] and scores.shape == (3, 3)
    assert torch.isfinite(scores).sum(-1).tolist() == [2, 3, 0] and (scores[0, 2], scores[2, 0]) == (-torch.inf,) * 2
    index.delete("b")
    assert index.search(torch.ones(1, DIM), 4, where={"tags": ["cat", "dog"]})[0] == [["a", "c"]]
    for wrong in ({"tags": {"cat": 1}}, {"tags": [["cat"]]}, {3: "x"}):
        with pytest.raises(ValueError, match="`where`"):
            index.search(torch.ones(1, DIM), 1, where=wrong)


def test_numpy_is_taken():
    rows = np.random.default_rng(0).normal(size=(3, DIM))
    rows.flags.writeable = False
    facts = {"n": np.int64(3), "x": np.float32(0.5), "yes": np.bool_(True), "list": np.arange(3), "text": np.str_("a")}
    plain = {"n": 3, "x": 0.5, "yes": True, "list": [0, 1, 2], "text": "a"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = FromageImageIndex(rows, np.array(["a", "b", "c"]), [facts] * 3)
        index.add(rows[:1].astype(np.float16), np.arange(7, 8), np.array([facts]))
        assert index.search(rows[1:2].astype(np.float32), np.int64(1))[0] == [["b"]]
    assert index.ids == ["a", "b", "c", "7"] and index.metadata == [plain] * 4
    assert np.str_("a") in index and 7 in index and None not in index and index.get(np.int64(7)) == plain
    assert index.search(rows, 4, where={"n": np.int64(3)})[0][0][0] == "a"
    for wrong in (rows[0], rows.astype(complex), np.array([["a"] * DIM]), [[None] * DIM], "rows", rows[:, :3]):
        with pytest.raises(ValueError, match="Expected embeddings"):
            index.search(wrong)
    with pytest.raises(ValueError, match="JSON cannot hold"):
        index.add(rows[:1], ["new"], [{"n": np.float32("nan")}])
    assert len(index) == 4


def test_numpy_in_builds(model, processor):
    rows = [{"image": picture(0), "n": np.float32(0.5)}, {"image": picture(1), "n": np.int64(2)}]
    index = FromageImageIndex.build(model, processor, rows, ids=np.array([5, 6]), metadata=np.array([{"a": 1}, {}]))
    assert index.ids == ["5", "6"] and index.metadata == [{"n": 0.5, "a": 1}, {"n": 2}]


def test_names_that_are_not_utf8(tmp_path, model, processor):
    images, name = tmp_path / "images", os.fsdecode(b"caf\xe9.png")
    write_pictures(images, "a.png", name, os.fsdecode(b"broken \xff.png"))
    for options in ({}, {"save_directory": tmp_path / "index"}, {"save_directory": tmp_path / "index"}):
        index = FromageImageIndex.build(model, processor, images, show_progress=False, **options)
        assert index.ids == ["a.png", "caf\\udce9.png"] and name in index
        assert index.metadata == [{"path": "a.png"}, {"path": name}]
        assert [row["id"] for row in index.skipped] == ["broken \\udcff.png"]
        assert np.array_equal(index.load_image(name), picture(1))
        assert index.search(torch.ones(1, DIM), 1, exclude_ids=[name], where={"path": ["a.png", name]})[0] == [
            ["a.png"]
        ]
    index.add(torch.ones(1, DIM), ["\ud800"], [{"caption": "\udce9", "\udce9": 1}])
    index.save_pretrained(tmp_path / "again")
    again = FromageImageIndex.from_pretrained(tmp_path / "again", image_root=images)
    assert again.get("\ud800") == {"caption": "\udce9", "\udce9": 1}
    assert again.search(torch.ones(1, DIM), 3, where={"caption": "\udce9"})[0] == [["\\ud800"]]
    assert np.array_equal(again.load_image(name), picture(1))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_that_are_not_utf8(tmp_path, model, processor, suffix):
    (tmp_path / f"t.{suffix}").write_bytes(b"image\n" + b"a.png\n" * 5000 + b"caf\xe9.png\n")
    with pytest.raises(ValueError, match=rf"t\.{suffix}, line 5002 is not UTF-8"):
        FromageImageIndex.build(model, processor, tmp_path / f"t.{suffix}")


def test_a_pipe_in_a_folder(tmp_path):
    write_pictures(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    found = [source.id for source in image_sources(tmp_path)[0]]
    assert found == ["a.png", "gone.png"]


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_files_have_the_modes_of_the_umask(tmp_path, model, processor, umask):
    before = os.umask(umask)
    try:
        index = FromageImageIndex.build(model, processor, [picture(0)], save_directory=tmp_path / "index")
        index.use_backend("faiss")
        index.save_pretrained(tmp_path / "index")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "index").rglob("*") if path.is_file()]
    assert {path.suffix: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        (".json", ".sqlite", ".safetensors", ".faiss", ".png"), 0o666 & ~umask
    )


def test_quotes_in_a_tsv_are_quotes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = ['a "word', '"open', "plain", 'closed"']
    lines = [f"{i}\ta.png\t{row}\n" for i, row in enumerate(rows)]
    (tmp_path / "t.tsv").write_text("id\timage\tcaption\n" + "".join(lines))
    index = FromageImageIndex.build(make_model("opt_clip"), make_processor(), tmp_path / "t.tsv", show_progress=False)
    assert [facts["caption"] for facts in index.metadata] == rows


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        FromageImageIndex.from_pretrained(tmp_path / "missing")


def test_too_few_left_for_faiss(tmp_path, caplog):
    entries = make_entries(200)
    index = index_of(entries, backend="faiss", factory="IVF16,Flat", nprobe=16)
    index.delete([entry.id for entry in entries[8:]])
    index.save_pretrained(tmp_path)
    assert "without its FAISS index" in caplog.text
    again = FromageImageIndex.from_pretrained(tmp_path)
    assert again.backend == "flat" and again.ids == [entry.id for entry in entries[:8]]
