"""The paper's evaluations, each an [`Evaluator`]."""

from .captioning import CaptioningEvaluator
from .visdial import VisdialEvaluator
from .vist import VistEvaluator

EVALUATORS = (VistEvaluator, VisdialEvaluator, CaptioningEvaluator)  # the tasks of training.evaluate

__all__ = ["EVALUATORS", "CaptioningEvaluator", "VisdialEvaluator", "VistEvaluator"]
