"""Additions, deletions, merges and copies: whole or not at all."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from tests.helpers.indexes import (
    DIM,
    Entry,
    assert_searches,
    columns,
    contents,
    index_of,
    make_entries,
)


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
