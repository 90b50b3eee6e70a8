"""Searches against brute force: ties, exclusions, filters, bad arguments."""

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.index.backends import ranking as ranking_module
from modeling_fromage.index.backends.ranking import top_k_in_order
from tests.helpers.indexes import (
    DIM,
    WHERES,
    assert_searches,
    index_of,
    make_entries,
)


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
    assert_searches(index_of(entries), entries, torch.randn(ranking_module._QUERIES_AT_A_TIME + 44, DIM), 20)
    query, rounded = F.normalize(torch.randn(1, DIM), dim=-1), torch.ones(1, 200) + 1e-6 * torch.randn(1, 200)
    assert top_k_in_order(rounded, query.repeat(200, 1).__getitem__, query, 3)[1].tolist() == [[0, 1, 2]]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_of_a_caller_changes_nothing(dtype):
    torch.manual_seed(0)
    index = FromageImageIndex(torch.randn(50, 16), [str(i) for i in range(50)], dtype=dtype)
    queries = torch.randn(3, 16)
    expected = index.search(queries, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = index.search(queries, 5)
    assert found.ids == expected.ids and torch.equal(found.scores, expected.scores)
