"""What FromageTrainer and training files take beside transformers' `TrainingArguments`."""

from dataclasses import dataclass, field

import torch

from .warm_start import RetrievalWarmStart


@dataclass(kw_only=True)
class TrainerOptions(RetrievalWarmStart):
    """Options of [`FromageTrainer`], which are keys of a training file too."""

    learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Other rates than learning_rate by the name of a part: visual_projection, ..."}
    )


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
