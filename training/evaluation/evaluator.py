"""What every evaluation is: data and settings, to be called with a model and its processor."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor

from .dual_encoder import DualEncoder


@dataclass
class Evaluation:
    """One evaluation of one model.

    Attributes:
        results: Figures, and what they are figures of: what a results file holds.
        manifest: The images and texts that were really used.
    """

    results: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(kw_only=True)
class Evaluator(ABC):
    """An evaluation: its data and settings.

    Calling it with a model and its processor gives flat metrics, whose names say the direction (`text_to_image_R@1`);
    [`run`] gives all that is worth storing. A new one is a file with a subclass, and its name in
    `training.evaluation.EVALUATORS`, which makes it a task of `training.evaluate`.

    Args:
        batch_size: Images or texts at a time.
        dual_encoder: A baseline to be measured beside the model.
        scores: File from which an interrupted run goes on, where an evaluation keeps one.

    Class attributes:
        name: The task of `training.evaluate`.
        sections: The parts of `results` with figures, and what their metrics' names begin with.
        protocols: The ways to lay out the data, by name; the first is the default.

    Example:

        from training.evaluation import CaptioningEvaluator

        metrics = CaptioningEvaluator(data="pairs.tsv", tasks=["retrieval"])(model, processor)
        metrics["text_to_image_R@1"]
    """

    name: ClassVar[str]
    sections: ClassVar[Mapping[str, str]]
    protocols: ClassVar[Mapping[str, Any]] = {}

    batch_size: int = 32
    dual_encoder: DualEncoder | None = None
    scores: Path | None = None

    @property
    @abstractmethod
    def primary_metric(self) -> str:
        """The name of the one metric to compare models by."""

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher primary metric is a better one."""
        return True

    @property
    @abstractmethod
    def data_files(self) -> list[Path]:
        """The files of the data, whose digests are stored with the results."""

    @classmethod
    @abstractmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the command's options, one for each argument of this evaluation."""

    @abstractmethod
    def run(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> Evaluation:
        """Evaluate a model.

        Raises:
            ValueError: The data cannot be used.
        """

    def __call__(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> dict[str, float]:
        """The metrics of a model, by name; those of the baseline have `dual_encoder` in theirs."""
        return self.metrics(self.run(model, processor).results)

    def metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """The figures of `results`, by names that say of what they are."""
        return {name: value for part in self.sections for name, value in self._named(results.get(part), part)}

    def _named(self, value: Any, part: str) -> Iterator[tuple[str, float]]:
        for path, figure in _figures(value):
            words = [self.sections[part], *(word for word in path if word != "ours")]
            yield "_".join(word.replace(" + ", "_").replace(" ", "_") for word in words if word), figure


def _figures(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _figures(part, *path, key)
    elif isinstance(value, (int, float)):
        yield path, value
