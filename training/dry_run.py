"""What a run will train, how long and in what memory, before it starts: `fromage train --dry-run`."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import TrainerState

from modeling_fromage import FromageTrainer
from modeling_fromage.losses_fromage import duplicate_mask
from modeling_fromage.trainer.warm_start import check_warm_start

from .first_batch import sheet_of_batch
from .rehearsal import LONG_STEPS, USUAL_STEPS, Rehearsal, first_batches, rehearse

_PEFT = ("modules_to_save", "default")  # what PEFT puts between a copy of a part and its name


def dry_run(trainer: FromageTrainer) -> str:
    """What `fromage train --dry-run` prints. The first batch is drawn into `output_dir/dry_run/first_batch.png`;
    nothing else is written."""
    if trainer.options.retrieval_warm_start_steps:
        check_warm_start(trainer.model, trainer.args, trainer.train_dataset)
    picture, batch = draw_first_batch(trainer)
    rehearsal = rehearse(trainer)
    sections = [
        ("What is trained", describe_parts(trainer.model)),
        ("The batch", describe_batch(trainer, batch)),
        ("The run", describe_run(trainer, rehearsal)),
        ("Memory", describe_memory(trainer, rehearsal)),
        ("The first batch, as pictures and tokens", [str(picture)]),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def describe_parts(model: Any) -> list[str]:
    """Each trained part with its shape, count and share; the frozen models with their dtypes."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    frozen = {"language_model": 0, "vision_model": 0}
    total = model.num_parameters()
    for name, parameter in model.named_parameters():
        within = name.split(".")
        if parameter.requires_grad:
            is_ours = "adapter" in within
            ours = [each for each in within[within.index("adapter") + 1 :] if each not in _PEFT] if is_ours else []
            parts.setdefault(ours[0] if ours else "in the language model", []).append(parameter)
    for side in frozen:
        module = getattr(model, side)
        frozen[side] = module.num_parameters() - module.num_parameters(only_trainable=True)
    rows = []
    for name, tensors in parts.items():
        shapes = " + ".join("x".join(map(str, each.shape)) or "1" for each in tensors)
        rows.append((name, shapes if len(tensors) <= 4 else f"{len(tensors)} tensors", sum(t.numel() for t in tensors)))
    rows.append(("trained in all", "", sum(count for _, _, count in rows)))
    for side, count in frozen.items():
        module = getattr(model, side)
        quantized = ", quantised" if getattr(module.config, "quantization_config", None) else ""
        dtype = str(module.dtype).removeprefix("torch.")
        rows.append((f"frozen: {side}", f"{type(module).__name__}, {dtype}{quantized}", count))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [
        f"{name:{widths[0]}}  {shape:{widths[1]}}  {count:>16,}  {100 * count / total:7.3f} %"
        for name, shape, count in rows
    ]


def describe_batch(trainer: FromageTrainer, batch: dict[str, torch.Tensor]) -> list[str]:
    """The effective batch, and the negatives of the contrastive loss: of a step's forward pass in all processes."""
    args, config = trainer.args, trainer.model.config
    pairs = args.train_batch_size * args.world_size
    if not isinstance(trainer.train_dataset, IterableDataset):
        pairs = min(pairs, len(trainer.train_dataset))
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    lines = [
        f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size:,} pairs a step = "
        f"{args.train_batch_size:,} x {args.gradient_accumulation_steps} accumulated x {processes}",
        f"{pairs - 1:,} negatives for each pair in the contrastive loss (accumulated batches do not see each other)",
    ]
    if "ret_targets" in batch:
        images, found = len(pooled_features(trainer, batch)), int((batch["ret_targets"] != -100).sum())
        lines[0] = lines[0].replace("pairs", "documents and pairs")
        lines[1] = (
            f"{images:,} images in the first batch, so {images - 1:,} negatives for each in the contrastive loss; "
            f"{found:,} are found from a document"
        )
    hard = batch.get("negative_pixel_values", batch.get("negative_image_features"))
    if hard is not None:
        lines[1] += f"; and {len(hard):,} hard negatives in the first batch"
    if config.mask_duplicate_images:
        masked = duplicate_mask(pooled_features(trainer, batch)).sum(1).float().mean().item()
        lines[-1] += f", less other copies of its image: {masked:.1f} in the first batch"
    return lines


