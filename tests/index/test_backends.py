"""FAISS against exact search, and backends that are refused."""

import json

import faiss
import numpy as np
import pytest
import torch

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import folder as folder_module
from modeling_fromage.index.folder import CorruptIndexError
from tests.helpers.indexes import (
    DIM,
    VALUES,
    WHERES,
    assert_searches,
    columns,
    index_of,
    make_entries,
    small_shards,
)


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
    expected = {"factory": "Flat", "nprobe": None, "training_size": 200_000, "k_factor": 1, **options}
    assert index.backend == "faiss" and index._store.now.backend.options == expected
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
        ("milvus", {}, "milvus backend needs `uri`"),
        ("lucene", {}, "Unknown backend 'lucene'; this version has flat, faiss and milvus"),
        ("flat", {"nprobe": 2}, r"takes no options, got \['nprobe'\]"),
    ],
)
def test_refused_backends(backend, options, message):
    index = index_of(make_entries(20), backend="faiss")
    with pytest.raises(ValueError, match=message):
        index.use_backend(backend, **options)
    assert index.backend == "faiss"  # as it was


def test_too_few_left_for_faiss(tmp_path, caplog):
    entries = make_entries(200)
    index = index_of(entries, backend="faiss", factory="IVF16,Flat", nprobe=16)
    index.delete([entry.id for entry in entries[8:]])
    index.save_pretrained(tmp_path)
    assert "without its FAISS index" in caplog.text
    again = FromageImageIndex.from_pretrained(tmp_path)
    assert again.backend == "flat" and again.ids == [entry.id for entry in entries[:8]]


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
        state["faiss"].update(bytes=len(data), crc32=folder_module.crc32_of_file(path))
        (tmp_path / "index.json").write_text(json.dumps(state))
        with pytest.raises(CorruptIndexError, match=r"\.faiss"):
            FromageImageIndex.from_pretrained(tmp_path).search(torch.ones(1, DIM), 2)


def test_search_options(tmp_path):
    entries, queries = make_entries(400), torch.randn(20, DIM)
    index = index_of(entries, backend="faiss", factory="IVF16,Flat", nprobe=1)
    exact = index_of(entries).search(queries, 5).ids
    assert index.search(queries, 5).ids != exact
    assert index.set_search_options(nprobe=16) is index
    assert index.search(queries, 5).ids == exact
    index.save_pretrained(tmp_path)
    again = FromageImageIndex.from_pretrained(tmp_path)
    options = {"factory": "IVF16,Flat", "nprobe": 16, "training_size": 200_000, "k_factor": 1}
    assert again._store.now.backend.options == options
    assert again.search(queries, 5).ids == exact
    again.set_search_options(nprobe=1)
    assert (
        again.search(queries, 5).ids == index_of(entries, backend="faiss", factory="IVF16,Flat").search(queries, 5).ids
    )


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ({"backend": "flat"}, {"nprobe": 2}, r"flat backend takes no options, got \['nprobe'\]"),
        ({"backend": "faiss"}, {"nprobe": 2}, "'Flat' has no lists, so `nprobe` does not apply"),
        ({"backend": "faiss"}, {"probes": 2, "nprobe": 1}, r"are \['k_factor', 'nprobe'\], got \['probes'\]"),
        *(
            ({"backend": "faiss", "factory": "IVF4,Flat"}, {"nprobe": value}, "whole number from 1")
            for value in (0, -1, True, 1.5, "4", None, 1 << 40)
        ),
        ({"backend": "faiss"}, {"k_factor": 0}, "`k_factor` is a whole number from 1"),
        ({"backend": "faiss", "factory": "IVF4,Flat"}, {"nprobe": 2, "k_factor": None}, "`k_factor` is a whole number"),
    ],
)
def test_refused_search_options(backend, options, message):
    index = index_of(make_entries(200), **backend)
    before = index._store.now.backend.options
    with pytest.raises(ValueError, match=message):
        index.set_search_options(**options)
    assert index._store.now.backend.options == before


def test_stored_embeddings_tell_the_nearest_of_more_proposals(tmp_path):
    """Codes of 2 bytes alone hardly tell which images are near."""
    entries, queries = make_entries(600), torch.randn(20, DIM)
    exact = index_of(entries).search(queries, 5)
    index = index_of(entries, backend="faiss", factory="PQ2", training_size=600)

    def recall(found) -> float:
        return sum(len({*a} & {*b}) for a, b in zip(found.ids, exact.ids, strict=True)) / 100

    few = recall(index.search(queries, 5))
    many = recall(index.set_search_options(k_factor=20).search(queries, 5))
    assert few < 0.6 < many - 0.2
    index.save_pretrained(tmp_path)
    assert recall(FromageImageIndex.from_pretrained(tmp_path).search(queries, 5)) == many
    assert index.set_search_options(k_factor=1000).search(queries, 5).ids == exact.ids


def test_unknown_options_are_named():
    for options in ({"nprobes": 2}, {"factory": "Flat", "lists": 3}):
        with pytest.raises(ValueError, match=r"takes the options \['factory', 'nprobe', 'training_size', 'k_factor'\]"):
            index_of(make_entries(3)).use_backend("faiss", **options)
