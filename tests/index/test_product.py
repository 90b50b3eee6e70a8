"""The way in which one query's product is computed: the faster one, whatever a noisy timing says."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.index.backends import flat
from modeling_fromage.index.backends.flat import FasterProduct


class Clock:
    """Stands still but for what the ways take."""

    def __init__(self, monkeypatch, **seconds: list[float]):
        self.now, self.calls = 0.0, []
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        monkeypatch.setattr(flat.time, "perf_counter", lambda: self.now)

    def way(self, name: str):
        def run(matrix, query):
            self.calls.append(name)
            self.now += next(self.seconds[name], 1.0)
            return name

        return run


@pytest.mark.parametrize(("slow", "fast"), [("plain", "doubled"), ("doubled", "plain")])
def test_one_noisy_timing_decides_nothing(monkeypatch, slow, fast):
    # The faster one is first disturbed by a hundred times, and later again; the slower one never.
    clock = Clock(monkeypatch, **{fast: [100, 1.0, 1.0, 90, 1.0], slow: [2.0] * 5})
    product = FasterProduct(clock.way("plain"), clock.way("doubled"))
    for _ in range(20):
        product("some kind", None, None)
    assert sorted(clock.calls[:10]) == ["doubled"] * 5 + ["plain"] * 5 and set(clock.calls[10:]) == {fast}
    assert product("another kind", None, None) == "plain"  # tries anew


def test_threads_agree():
    product = FasterProduct(flat._plain, flat._doubled)
    matrix, query = torch.randn(500, 16), torch.randn(1, 16)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: product("kind", matrix, query), range(200)))
    for each in found:
        torch.testing.assert_close(each, query @ matrix.t())
    assert set(product._fastest) == {"kind"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_do_not_depend_on_the_way(monkeypatch, dtype):
    rows = F.normalize(torch.randn(37, 16), dim=-1)[torch.randint(37, (500,))]  # ties
    index = FromageImageIndex(rows, [str(i) for i in range(500)], dtype=dtype)
    found = []
    for way in (flat._plain, flat._doubled):
        monkeypatch.setattr(flat, "_one_query_product", FasterProduct(way))
        found.append(index.search(rows[:1], 50))
    assert found[0].ids == found[1].ids and torch.equal(found[0].scores, found[1].scores)
