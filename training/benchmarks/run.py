"""Benchmark of whole runs: the Trainer, with files, loader processes and logs, against the bare step."""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from modeling_fromage import FromageDataCollator, FromageProcessor, FromageTrainer

from .presets import PRESETS, Preset, join, make_backbones
from .step import caption_lengths, our_step
from .timing import seconds_of

_WARM_UP = 3  # steps that are not counted
Rows = list[dict[str, Any]]


def make_processor(preset: Preset) -> FromageProcessor:
    """CLIP's preprocessing at the preset's size, and a byte-level tokenizer of its vocabulary for captions of one
    repeated word."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["word word"] * 2, 300, special_tokens=["<pad>", "</s>"], show_progress=False)
    model = json.loads(bpe.to_str())["model"]
    unused = {f"unused{number}": number for number in range(len(model["vocab"]), preset.vocab_size)}
    bpe = ByteLevelBPETokenizer(model["vocab"] | unused, [tuple(pair) for pair in model["merges"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    size = preset.vision["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return FromageProcessor(image_processor, tokenizer)


def make_rows(preset: Preset, count: int, folder: Path) -> dict[str, Rows]:
    """`count` pairs with JPEG files (500 pixels, 4:3) in `folder`, and the same with cached features."""
    rng, paths = np.random.default_rng(0), []
    for i in range(32):
        small = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        paths.append(folder / f"{i}.jpg")
        small.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    # Of each batch the lengths of a step's captions, BOS and [RET] not among the words.
    lengths = itertools.islice(itertools.cycle(caption_lengths(preset.batch_size).tolist()), count)
    captions = [" ".join(["word"] * (length - 2)) for length in lengths]
    features = torch.randn(preset.vision["hidden_size"]).half()
    return {
        "live": [{"image": str(paths[i % 32]), "caption": text} for i, text in enumerate(captions)],
        "cached": [{"pooled_image_features": features, "caption": text} for text in captions],
    }


def measure_loader(preset: Preset, workers: int, count: int = 256) -> dict[str, float]:
    """Pairs per second that the loader delivers, from JPEG files and from cached features."""
    collator, rates = FromageDataCollator(make_processor(preset)), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in make_rows(preset, count, Path(folder)).items():
            loader = DataLoader(rows, batch_size=preset.batch_size, collate_fn=collator, num_workers=workers,
                                persistent_workers=workers > 0)  # fmt: skip
            for _ in loader:  # start the workers
                pass
            start = time.perf_counter()
            for _ in loader:
                pass
            rates[name] = count / (time.perf_counter() - start)
    return rates


class _Clock(TrainerCallback):
    """When each step began, and when training ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def measure_run(preset: Preset, device: str, workers: int, steps: int = 12) -> dict[str, float]:
    """The rate of a run by the Trainer over that of the bare step, from JPEG files and from cached features.

    The bare step is timed before the run and after it, on the batch that the run has again and again.
    """
    processor, shares = make_processor(preset), {}
    collator = FromageDataCollator(processor, concat_captions_prob=0.0)
    model = join(preset, *make_backbones(preset, device)).train()
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in make_rows(preset, preset.batch_size * steps, Path(folder)).items():
            batch = {key: tensor.to(device) for key, tensor in collator(rows[: preset.batch_size]).items()}
            bare = our_step(model, batch, cached=False)
            before = [seconds_of(bare, device) for _ in range(steps)]
            clock = _Clock()
            args = TrainingArguments(
                f"{folder}/run", per_device_train_batch_size=preset.batch_size, max_steps=steps, logging_steps=5,
                dataloader_num_workers=workers, save_strategy="no", report_to="none", use_cpu=device == "cpu",
                disable_tqdm=True, train_sampling_strategy="sequential",
            )  # fmt: skip
            FromageTrainer(model, args, collator, train_dataset=rows, callbacks=[clock]).train()
            after = [seconds_of(bare, device) for _ in range(steps)]
            shares[name] = _mean(before[_WARM_UP:] + after[_WARM_UP:]) / _mean(np.diff(clock.times[_WARM_UP:]))
    return shares


def measure(results: dict[str, Any], device: str) -> dict[str, Any]:
    """The results of [`step.measure`] with those of loading and of runs."""
    preset, workers = PRESETS[results["preset"]], max(1, (os.cpu_count() or 2) - 1)
    rates = measure_loader(preset, workers)
    for name, rate in rates.items():
        results["ratios"][name]["loader_over_step"] = rate * results["seconds"][name] / preset.batch_size
    run = measure_run(preset, device, workers)
    return {**results, "loader_workers": workers, "loader_pairs_per_second": rates, "run_over_step": run}


def _mean(seconds: Sequence[float]) -> float:
    return float(np.mean(seconds))
