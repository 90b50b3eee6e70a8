"""The way in which one query's product is computed: the faster one, whatever a noisy timing says."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.index.backends import flat
from modeling_fromage.index.backends.flat import FasterProduct
from modeling_fromage.index.backends.ranking import ROUNDING
from tests.helpers.indexes import DIM, WHERES, Entry, assert_searches, index_of, make_entries, small_shards


class Clock:
    """Stands still but for what the ways take."""

    def __init__(self, monkeypatch, **seconds: list[float]):
        self.now, self.calls = 0.0, []
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        monkeypatch.setattr(flat.time, "process_time", lambda: self.now)
        self.product = FasterProduct(*map(self.way, seconds))

    def way(self, name: str):
        def run(matrix, query):
            self.calls.append(name)
            self.now += next(self.seconds[name])
            return name

        return run

    def run(self, kind="some kind") -> list[str]:
        """What one product calls: the trials, and last the way that computes it."""
        self.calls.clear()
        result = self.product(kind, torch.empty(9, 2), None)
        assert result == self.calls[-1]
        return [*self.calls]


@pytest.mark.parametrize(("slow", "fast"), [("plain", "doubled"), ("doubled", "plain")])
def test_noisy_timings_decide_nothing(monkeypatch, slow, fast):
    # Two of five timings of the faster one are disturbed by a hundred times; the slower one's never.
    clock = Clock(monkeypatch, **{name: [100, 1.0, 1.0, 90] + [1.0] * 99 if name == fast else [2.0] * 99
                                  for name in ("plain", "doubled")})  # fmt: skip
    assert clock.run() == ["plain", "doubled"] * 5 + [fast]
    assert clock.run() == ["plain", "doubled", fast] and clock.run() == [fast]
    assert clock.run("another kind")[:10] == ["plain", "doubled"] * 5  # tries anew


def test_no_mistake_is_for_ever(monkeypatch):
    """Most of the first timings of the faster way are disturbed."""
    clock = Clock(monkeypatch, plain=[2.0] * 999, doubled=[9.0, 9.0, 9.0, 9.0] + [1.0] * 999)
    found = [clock.run() for _ in range(300)]
    assert [number for number, names in enumerate(found, 1) if len(names) > 1] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [names[-1] for names in found] == ["plain"] * 3 + ["doubled"] * 297


def test_what_suffers_from_other_work_is_given_up(monkeypatch):
    clock = Clock(monkeypatch, plain=[2.0] * 100, doubled=[1.0] * 6 + [8.0] * 100)
    assert [clock.run()[-1] for _ in range(16)] == ["doubled"] * 7 + ["plain"] * 9


def test_threads_agree():
    product = FasterProduct(flat._plain, flat._doubled)
    matrix, query = torch.randn(500, 16), torch.randn(1, 16)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: product("kind", matrix, query), range(200)))
    for each in found:
        torch.testing.assert_close(each, query @ matrix.t())
    assert [len(timings) for timings in product._seconds["kind"]] == [flat._TRIALS] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_do_not_depend_on_the_way(monkeypatch, dtype):
    monkeypatch.setattr(flat, "_NUMBERS_AT_A_TIME", 100)  # pieces of 6 rows
    rows = F.normalize(torch.randn(37, 16), dim=-1)[torch.randint(37, (500,))]  # ties
    index = FromageImageIndex(rows, [str(i) for i in range(500)], dtype=dtype)
    found = []
    for way in flat._one_query_products[dtype]._ways:
        monkeypatch.setitem(flat._one_query_products, dtype, FasterProduct(way))
        found.append(index.search(rows[:1], 50))
    for each in found[1:]:
        assert each.ids == found[0].ids and torch.equal(each.scores, found[0].scores)
    both = index.search(rows[:2], 50)
    assert both.ids[0] == found[0].ids[0] and torch.equal(both.scores[:1], found[0].scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 64, 256, 2048])
def test_products_are_as_exact_as_is_said(dtype, dim):
    """Also where all roundings add up: every number of the query and of the rows is just above, or below, what fp16 has
    between two powers of two; and rows are as long as a file's may be."""
    query = F.normalize(torch.cat([torch.full((1, dim), 1 + 2.0**-11), torch.full((1, dim), 1 + 3 * 2.0**-11)]), dim=-1)
    queries = torch.cat([query, query * 1.0004, F.normalize(torch.randn(20, dim), dim=-1)])
    queries = queries.clamp(max=1)
    rows = torch.cat([1.01 * queries, F.normalize(queries.roll(1, 0) + 0.1 * torch.randn_like(queries), dim=-1)])
    rows = rows.to(dtype)
    for query in queries:
        exact = (rows.double() * query.double()).sum(-1)
        for way in flat._one_query_products[dtype]._ways:
            found = way(rows, query[None])
            assert found.shape == (1, len(rows))
            assert 2 * (found[0].double() - exact).abs().max() <= ROUNDING[found.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_close_cosines_are_told_apart(dtype):
    """A hundred times as many rows as are wanted, nearer to one another than a product in the rows' dtype can tell."""
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(1, 64, generator=generator), dim=-1)
    rows = F.normalize(query + 2e-3 * torch.randn(1000, 64, generator=generator), dim=-1)
    index = FromageImageIndex(rows, [str(i) for i in range(1000)], dtype=dtype)
    exact = (index.embeds.double() * query.double()).sum(-1).float()
    for way in flat._one_query_products[dtype]._ways:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(flat._one_query_products, dtype, FasterProduct(way))
            ids = index.search(query, 10).ids[0]
        assert ids == [str(i) for i in exact.argsort(descending=True, stable=True)[:10].tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_follow_one_another_are_one_product(monkeypatch, dtype):
    small_shards(monkeypatch, 7)
    rows = F.normalize(torch.randn(60, 16), dim=-1)
    index = FromageImageIndex(rows[:40], [str(i) for i in range(40)], dtype=dtype)
    index.add(rows[40:], [str(i) for i in range(40, 60)])
    shards = index._store.now.shards
    joined = list(flat._joined(shard.rows() for shard in shards))
    assert [len(some) for some in joined] == [35, 7, 18] and [shard.count for shard in shards] == [7] * 8 + [4]
    assert torch.equal(torch.cat(joined), index.embeds.to(dtype))
    assert_searches(index, [Entry(str(i), row, {}) for i, row in enumerate(rows)], rows[:1] + 0.1, 20)


@pytest.mark.parametrize("where", [None, {"kept": [1, 2]}])
def test_shards_may_be_computed_in_different_ways(monkeypatch, where):
    """One in fp16, the next in fp32: what is said of all is as exact as the least exact is."""
    small_shards(monkeypatch, 200)
    ways = itertools.cycle(flat._one_query_products[torch.float16]._ways)
    monkeypatch.setitem(flat._one_query_products, torch.float16, lambda _, *args: next(ways)(*args))
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(1, 64, generator=generator), dim=-1)
    rows = F.normalize(query + 2e-3 * torch.randn(1000, 64, generator=generator), dim=-1)
    metadata = [{"kept": i % 3} for i in range(1000)]
    index = FromageImageIndex(rows[:100], [str(i) for i in range(100)], metadata[:100], dtype=torch.float16)
    for first in range(100, 1000, 150):  # which leaves shards that do not follow one another in memory
        numbers = range(first, first + 150)
        index.add(rows[first : first + 150], [str(i) for i in numbers], [metadata[i] for i in numbers])
    assert len(list(flat._joined(shard.rows() for shard in index._store.now.shards))) > 2
    exact = (index.embeds.double() * query.double()).sum(-1).float()
    best = [i for i in exact.argsort(descending=True, stable=True).tolist() if where is None or i % 3]
    assert index.search(query, 10, where=where).ids[0] == [str(i) for i in best[:10]]


@pytest.mark.parametrize("count", [1, 3])
def test_shards_are_ranked_in_groups(monkeypatch, count):
    """What is found in earlier groups is not lost, whether or not later ones hold anything near."""
    small_shards(monkeypatch, 7)
    monkeypatch.setattr(flat, "_SCORES_AT_A_TIME", 20 * count)
    entries = make_entries(200, distinct=30)
    index = index_of(entries)
    assert [len(group) for group in flat._groups(index._store.now.shards, 20)] == [2] * 13 + [3]
    for query in (torch.randn(count, DIM), entries[0].row.repeat(count, 1), entries[-1].row.repeat(count, 1)):
        for top_k in (1, 8, 150):
            assert_searches(index, entries, query, top_k)
            assert_searches(index, entries, query, top_k, where=WHERES[1], exclude_ids=["image 0", "image 7"])
            assert_searches(index, entries, query, top_k, where={"$.path": [2.5, "3"]})