def describe_run(trainer: FromageTrainer, rehearsal: Rehearsal) -> list[str]:
    """Examples, steps, epochs, what the intervals come to, and how long it takes."""
    args = trainer.args
    _, per_epoch, examples, _, _, _, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    epochs = steps / per_epoch
    lines = [f"{examples:,} examples, {steps:,} steps, {epochs:.2f} epochs"]
    if trainer.options.retrieval_warm_start_steps:
        size = min(trainer.options.retrieval_warm_start_batch_size, examples)
        lines.append(
            f"before it, retrieval alone: {trainer.options.retrieval_warm_start_steps:,} steps of {size:,} pairs "
            f"({size - 1:,} negatives) on cached vectors, once all pairs are encoded; its time is not in the estimate"
        )
    state = TrainerState()
    state.compute_steps(args, steps)
    times = {}
    for verb, kind in (("log", "logging"), ("evaluate", "eval"), ("save", "save")):
        strategy, every = getattr(args, f"{kind}_strategy"), getattr(state, f"{kind}_steps")
        if strategy == "steps":
            times[verb] = steps // every
            lines.append(f"{verb} every {every:,} steps: {times[verb]:,} times")
        else:
            times[verb] = math.ceil(epochs) if strategy == "epoch" else 0
            lines.append(f"{verb}: {f'each epoch, {times[verb]} times' if times[verb] else strategy.value}")
    step = rehearsal.step_seconds(args.dataloader_num_workers)
    seconds, told = steps * step, f"{step:.3g} s a step"
    if rehearsal.evaluation_batch:
        batches = math.ceil(len(trainer.eval_dataset) / (args.eval_batch_size * args.world_size))
        once = batches * rehearsal.evaluation_batch
        seconds += (times["evaluate"] + 1) * once
        told += f", {once:.3g} s an evaluation"
    lines.append(f"time: {duration(seconds)}, by {USUAL_STEPS} steps that were timed ({told})")
    waited = statistics.median(rehearsal.waited[-USUAL_STEPS:])
    lines.append(
        f"loading takes {waited:.3g} s a step in one process; {args.dataloader_num_workers} workers are asked for"
    )
    return lines


def describe_memory(trainer: FromageTrainer, rehearsal: Rehearsal) -> list[str]:
    tensors = (*trainer.model.parameters(), *trainer.model.buffers())
    weights = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)  # of this process
    on_gpu = trainer.args.device.type == "cuda"
    where = f"on {trainer.args.device}" if on_gpu else "resident in this process, the loader's workers not counted"
    lines = [
        f"{size(weights)} of weights, and {size(rehearsal.peak_above_weights)} above them at the peak",
        f"measured {where}:",
        f"{LONG_STEPS} steps of the longest likely batch, and an evaluation's",
    ]
    if on_gpu:
        lines.append(f"the card has {size(torch.cuda.get_device_properties(trainer.args.device).total_memory)}")
    return lines


def size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# ---- the first batch ------------------------------------------------------------------------------------------------


def draw_first_batch(trainer: FromageTrainer) -> tuple[Path, dict[str, torch.Tensor]]:
    """Draw the first batch; returns the picture's path, and the batch."""
    with first_batches(trainer) as loader:
        batch = {name: tensor.cpu() for name, tensor in next(iter(loader)).items()}
    path = Path(trainer.args.output_dir or "", "dry_run", "first_batch.png")
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet_of_batch(batch, trainer.processing_class).save(path)
    return path, batch


@torch.no_grad()
def pooled_features(trainer: FromageTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "pooled_image_features" in batch:
        return batch["pooled_image_features"]
    return trainer.model.get_pooled_image_features(batch["pixel_values"].to(trainer.args.device))
