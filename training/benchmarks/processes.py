"""Two processes against one: what losses, gradients and weights differ by, and what memory sharded backbones take."""

import gc
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing import start_processes
from transformers import TrainerCallback, TrainingArguments

from modeling_fromage import FromageTrainer

from ..publishing.provenance import provenance
from .presets import PRESETS, Preset, join, make_backbones
from .step import make_batch, our_inputs
from .timing import memory_counter, reset_peak_memory

GLOBAL_BATCH, EXAMPLES, EPOCHS = 8, 45, 2  # an epoch ends with a batch of 5
LARGE = {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096, "num_hidden_layers": 8,
         "num_attention_heads": 16}  # fmt: skip
SETTINGS = {"one process": (1, False), "two": (2, False), "two, sharded": (2, True)}  # processes, sharded


@dataclass
class Run:
    """One way to train the same batches."""

    setting: str
    accumulation: int
    dtype: str
    images: str  # "cached" features, or "pixels"


class _Gradients(TrainerCallback):
    """Keeps the first step's gradients, averaged and clipped."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.kept:
            named = kwargs["model"].named_parameters()
            self.kept = {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}


def _make_trainer(preset: Preset, run: Run, folder: str, callbacks: Sequence[TrainerCallback] = ()) -> FromageTrainer:
    world_size, is_sharded = SETTINGS[run.setting]
    model = join(preset, *make_backbones(preset, "cpu"))
    inputs = our_inputs(preset, make_batch(preset, "cpu", getattr(torch, preset.dtype)))
    if run.images == "cached":
        inputs["pooled_image_features"] = model.get_pooled_image_features(inputs.pop("pixel_values"))
    args = TrainingArguments(
        folder, per_device_train_batch_size=GLOBAL_BATCH // world_size, gradient_accumulation_steps=run.accumulation,
        num_train_epochs=EPOCHS, learning_rate=3e-4, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, seed=0, ddp_backend="gloo" if world_size > 1 else None,
    )  # fmt: skip

    def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[torch.tensor(numbers)] for name, tensor in inputs.items()}

    return FromageTrainer(
        model, args, collate, train_dataset=list(range(preset.batch_size)), callbacks=list(callbacks),
        shard_backbones=is_sharded,
    )  # fmt: skip


def _train(rank: int, runs: Sequence[Run], folder: str) -> None:
    """Train in each way, and write the losses, the first gradients and the weights of all to `folder/found.pt`."""
    found = []
    for run in runs:
        gradients = _Gradients()
        trainer = _make_trainer(
            replace(PRESETS["tiny"], batch_size=EXAMPLES, dtype=run.dtype), run, folder, [gradients]
        )
        trainer.train()
        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights = {name: p.detach() for name, p in named if p.requires_grad}
        found.append({"losses": {"loss": losses}, "gradients": gradients.kept, "weights": weights})
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def _measure_memory(rank: int, preset: Preset, run: Run, folder: str) -> None:
    """Write the resident memory above that of the imports: before the first step, and at its peak from there on."""
    before = memory_counter("VmRSS")
    trainer = _make_trainer(preset, run, folder)
    gc.collect()
    found = {"at rest": memory_counter("VmRSS") - before}
    reset_peak_memory()
    trainer.train()
    found["peak"] = memory_counter("VmHWM") - before
    torch.save(found, f"{folder}/memory{rank}.pt")


def _in_rank(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    function(rank, *arguments)


def in_processes(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(rank, *arguments)` in new processes, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_in_rank, (world_size, port, function, arguments), world_size, start_method="spawn")


def largest_differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest absolute difference of losses, gradients and weights."""
    return {
        kind: max((found[kind][name].double() - value.double()).abs().max().item() for name, value in tensors.items())
        for kind, tensors in expected.items()
    }


def measure(dtypes: Sequence[str], hidden_layers: int) -> dict[str, Any]:
    """Compare all settings with one process, for each of `dtypes`, and the memory of a large language model."""
    kinds = [(dtype, images, accumulation) for dtype in dtypes
             for images, accumulation in (("cached", 1), ("cached", 2), ("pixels", 1))]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in (1, 2):
        runs = [Run(setting, accumulation, dtype, images) for setting, (size, _) in SETTINGS.items()
                for dtype, images, accumulation in kinds if size == world_size]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            in_processes(world_size, _train, runs, folder)
            for run, result in zip(runs, torch.load(f"{folder}/found.pt", weights_only=True), strict=True):
                found.setdefault(run.setting, []).append(result)
    rows = []
    for i, (dtype, images, accumulation) in enumerate(kinds):
        for setting, reference in (("two", "one process"), ("two, sharded", "one process"), ("two, sharded", "two")):
            row = {"processes": setting, "compared_with": reference, "accumulation": accumulation, "dtype": dtype,
                   "images": images}  # fmt: skip
            rows.append(row | largest_differences(found[setting][i], found[reference][i]))
    largest = max(result["losses"]["loss"].abs().max().item() for result in found["one process"])
    preset = replace(PRESETS["tiny"], text={**LARGE, "num_hidden_layers": hidden_layers}, batch_size=EXAMPLES)
    language_model, vision_model = make_backbones(preset, "meta")
    weights = sum(p.nbytes for model in (language_model, vision_model) for p in model.parameters())
    memory: dict[str, Any] = {"weights": weights, "processes": {}}
    # Let glibc return what is freed at once: below this size it would keep it, and sharding would seem to save nothing.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    for setting in ("two", "two, sharded"):
        with tempfile.TemporaryDirectory() as folder:
            in_processes(2, _measure_memory, preset, Run(setting, 1, "float32", "cached"), folder)
            ranks = [torch.load(f"{folder}/memory{rank}.pt") for rank in range(2)]
            memory["processes"][setting] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return {
        "steps": EPOCHS * -(-EXAMPLES // GLOBAL_BATCH), "global_batch": GLOBAL_BATCH, "examples": EXAMPLES,
        "largest_loss": largest, "differences": rows, "memory": memory, **provenance("cpu"),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| processes | compared with | backbones | images | accumulation | losses | gradients | weights |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results["differences"]:
        figures = " | ".join(
            f"{row[kind]:.1e}" if row[kind] else "equal" for kind in ("losses", "gradients", "weights")
        )
        lines.append(f"| {row['processes']} | {row['compared_with']} | {row['dtype']} | {row['images']} | "
                     f"{row['accumulation']} | {figures} |")  # fmt: skip
    lines += ["", "| processes | memory of each before a step | at its peak |", "|---|---|---|"]
    for setting, row in results["memory"]["processes"].items():
        lines.append(f"| {setting} | {row['at rest'] / 1e6:.0f} MB | {row['peak'] / 1e6:.0f} MB |")
    note = (
        f"Largest absolute differences over {results['steps']} steps of {results['global_batch']} pairs (the last one "
        f"of an epoch of {results['examples']} is smaller); losses are up to {results['largest_loss']:.1f}; gradients "
        "are the first step's. Memory above that of the imports, of backbones of "
        f"{results['memory']['weights'] / 1e6:.0f} MB. {results['hardware']}, torch {results['versions']['torch']}."
    )
    return "\n".join([*lines, "", note])
