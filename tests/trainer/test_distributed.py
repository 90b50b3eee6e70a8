"""Two processes train as one: losses over all ranks' targets and pairs, with gradient."""

import torch
import torch.distributed as dist

from tests.helpers.batches import double_model, make_batch
from tests.helpers.processes import run_ranks


def gradients(rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = double_model("opt_clip")
    pixels = torch.rand(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loss = model(**make_batch(model, pixels, rows)).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def worker(rank: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loss, grads = gradients([[0, 1, 2], [3, 4]][rank])  # uneven
    for value in (loss, *grads.values()):
        dist.all_reduce(value)
        value /= 2  # as DDP averages
    if rank == 0:
        torch.save((loss, grads), f"{folder}/result.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    expected_loss, expected = gradients([0, 1, 2, 3, 4])
    run_ranks(worker, str(tmp_path))
    loss, grads = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
