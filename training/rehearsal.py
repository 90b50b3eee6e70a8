"""A few steps of a run, taken for real with the run's own trainer, timed, and taken back."""

import copy
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import psutil
import torch
from torch.utils.data import IterableDataset, Subset
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl

from modeling_fromage import FromageTrainer, NormalizeRetEmbeddingCallback
from modeling_fromage.trainer.data_collator import retrieval_caption
from modeling_fromage.trainer.document_sequences import DocumentLayout
from modeling_fromage.trainer.documents import document_of
from modeling_fromage.trainer.monitoring import TrainingMonitor

LONG_STEPS, USUAL_STEPS = 2, 3  # steps of the longest batch, which memory is measured on, and of others, for the time
_SAMPLE, _DRAWS = 1000, 200  # captions whose lengths are looked at, and batches that are drawn from them
_PAGE = 4096  # bytes
_WITHOUT_WORKERS = {
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
}


class PeakMemory:
    """The most memory in use while it is entered, above what was in use before: what torch has allocated on a GPU, or
    what is resident of this process.

    Attributes:
        above (`int`): Bytes, after it is left.
    """

    def __init__(self, device: torch.device):
        self.device, self.above = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._process, self._ended = psutil.Process(), threading.Event()
            self._before = self._peak = self._process.memory_info().rss
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._ended.set()
            self._thread.join()
        self.above = self._peak - self._before


def touch_weights(model: torch.nn.Module) -> None:
    """Read each page of the weights, so that those of a file that is mapped into memory are resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is torch.Tensor and tensor.device.type == "cpu":
            tensor.data.flatten()[:: max(1, _PAGE // tensor.element_size())].sum()


@dataclass
class Rehearsal:
    """What was measured: bytes above the weights, and seconds of each step, of its waiting for data, and of an
    evaluation's batch."""

    peak_above_weights: int = 0
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    evaluation_batch: float = 0.0

    def step_seconds(self, workers: int) -> float:
        """Of a usual step; `workers` processes load while it runs."""
        usual = slice(-USUAL_STEPS, None)
        waited = statistics.median(self.waited[usual])
        computed = statistics.median(
            whole - wait for whole, wait in zip(self.seconds[usual], self.waited[usual], strict=True)
        )
        return max(computed, waited / workers) if workers else computed + waited


class _Stopwatch(TrainerCallback):
    def __init__(self, monitor: Any, rehearsal: Rehearsal):
        self.monitor, self.rehearsal = monitor, rehearsal

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.rehearsal.seconds.append(self.monitor.seconds - sum(self.rehearsal.seconds))
        self.rehearsal.waited.append(self.monitor.waited - sum(self.rehearsal.waited))


def rehearse(trainer: FromageTrainer) -> Rehearsal:
    """Take a few training steps, and evaluate a batch, as the run will. Afterwards the model, the trainer and the
    random numbers are what they were before, and nothing was written."""
    found = Rehearsal()
    evaluates = trainer.eval_dataset is not None and not isinstance(trainer.eval_dataset, (IterableDataset, dict))
    held_out = longest_batch(trainer, trainer.eval_dataset, trainer.args.eval_batch_size) if evaluates else None
    with _taken_back(trainer), tempfile.TemporaryDirectory() as folder:
        trainer.train_dataset = rehearsal_data(trainer)
        trainer.args = _arguments(trainer, folder)
        trainer.dirty_data = trainer.dirty_data.for_run(trainer.args)
        trainer.options = replace(trainer.options, retrieval_warm_start_steps=0)
        trainer.monitor = TrainingMonitor()
        trainer.monitor.is_quiet = True
        trainer.callback_handler = copy.copy(trainer.callback_handler)
        own = [DefaultFlowCallback(), NormalizeRetEmbeddingCallback(), trainer.monitor]
        trainer.callback_handler.callbacks = [*own, _Stopwatch(trainer.monitor, found)]
        touch_weights(trainer.model)
        with PeakMemory(trainer.args.device) as memory:
            trainer.train()
            for _ in range(2 if held_out is not None else 0):  # the first one warms up
                start = time.perf_counter()
                trainer.evaluate(held_out)
                found.evaluation_batch = time.perf_counter() - start
    found.peak_above_weights = memory.above
    return found


@contextmanager
def _taken_back(trainer: FromageTrainer) -> Iterator[None]:
    """Put the trainer, its model and the random numbers back to what they were."""
    model, attributes = trainer.model, dict(trainer.__dict__)
    trained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    training, random_state = model.training, random.getstate()
    trainer.control = TrainerControl()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
            trainer.__dict__.clear()
            trainer.__dict__.update(attributes)
            model.zero_grad(set_to_none=True)
            model.train(training)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in trained:
                        parameter.copy_(trained[name])
            random.setstate(random_state)


def _arguments(trainer: FromageTrainer, folder: str) -> Any:
    own = copy.copy(trainer.args)
    changed = {
        "output_dir": folder,
        "max_steps": LONG_STEPS + USUAL_STEPS,
        "train_sampling_strategy": "sequential",
        **_WITHOUT_WORKERS,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    for name, value in changed.items():
        setattr(own, name, value)
    return own


def rehearsal_data(trainer: FromageTrainer) -> Any:
    """The longest likely batch for as many steps as memory is measured on, then others."""
    args, dataset = trainer.args, trainer.train_dataset
    per_step = args.gradient_accumulation_steps * args.world_size
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, args.train_batch_size * per_step * (LONG_STEPS + USUAL_STEPS)))
    longest = longest_batch(trainer, dataset, args.train_batch_size).indices
    draw = random.Random(args.seed + 1)
    usual = [draw.randrange(len(dataset)) for _ in range(len(longest) * per_step * USUAL_STEPS)]
    return Subset(dataset, [*list(longest) * (per_step * LONG_STEPS), *usual])


def longest_batch(trainer: FromageTrainer, dataset: Any, size: int) -> Subset:
    """Of the batches that a run may draw, the one with most tokens."""
    draw = random.Random(trainer.args.seed)
    numbers = draw.sample(range(len(dataset)), min(len(dataset), max(_SAMPLE, size)))
    lengths = ((number, _length(trainer.data_collator, dataset, number, draw)) for number in numbers)
    pairs = [(number, length) for number, length in lengths if length]
    size = min(size, len(pairs))
    best = max((draw.sample(pairs, size) for _ in range(_DRAWS)), key=lambda batch: sum(length for _, length in batch))
    return Subset(dataset, [number for number, _ in best])


def _length(collator: Any, dataset: Any, number: int, draw: random.Random) -> int:
    """Tokens of an example's text; 0 where it cannot be read."""
    try:
        row = dataset[number]
        if (document := document_of(row)) is not None:
            return len(DocumentLayout(collator.processor, collator.max_document_length).encode(document)[0].input_ids)
        texts = retrieval_caption(row)
        text = texts if isinstance(texts, str) or not texts else draw.choice(texts)
        return collator.retrieval_inputs([text])["retrieval_attention_mask"].sum().item()
    except Exception:  # whatever a data set raises for a row; the run itself will say so, or skip it
        return 0


@contextmanager
def first_batches(trainer: FromageTrainer) -> Iterator[Any]:
    """The run's own loader, without workers; the random numbers are afterwards what they were."""
    with _taken_back(trainer), tempfile.TemporaryDirectory() as folder:
        trainer.args = copy.copy(trainer.args)
        trainer.args.output_dir = folder
        trainer.dirty_data = trainer.dirty_data.for_run(trainer.args)
        for name, value in _WITHOUT_WORKERS.items():
            setattr(trainer.args, name, value)
        yield trainer.get_train_dataloader()
