"""The paper's evaluations and one of documents, each an [`Evaluator`]."""

from .captioning import CaptioningEvaluator
from .documents import DocumentsEvaluator
from .visdial import VisdialEvaluator
from .vist import VistEvaluator

EVALUATORS = (
    VistEvaluator,
    VisdialEvaluator,
    CaptioningEvaluator,
    DocumentsEvaluator,
)  # the tasks of training.evaluate

__all__ = ["EVALUATORS", "CaptioningEvaluator", "DocumentsEvaluator", "VisdialEvaluator", "VistEvaluator"]
