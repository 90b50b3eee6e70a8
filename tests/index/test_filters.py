"""Filters by column against the SQL that they replace, on random metadata; what they keep in memory."""

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import columns as columns_module
from modeling_fromage.index.metadata_store import MetadataStore
from modeling_fromage.index.values import as_entries
from tests.helpers.indexes import DIM

# SQLite ends a text at a NUL.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64, 2.0**63, 0.1, -0.0, 1e300]),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.sampled_from(["", "1", "true", "null", "[]", "{}"]))
VALUES = st.one_of(
    SCALARS, st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=3), st.dictionaries(TEXT, SCALARS)
)
NAMES = st.sampled_from(["a", "b", 'a "quoted" name', "$.path", ""])
METADATA = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=12)
WHERE = st.dictionaries(NAMES, st.one_of(SCALARS, st.lists(SCALARS, max_size=4)), min_size=1, max_size=2)


def matching_by_sql(connection: sqlite3.Connection, where: dict[str, Any], count: int) -> list[int]:
    """Positions by the query that filters once were."""
    conditions, values = [], []
    for name, wanted in where.items():
        wanted = wanted if isinstance(wanted, list) else [wanted]
        one_of = "({0}.atom IN (SELECT atom FROM json_each(?)) OR ({0}.type = 'null' AND ?))"
        conditions.append(
            f"EXISTS (SELECT 1 FROM json_each(metadata) AS fact WHERE fact.key = ? AND ({one_of.format('fact')} OR "
            f"(fact.type = 'array' AND EXISTS (SELECT 1 FROM json_each(fact.value) AS item WHERE "
            f"{one_of.format('item')}))))"
        )
        values += [name, *[json.dumps(wanted), None in wanted] * 2]
    query = f"SELECT position FROM entries WHERE position < ? AND {' AND '.join(conditions)}"  # noqa: S608
    return [position for (position,) in connection.execute(query, [count, *values])]


def store_of(metadata: list[dict[str, Any]]) -> MetadataStore:
    store = MetadataStore()
    store.add(0, as_entries([str(i) for i in range(len(metadata))], metadata))
    return store


@settings(max_examples=150, deadline=None)
@given(METADATA, st.lists(WHERE, min_size=1, max_size=3), st.integers(0, 12), st.sampled_from([1, 1 << 28]))
def test_filters_match_what_sql_does(metadata, wheres, earlier, most_bytes):
    """Also of an earlier snapshot first, and where no column may be kept."""
    store = store_of(metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "_MOST_BYTES", most_bytes)
        patch.setattr(columns_module, "_ROWS_AT_A_TIME", 5)
        for where in wheres:
            for count in (min(earlier, len(metadata)), len(metadata)):
                found = store.mask(where, count)
                assert found.shape == (count,)
                assert found.nonzero()[:, 0].tolist() == matching_by_sql(store.connection, where, count)


def test_filters_see_what_is_added_updated_and_deleted():
    index = FromageImageIndex(torch.eye(6, DIM), list("abcdef"), [{"n": i % 2} for i in range(6)])

    def found(n: int) -> set[str]:
        return set(index.search(torch.ones(1, DIM), 9, where={"n": n}).ids[0])

    assert found(1) == set("bdf") and found(2) == set()
    index.add(torch.eye(1, DIM), ["g"], [{"n": [1, 2]}])
    index.update("b", metadata={"n": 2})
    index.delete(["d"])
    assert found(1) == set("fg") and found(2) == set("bg")
    with pytest.raises(ValueError, match="unique"):
        index.add(torch.eye(2, DIM), ["h", "a"], [{"n": 1}, {"n": 1}])
    index.add(torch.eye(1, DIM), ["h"], [{"n": 3}])  # at the position that the refused one had for a moment
    assert found(1) == set("fg") and found(3) == {"h"}


def test_columns_are_bounded_and_made_once(monkeypatch):
    store = store_of([{name: f"{name} {i}" for name in "abcd"} for i in range(100)])
    reads = []
    between = MetadataStore._metadata_between
    monkeypatch.setattr(
        MetadataStore, "_metadata_between", lambda self, *args: reads.append(args) or between(self, *args)
    )

    def reads_of(name: str) -> int:
        reads.clear()
        assert store.mask({name: f"{name} 7"}, 100).nonzero()[:, 0].tolist() == [7]
        return len(reads)

    assert not store._columns._columns  # nothing for those who never filter
    assert [reads_of(name) for name in "abab"] == [1, 1, 0, 0]
    size = store._columns._columns["a"].nbytes
    monkeypatch.setattr(columns_module, "_MOST_BYTES", 2 * size + 100)
    assert [reads_of(name) for name in "bcbca"] == [0, 1, 0, 0, 1]  # c in the place of a, a in that of b
    assert sorted(store._columns._columns) == ["a", "c"]
    monkeypatch.setattr(columns_module, "_MOST_BYTES", size // 2)
    assert reads_of("d") and reads_of("d") and store._columns._columns["d"] is None


def test_threads_filter_at_once():
    store = store_of([{"n": i % 7} for i in range(20_000)])
    with ThreadPoolExecutor(6) as pool:
        counts = pool.map(lambda n: int(store.mask({"n": n}, 20_000).sum()), [0, 1, 2, 3, 4, 5, 6] * 4)
    assert sum(counts) == 4 * 20_000


def test_names_that_no_image_has_cost_nothing(monkeypatch):
    """Metadata is read once: later filters know which names there are."""
    store = store_of([{"a": i} for i in range(5000)])
    reads: list[int] = []
    between = store._metadata_between
    monkeypatch.setattr(
        store, "_metadata_between", lambda start, stop: reads.append(stop - start) or between(start, stop)
    )
    assert not store.mask({f"no {i}": i for i in range(100)}, 5000).any() and sum(reads) == 5000
    assert not store.mask({"none": 1}, 5000).any() and not store.mask({"a": 1, "none": 1}, 3000).any()
    assert sum(reads) == 8000  # for the column "a"
    store.add(5000, as_entries(["new"], [{"none": 1}]))
    assert store.mask({"none": 1}, 5001).nonzero().tolist() == [[5000]]
    monkeypatch.setattr(columns_module, "_MOST_NAMES", 1)
    assert store.mask({"none": 1}, 5001).sum() == 1 and not store.mask({"other": 1}, 5001).any()
