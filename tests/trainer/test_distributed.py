"""Two processes train as one: losses over all ranks' targets and pairs, with gradient."""

import itertools
import math

import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from modeling_fromage.trainer.rank_batches import RankBatches
from tests.helpers.batches import double_model
from tests.helpers.distributed import (
    assert_close,
    in_two_processes,
    make_trainer,
    pixel_examples,
    record,
    save_averages,
)
from tests.helpers.documents import make_batch as documents_and_pairs
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import examples

# The captions and the documents that a rank's batch has, in two cases.
SHARES = {
    "pairs": [([0, 1, 2], []), ([3, 4], [])],  # uneven
    "documents and pairs": [([0, 1], []), ([2], [0, 1])],
    "one with documents alone": [([], [2]), ([0, 1, 3], [])],
}


LOSSES = {
    "InfoNCE": {},
    "SigLIP": {"contrastive_loss_type": "siglip", "mask_duplicate_images": True},
    "smoothed": {"contrastive_label_smoothing": 0.2, "captioning_label_smoothing": 0.1},
}


def gradients(captions: list[int], documents: list[int], options: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = double_model("opt_clip", **options)
    pixels = torch.rand(11, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pixels[7] = pixels[6]  # of captions 0 and 1, which two processes may have
    loss = model(**documents_and_pairs(model, pixels, captions, documents)).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def worker(rank: int, folder: str):
    cases = itertools.product(SHARES.items(), LOSSES.items())
    found = (((case, kind), gradients(*shares[rank], options)) for (case, shares), (kind, options) in cases)
    save_averages(rank, folder, found)


def test_two_processes_equal_one(tmp_path):
    run_ranks(worker, str(tmp_path))
    for (case, kind), (loss, grads) in torch.load(tmp_path / "result.pt", weights_only=True).items():
        (first, second) = SHARES[case]
        expected_loss, expected = gradients(first[0] + second[0], first[1] + second[1], LOSSES[kind])
        case = f"{case}, {kind}"
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0, msg=lambda m, case=case: f"{case}: {m}")
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            told = f"{case}, {name}"
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, t=told: f"{t}: {m}")


# ---- the Trainer -----------------------------------------------------------------------------------------------------

CASES = {
    "cached features": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "pixels": {"data": 6, "num_train_epochs": 1},
    "a leftover": {"data": 9},  # fewer examples than processes in the last batch
}


def options_of(case: str, world_size: int) -> dict:
    options = dict(CASES[case])
    if case == "pixels":
        options |= {"data": pixel_examples(options["data"]), "per_device_train_batch_size": 4 // world_size}
    elif "data" in options:
        options["data"] = examples(options["data"])
    return options


def train_all(rank: int, folder: str):
    found = {case: record(make_trainer(folder, world_size=2, **options_of(case, 2))) for case in CASES}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.fixture(scope="module")
def in_two(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(train_all, str(folder))
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, in_two, tmp_path):
    expected = record(make_trainer(tmp_path, **options_of(case, 1)))
    found = in_two[case]
    if case == "a leftover":  # each process takes it, so that the contrastive loss of that step is larger by log 2
        for step in (1, 3):
            for column in (0, 3):
                found["logs"][step][column] -= math.log(2)
    assert_close(found, expected, rtol=1e-7, atol=1e-8)  # AdamW divides by gradients that may be tiny


def test_the_last_batch_is_shared_out():
    def shares(count: int, drop_last: bool = False) -> list[list[list[int]]]:
        batches = BatchSampler(SequentialSampler(range(count)), 4, drop_last)
        ranks = [RankBatches(batches, 3, rank) for rank in range(3)]
        assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks]
        return [list(rank) for rank in ranks]

    assert shares(24) == [[[*range(r * 4, r * 4 + 4)], [*range(12 + r * 4, 16 + r * 4)]] for r in range(3)]
    assert [rank[-1] for rank in shares(17)] == [[12], [13, 14], [15, 16]]
    assert [rank[-1] for rank in shares(14)] == [[12, 13]] * 3
    assert all(len(rank) == 1 for rank in shares(23, drop_last=True))
