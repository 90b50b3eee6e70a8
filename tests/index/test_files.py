"""The folder of an index: round trips, damage, interrupted saves."""

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import folder as folder_module
from modeling_fromage.index import shards as shards_module
from modeling_fromage.index import writer as writer_module
from modeling_fromage.index.folder import CorruptIndexError
from tests.helpers.indexes import (
    DIM,
    Killed,
    contents,
    dies_at,
    index_of,
    make_entries,
    picture,
    small_shards,
)


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
        assert kinds.pop("embeds") == -(-len(index) // writer_module.SHARD_ROWS)
        assert kinds == {"index": 1, "entries": 1, **({"backend": 1} if backend == "faiss" else {})}


def test_files_are_read_when_they_are_needed(tmp_path, monkeypatch):
    small_shards(monkeypatch, 7)
    index_of(make_entries(20), backend="faiss").save_pretrained(tmp_path)
    reads: Counter[str] = Counter()

    def count(module, name):
        read = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path: reads.update([path.suffix]) or read(path))

    count(shards_module, "load_file")
    count(folder_module, "crc32_of_file")
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
    listing.write_text(text.replace('"format": 1', '"format": 3'))
    with pytest.raises(ValueError, match="format 3.*Upgrade"):
        FromageImageIndex.from_pretrained(folder)
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="holds no image index"):
        FromageImageIndex.from_pretrained(folder)


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
            for place, name in ((writer_module, "save_file"), (os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, dies_at(call, getattr(place, name), calls))
            try:
                new.save_pretrained(tmp_path)
                break
            except Killed:
                found = contents(FromageImageIndex.from_pretrained(tmp_path))
                died.append((calls[call - 1], next(name for name in whole if whole[name] == found)))
    # The old one is there until all is written; then its files are removed. Each new file is moved into place, and its
    # temporary name removed; the listing counts as soon as it is moved.
    saving = 3 * 3 + 2 * (backend == "faiss") + 1
    assert [name for _, name in died[:saving]] == ["old"] * saving and set(died[saving:]) == {("unlink", "new")}
    assert {name for name, _ in died[:saving]} == {"save_file", "replace", "unlink"}
    assert len(list(tmp_path.iterdir())) == 3 + 2 + (backend == "faiss")  # nothing is left of all the attempts


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


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        FromageImageIndex.from_pretrained(tmp_path / "missing")


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
