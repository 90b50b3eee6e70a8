"""The base class of all evaluations: data and settings, called with a model and its processor."""

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
        results: The figures and what they were computed on, as stored in a results file.
        manifest: The images and texts that were actually used.
    """

    results: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(kw_only=True)
class Evaluator(ABC):
    """An evaluation: its data and settings.

    Calling it with a model and its processor returns flat metrics whose names state the direction
    (`text_to_image_R@1`); [`run`] returns everything worth storing. To add an evaluation, write a subclass and list it
    in `training.evaluation.EVALUATORS`: it becomes a task of `training.evaluate`.

    Args:
        batch_size: Images or texts per batch.
        dual_encoder: A baseline to measure beside the model.
        scores: File in which an evaluation may keep scores, so that an interrupted run can resume.

    Class attributes:
        name: The task of `training.evaluate`.
        sections: The parts of `results` that contain figures, with the prefix of their metrics' names.
        protocols: Variants of the data layout by name; the first is the default.

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
        """Whether a higher primary metric is better."""
        return True

    @property
    @abstractmethod
    def data_files(self) -> list[Path]:
        """The data files, whose digests are stored with the results."""

    @classmethod
    @abstractmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add a command-line option for each argument of this evaluation."""

    @abstractmethod
    def run(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> Evaluation:
        """Evaluate a model.

        Raises:
            ValueError: The data cannot be used.
        """

    def __call__(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> dict[str, float]:
        """Metrics of a model by name; names of the baseline's contain `dual_encoder`."""
        return self.metrics(self.run(model, processor).results)

    def metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """The figures of `results` as flat metrics."""
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
