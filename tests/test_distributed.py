"""Two processes train as one: losses over all ranks' targets and pairs, with gradient."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.backbones import VOCAB, make_model
from tests.test_model import pad

IMAGE, RET = VOCAB, VOCAB + 1
CAPTIONS = [[2, 5, 6], [2, 7], [2, 8, 9, 10, 11], [2, 12, 13], [2, 14, 15, 16]]


def batch_of(rows: list[int], k: int) -> dict[str, torch.Tensor]:
    images = torch.rand(len(CAPTIONS), 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    captioning = pad([[IMAGE] * k + CAPTIONS[i] for i in rows], "right")
    retrieval = pad([CAPTIONS[i] + [RET] for i in rows], "right")
    is_no_target = (captioning["input_ids"] == IMAGE) | (captioning["attention_mask"] == 0)
    return {
        **captioning,
        "labels": captioning["input_ids"].masked_fill(is_no_target, -100),
        "pixel_values": images[rows],
        "retrieval_input_ids": retrieval["input_ids"],
        "retrieval_attention_mask": retrieval["attention_mask"],
    }


def gradients(rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = make_model("opt_clip").double().train()
    model.adapter.double()
    loss = model(**batch_of(rows, model.config.num_image_tokens)).loss
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
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    loss, grads = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
