"""What a training run logs beside its loss: the loss's parts, accuracies, speed, waiting for data, memory."""

import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter_fromage import trained_state
from ..training_losses_fromage import LOSS_WEIGHTS

logger = logging.getLogger(__name__)

WAITING = 0.1  # the share of a run's time that waiting for data is worth a word
_STEPS_BEFORE_A_WARNING = 10  # the first batches wait for workers to start


class TrainingMonitor(TrainerCallback):
    """Adds up what a run logs, on the device, so that no step waits for a number; only logging does.

    Losses and accuracies are weighted as the Trainer weights the loss that it logs: each batch by one over the number
    that its optimiser step accumulates, averaged over processes.
    """

    def __init__(self) -> None:
        self.is_quiet = False  # in a rehearsal: no word about waiting
        self._reset()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset()

    def _reset(self) -> None:
        self.parts: dict[str, torch.Tensor] = {}  # of the last batch
        self._clear()
        self._steps = 0  # of this run, and of the time since the second of them:
        self._total_seconds = self._total_waited = 0.0
        self._has_warned = self._reads_images = False

    def _clear(self) -> None:
        """Begin a new interval of logging."""
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}  # batches of documents may have no accuracies
        self.seconds = self.waited = 0.0
        self._examples, self._tokens = 0, torch.tensor(0)

    # ---- during a step ---------------------------------------------------------------------------------------------

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches of one optimiser step, counted, and the wait for each of them timed."""
        self._start, self._step_waited = time.perf_counter(), 0.0
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._step_waited += time.perf_counter() - start
            if batch is None:
                return
            self._reads_images = "pixel_values" in batch
            self._examples += len(next(iter(batch.values())))
            masks = [batch[name] for name in ("attention_mask", "retrieval_attention_mask") if name in batch]
            for mask in masks:
                self._tokens = self._tokens.to(mask.device) + mask.sum()
            yield batch

    def take(self, outputs: Mapping[str, Any]) -> None:
        """Keep the parts of a batch's loss and its accuracies, to be added up by [`add`] once the step is sound."""
        found = {name: outputs.get(name) for name in LOSS_WEIGHTS}
        self.parts = {name: value.detach().mean() for name, value in found.items() if value is not None}
        logits = outputs.get("logits_per_image")
        if logits is not None and logits.shape[0] == logits.shape[1]:  # nn.DataParallel joins those of its replicas
            self.parts |= in_batch_accuracies(logits.detach())

    def add(self, weight: float) -> None:
        for name, value in self.parts.items():
            self._sums[name] = self._sums.get(name, 0) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._start
        self.seconds += seconds
        self.waited += self._step_waited
        self._steps += 1
        if self._steps > 1:
            self._total_seconds += seconds
            self._total_waited += self._step_waited

    # ---- when something is logged ----------------------------------------------------------------------------------

    def means(self, accelerator: Any, model: Any) -> dict[str, float]:
        """What is logged of the steps since the last call; all processes must call this together."""
        if not self._weights:
            return {}
        device = accelerator.device
        local = [sums.float().to(device) / self._weights[name] for name, sums in self._sums.items()]
        numbers = [self.seconds, self.waited / self.seconds, self._examples, self._tokens.item(), *memory_in_gb()]
        names = [*self._sums, "seconds", "data_wait_share", "examples", "tokens", "memory_gb", "gpu_memory_gb"]
        row = torch.stack([*local, *(torch.tensor(float(number), device=device) for number in numbers)])
        rows = accelerator.gather(row[None])  # (number of processes, number of names)
        mean, most, total = (dict(zip(names, found.tolist(), strict=True))
                             for found in (rows.mean(0), rows.amax(0), rows.sum(0)))  # fmt: skip
        logs = {name: mean[name] for name in self._sums}
        logs |= trained_numbers(model)
        logs |= {f"{name}_per_second": total[name] / most["seconds"] for name in ("examples", "tokens")}
        logs |= {name: most[name] for name in ("data_wait_share", "memory_gb", "gpu_memory_gb")}
        if not torch.cuda.is_available():
            del logs["gpu_memory_gb"]
        self._clear()
        return logs

    @property
    def wait_share(self) -> float:
        """The share of this run's time that this process has waited for data, its first step left out."""
        return self._total_waited / self._total_seconds if self._total_seconds else 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (
            not self.is_quiet
            and not self._has_warned
            and self._steps > _STEPS_BEFORE_A_WARNING
            and self.wait_share > WAITING
        ):
            self._has_warned = True
            logger.warning("%s", self._what_limits())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._total_seconds and not self.is_quiet:
            logger.log(logging.WARNING if self.wait_share > WAITING else logging.INFO, "%s", self._what_limits())

    def _what_limits(self) -> str:
        waited = f"Waiting for data {100 * self.wait_share:.0f} % of the time"
        if self.wait_share <= WAITING:
            return f"{waited}: the model's steps are what limits the run."
        caching = ", or `fromage cache-features`" if self._reads_images else ""
        return f"{waited}: more `dataloader_num_workers`{caching}."


def in_batch_accuracies(logits_per_image: torch.Tensor) -> dict[str, torch.Tensor]:
    """How often, in a batch, a text is nearest to its own image of all, and an image to its own text.

    Ties count as wrong, as in [`gallery_ranks`]; so does another copy of an image.

    Args:
        logits_per_image (`torch.Tensor` of shape `(num_pairs, num_pairs)`): Of images (rows) and texts (columns).
    """
    own = logits_per_image.diagonal()
    return {
        "text_to_image_accuracy": ((logits_per_image >= own).sum(0) == 1).float().mean(),
        "image_to_text_accuracy": ((logits_per_image >= own[:, None]).sum(1) == 1).float().mean(),
    }


def trained_numbers(model: Any) -> dict[str, float]:
    """The scale of the contrastive logits, and the mean norm of `[RET]`'s embeddings."""
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        return {}
    trained = trained_state(adapter)
    return {
        "logit_scale": trained["logit_scale"].float().exp().mean().item(),
        "ret_embedding_norm": trained["ret_embedding.weight"].float().norm(dim=-1).mean().item(),
    }


def memory_in_gb() -> tuple[float, float]:
    """This process's highest resident memory so far, and the most that torch has allocated of its GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resident / 1e9, on_gpu / 1e9


__all__ = ["TrainingMonitor", "in_batch_accuracies", "memory_in_gb"]
