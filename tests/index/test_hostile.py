"""Indexes that someone wrote to do harm."""

import json
import random
import sqlite3
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import folder as folder_module
from modeling_fromage.index.folder import CorruptIndexError
from modeling_fromage.index.shards import crc32_of
from modeling_fromage.index.writer import IndexWriter
from tests.helpers.indexes import (
    DIM,
    VALUES,
    index_of,
    make_entries,
)


def with_entries(folder: Path, *statements: str):
    """Change the entries of a saved index, and sign them."""
    [path] = folder.glob("entries-*.sqlite")
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.executescript(statement)
    connection.close()
    state = json.loads((folder / "index.json").read_text())
    state["entries"].update(bytes=path.stat().st_size, crc32=folder_module.crc32_of_file(path))
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
        state["entries"]["crc32"] = folder_module.crc32_of_file(path)
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
    crc32 = crc32_of(rows if dtype is None else rows.to(dtype))
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
            IndexWriter(tmp_path, {}, resume=True)
