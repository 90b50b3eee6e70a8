"""The losses in the log."""

from typing import Any

import torch


class LossParts:
    """Sums of the three losses since the last log, weighted as the Trainer weights the loss that it logs: each batch by
    one over the number that its optimiser step accumulates, averaged over processes."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0.0

    def add(self, parts: dict[str, torch.Tensor], weight: float) -> None:
        self.steps += weight
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + weight * value

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes, which must call this together."""
        if not self.sums:
            return {}
        means = accelerator.reduce(torch.stack(list(self.sums.values())) / self.steps, "mean")
        return dict(zip(self.sums, means.tolist(), strict=True))


__all__ = ["LossParts"]
