"""An exponential moving average of what is trained, which is evaluated and saved in the place of the last weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .sharding import base_of

FILE = "weight_average.safetensors"  # of a checkpoint: the weights that training goes on with, and their average
_TRAINED, _AVERAGE = "trained/", "average/"


class WeightAverage(TrainerCallback):
    """After each optimiser step, `average = decay * average + (1 - decay) * trained`, from the first weights on.

    Every process keeps its own, which are equal: what is trained is whole on each, beside sharded backbones too.

    Args:
        decay (`float`, *optional*): Without it nothing is averaged.
    """

    def __init__(self, decay: float | None):
        self.decay = decay
        self._average: dict[str, torch.Tensor] = {}
        self._trained: dict[str, torch.Tensor] = {}  # while the average is in the model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.decay is not None and not self._average:  # else it was loaded
            self._average = {name: _at_least_fp32(p).clone() for name, p in _parameters(kwargs["model"]).items()}

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.decay is not None:
            trained = [_at_least_fp32(parameter) for parameter in _parameters(kwargs["model"]).values()]
            get_ema_multi_avg_fn(self.decay)(list(self._average.values()), trained, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        has_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._average and not has_best:  # the best model has been loaded, an average already
            self._put(kwargs["model"])

    def forget(self) -> None:
        """Of a run that has ended, or was broken off: what is evaluated from now on is what the model has."""
        self._average = {}

    @torch.no_grad()
    def _put(self, model: Any) -> None:
        for name, parameter in _parameters(model).items():
            parameter.copy_(self._average[name])
        base = base_of(getattr(model, "module", model))
        base.normalize_ret_embedding()  # a mean of vectors is shorter than they are
        base.adapter.clamp_logit_scale(base.config.logit_scale_max)  # the mean has the first scale in it

    @contextmanager
    def in_use(self, model: Any) -> Iterator[None]:
        """Within, `model` has the average, if there is one."""
        if not self._average or self._trained:
            yield
            return
        self._trained = {name: p.detach().clone() for name, p in _parameters(model).items()}
        try:
            self._put(model)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _parameters(model).items():
                    parameter.copy_(self._trained[name])
            self._trained = {}

    def save(self, directory: str) -> None:
        """Write both, while the average is in use, so that a run can go on bit by bit."""
        if self._average:
            pairs = ((_TRAINED, self._trained), (_AVERAGE, self._average))
            tensors = {f"{kind}{name}": tensor.cpu() for kind, found in pairs for name, tensor in found.items()}
            save_file(tensors, Path(directory, FILE))

    @torch.no_grad()
    def load(self, model: Any, checkpoint: str | None) -> None:
        """Go on from a checkpoint: with one that has no average, this begins with its weights.

        Raises:
            ValueError: It has an average, and none is kept; or of other parameters.
        """
        path = Path(checkpoint or "", FILE)
        if checkpoint is None or not path.is_file():
            return
        if self.decay is None:
            raise ValueError(
                f"The weights in {checkpoint} are an average, kept with `ema_decay`. Set it as in that run, to go on; "
                "or begin a run with the model that is there."
            )
        tensors, parameters = load_file(path), _parameters(model)
        if tensors.keys() != {f"{kind}{name}" for name in parameters for kind in (_TRAINED, _AVERAGE)}:
            raise ValueError(f"{path} is an average of other parameters than those trained now: {sorted(parameters)}.")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"{_TRAINED}{name}"])
        self._average = {name: tensors[f"{_AVERAGE}{name}"].to(p.device) for name, p in parameters.items()}


class AveragingTrainer(Trainer):
    """The HF Trainer, whose evaluations and checkpoints are of the average of its weights, where one is kept. A
    checkpoint has both, so that a run goes on bit by bit."""

    average: WeightAverage

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer. A run that is broken off leaves the weights of its last step, and no average."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.average.forget()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer; within a run, of the average."""
        with self.average.in_use(self.accelerator.unwrap_model(self.model)):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.average.in_use(self.accelerator.unwrap_model(self.model)):
            super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.average.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.average.load(self.accelerator.unwrap_model(self.model), checkpoint)


def _at_least_fp32(parameter: torch.Tensor) -> torch.Tensor:
    """Without gradient, as an average needs it: the small share of a step would be rounded away in bfloat16."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def _parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What is trained, by the names that it has without DistributedDataParallel."""
    module: torch.nn.Module = getattr(model, "module", model)
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


__all__ = ["AveragingTrainer", "WeightAverage"]
