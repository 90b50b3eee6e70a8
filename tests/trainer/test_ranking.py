"""Metrics of rankings: equal to brute force, ties and edges included, and to the original's numbers."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_fromage.trainer import ranking
from modeling_fromage.trainer.ranking import gallery_ranks, recall_at_k
from tests.helpers.backbones import PARITY
from training.evaluation.metrics import ndcg, rank_metrics, target_ranks

METRICS = PARITY / "metrics"


def brute_rank(scores, matches):
    """Of the best match, with every wrong candidate that is as good before it."""
    best = max(score for score, match in zip(scores, matches, strict=True) if match)
    return 1 + sum(score >= best for score, match in zip(scores, matches, strict=True) if not match)


def vectors(count, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    if ties:  # few directions, so that many products are equal
        return F.normalize(torch.randint(-1, 2, (count, 3), generator=generator).double() + 1e-9, dim=-1)
    return F.normalize(torch.randn(count, 8, generator=generator).double(), dim=-1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [3, 7, 1000])
def test_gallery_ranks_are_brute_force(ties, block, monkeypatch):
    monkeypatch.setattr(ranking, "_QUERIES", block)
    monkeypatch.setattr(ranking, "_ENTRIES", block + 1)
    queries, gallery = vectors(23, 0, ties), vectors(31, 1, ties)
    generator = torch.Generator().manual_seed(2)
    gallery_labels = torch.cat([torch.arange(10), torch.randint(0, 12, (21,), generator=generator)])
    query_labels = torch.randint(0, 10, (23,), generator=generator)
    scores = (queries @ gallery.t()).round(decimals=5)  # exact ties, as far as they are meant
    expected = [
        brute_rank(row.tolist(), (gallery_labels == label).tolist())
        for row, label in zip(scores, query_labels, strict=True)
    ]
    assert gallery_ranks(queries, gallery, query_labels, gallery_labels).tolist() == expected
    if ties:
        assert len(set(expected)) > 3


def test_gallery_ranks_edges():
    same = torch.eye(4)
    assert gallery_ranks(same, same).tolist() == [1, 1, 1, 1]
    assert gallery_ranks(same[:1].expand(4, 4), same[:1].expand(4, 4)).tolist() == [4, 4, 4, 4]  # a constant model
    assert gallery_ranks(same[:0], same).tolist() == []
    everything = torch.zeros(4, dtype=torch.long)
    assert gallery_ranks(same, same, everything, everything).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"labels \[3\] have no match"):
        gallery_ranks(same, same[:3])
    with pytest.raises(ValueError, match="4 labels for 4 queries and 3 for 4"):
        gallery_ranks(same, same, everything, everything[:3])
    with pytest.raises(ValueError, match="NaN"):
        gallery_ranks(same * float("nan"), same)


def test_gallery_memory_does_not_grow_with_the_product():
    """No block is larger than 1024 x 16,384 scores, whatever the numbers of queries and entries."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel())
            return output

    embeds = F.normalize(torch.randn(20_000, 4), dim=-1)
    with Watch():
        ranks = gallery_ranks(embeds, embeds)
    assert (ranks == 1).double().mean() > 0.9 and largest <= 1024 * 16_384 < 20_000**2 / 20


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_target_ranks_and_metrics_are_brute_force(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (40, 17), generator=generator).float()
    targets = torch.randint(0, 17, (40,), generator=generator)
    ranks = target_ranks(scores, targets)
    expected = [brute_rank(row.tolist(), [i == target for i in range(17)])
                for row, target in zip(scores, targets.tolist(), strict=True)]  # fmt: skip
    assert ranks.tolist() == expected
    metrics = rank_metrics(ranks)
    assert metrics["N"] == 40
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"] == pytest.approx(sum(rank <= k for rank in expected) / 40)
    assert metrics["MRR"] == pytest.approx(sum(1 / rank for rank in expected) / 40)
    assert metrics["mean_rank"] == pytest.approx(sum(expected) / 40)
    assert metrics["median_rank"] == pytest.approx((sorted(expected)[19] + sorted(expected)[20]) / 2)


def test_rank_metrics_edges():
    assert rank_metrics(torch.tensor([], dtype=torch.long)) == {"N": 0}
    assert recall_at_k(torch.tensor([1, 6]), (1, 5, 6)) == {"R@1": 0.5, "R@5": 0.5, "R@6": 1.0}
    scores = torch.tensor([[float("nan"), 1.0, 2.0], [-math.inf, -math.inf, 0.0]])
    assert target_ranks(scores, torch.tensor([0, 0])).tolist() == [3, 3]


def brute_ndcg(scores, relevance):
    """The least that an order of the scores can give: ties count against the model."""
    count = sum(value != 0 for value in relevance)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevance[i]))
    gain = sum(relevance[i] / math.log2(place + 2) for place, i in enumerate(order[:count]))
    best = sum(value / math.log2(place + 2) for place, value in enumerate(sorted(relevance, reverse=True)[:count]))
    return gain / best


@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_ndcg_is_brute_force(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (20, 30), generator=generator).double()
    relevance = torch.randint(0, 6, (20, 30), generator=generator).double() / 5
    relevance[0] = 0
    relevance[0, 3] = 0.4
    expected = [brute_ndcg(row.tolist(), wanted.tolist()) for row, wanted in zip(scores, relevance, strict=True)]
    assert ndcg(scores, relevance).tolist() == pytest.approx(expected)
    assert ndcg(relevance, relevance).tolist() == pytest.approx([1.0] * 20)
    assert ndcg(scores[:1], torch.zeros(1, 30)).isnan().all()


def test_metrics_of_the_original():
    golden = load_file(METRICS / "metrics.safetensors")
    printed = json.loads((METRICS / "metrics.json").read_text(encoding="utf-8"))
    ranks = target_ranks(-golden["visdial.losses"], golden["visdial.gt_index"])
    assert torch.equal(ranks, golden["visdial.ranks_of_gt"])
    metrics = rank_metrics(ranks)
    assert metrics["MRR"] == pytest.approx(printed["visdial"]["mrr"], abs=1e-12)
    recall = recall_at_k(ranks, (1, 5, 10, 20))
    assert recall == {f"R@{k}": pytest.approx(value) for k, value in printed["visdial"]["recall"].items()}
    rows = torch.arange(24) * 10 + golden["visdial.round_id"]
    gains = ndcg(-golden["visdial.losses"][rows], golden["visdial.relevance"])
    torch.testing.assert_close(gains.double(), golden["visdial.ndcg_each"], atol=1e-6, rtol=0)
    assert gains.mean().item() == pytest.approx(printed["visdial"]["ndcg_one_observe_call"], abs=1e-6)

    scores = golden["vist.scores"].scatter(1, golden["vist.previous"], -torch.inf)
    assert torch.equal(scores.topk(10).indices, golden["vist.top10"])
    recall = recall_at_k(target_ranks(scores, golden["vist.gt"]))
    assert recall == {f"R@{k}": pytest.approx(value) for k, value in printed["vist"]["recall"].items()}

    similarity = golden["acc.square_logits"]
    accuracy = recall_at_k(target_ranks(similarity, torch.arange(len(similarity))), (1, 5))
    assert [100 * value for value in accuracy.values()] == pytest.approx(printed["acc"]["contrastive_acc_1_5"])
