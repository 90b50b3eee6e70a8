"""The Trainer in one process and in two, on the same global batches."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from modeling_fromage import FromageDataCollator, FromageTrainer
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import arguments, examples

GLOBAL_BATCH, COUNT = 8, 13  # so that an epoch ends with a batch of 5


def pixel_examples(count: int) -> list[dict]:
    from PIL import Image

    generator = torch.Generator().manual_seed(9)
    pixels = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return [{"image": Image.fromarray(p.numpy()), "caption": f"thing {i}" + " or so" * (i % 3)}
            for i, p in enumerate(pixels)]  # fmt: skip


def make_trainer(folder: Path, model=None, world_size: int = 1, data=None, **options: Any) -> FromageTrainer:
    """A Trainer for this process; `options` are of TrainingArguments and, by their names, of FromageTrainer."""
    own = {name: options.pop(name) for name in ("shard_backbones", "callbacks", "ema_decay") if name in options}
    if model is None:
        model = make_model("opt_clip", ret_token_id=501).double()
        model.adapter.double()
    options = {"max_steps": -1, "num_train_epochs": 2, "ddp_backend": "gloo" if world_size > 1 else None, **options}
    args = arguments(folder, **{"per_device_train_batch_size": GLOBAL_BATCH // world_size, **options})
    processor = make_processor()
    collator = FromageDataCollator(processor, concat_captions_prob=0.0)
    data = examples(COUNT) if data is None else data
    return FromageTrainer(
        model, args, collator, train_dataset=data, eval_dataset=data[:6], processing_class=processor, **own
    )


def record(trainer: FromageTrainer) -> dict[str, Any]:
    """Train, and return the losses, the norms of the gradients, and the trained weights."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "captioning_loss", "ret_token_loss", "contrastive_loss", "grad_norm")
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logs": [[entry[name] for name in names] for entry in logs], "weights": weights}


def save_averages(rank: int, folder: str, found: Iterable[tuple[Any, tuple[torch.Tensor, dict]]]) -> None:
    """Average losses and gradients over two processes, as DDP does, and let the first save them to `result.pt`.

    Args:
        found: A case with its loss and its gradients; begun once the processes know each other.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    averages = {}
    for case, (loss, grads) in found:
        for value in (loss, *grads.values()):
            torch.distributed.all_reduce(value)
            value /= 2
        averages[case] = loss, grads
    if rank == 0:
        torch.save(averages, f"{folder}/result.pt")
    torch.distributed.destroy_process_group()


def in_two_processes(function, *arguments: Any) -> None:
    """`function(rank, *arguments)` in two processes that find each other as under torchrun."""
    run_ranks(with_environment, free_port(), function, arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def with_environment(rank: int, port: int, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})  # fmt: skip
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def assert_close(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(found["logs"]), torch.tensor(expected["logs"]), **tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
