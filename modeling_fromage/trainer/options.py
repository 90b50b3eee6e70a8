"""What FromageTrainer and training files take beside transformers' `TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from .warm_start import RetrievalWarmStart


@dataclass(kw_only=True)
class TrainerOptions(RetrievalWarmStart):
    """Options of [`FromageTrainer`], which are keys of a training file too."""

    learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Other rates than learning_rate by the name of a part: visual_projection, ..."}
    )
    shard_backbones: bool = field(
        default=False,
        metadata={"help": "Spread the layers of the frozen backbones over all processes, each of which holds a share."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Average what is trained over steps by this decay (0.999, ...): what is evaluated and saved."
        },
    )
    eval_samples: int = field(
        default=8,
        metadata={
            "help": "Held-out images whose captions and retrievals each evaluation draws into samples/; 0: none."
        },
    )
    on_bad_example: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "skip: another example is trained on for a bad one, which is listed."}
    )
    max_bad_share: float = field(
        default=0.05, metadata={"help": "Of the examples; the run stops where more are bad than that."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_bad_example not in ("raise", "skip"):
            raise ValueError(f"`on_bad_example` must be raise or skip, got {self.on_bad_example!r}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1 (0.999, ...), got {self.ema_decay}.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"`max_bad_share` must be in [0, 1], got {self.max_bad_share}.")


def set_learning_rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module, rates: dict[str, float]) -> None:
    """Move the parameters of parts with a rate of their own into groups of their own.

    Raises:
        ValueError: No trained parameter is of a part of that name.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, rate in rates.items():
        own = {id(parameter) for name, parameter in trained.items() if part in name.split(".")}
        if not own:
            parts = sorted({name.split(".")[1] for name in trained if name.startswith("adapter.")})
            raise ValueError(f"`learning_rates` names {part!r}, and nothing of that name is trained: {parts} are.")
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in own]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": moved, "lr": float(rate)})


__all__ = ["TrainerOptions", "set_learning_rates"]
