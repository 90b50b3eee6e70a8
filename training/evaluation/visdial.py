"""Visual Dialog 1.0: ranking of the 100 candidate answers, and retrieval between images and dialogues.

Section 4.2 of the paper. [`training.evaluation.dialogues.PROTOCOLS`] follow the authors' scripts, or correct their
quirks.
"""

import argparse
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.io.command_line import at_least

from ..publishing.provenance import digest_of
from .answers import context, rank_answers
from .dialogues import (
    PAPER,
    PROTOCOLS,
    ROUNDS,
    Dialogue,
    Dialogues,
    Turn,
    VisdialProtocol,
    encode_dialogue_images,
    read_dialogues,
)
from .dual_encoder import DualEncoder
from .evaluator import Evaluation, Evaluator
from .images import EncodedImages
from .metrics import retrieval_metrics
from .prompts import embed_prompts, has_special_token, image_embeds, is_too_long
from .score_cache import ScoreCache

TASKS = ("answers", "retrieval")
DIRECTIONS = ("dialogue_to_image", "image_to_dialogue")


def dialogue_text(turns: Sequence[Turn]) -> str:
    return " ".join(f"Q: {turn.question}? A: {turn.answer}." for turn in turns)


def retrieve(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    dialogues: list[Dialogue],
    images: EncodedImages,
    rounds: Sequence[int],
    dual_encoder: DualEncoder | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Recall in both directions between images and the first rounds of their dialogues, by the number of rounds.

    Dialogues with fewer rounds are left out. The authors' script reports image to dialogue as text to image.
    """
    embeds = image_embeds(model, images.features)
    results = {}
    for count in rounds:
        long = [dialogue for dialogue in dialogues if len(dialogue.turns) >= count]
        if not long:
            continue
        # Only the images of these dialogues.
        numbers, rows = torch.tensor([images.rows[dialogue.image] for dialogue in long]).unique(return_inverse=True)
        texts = [dialogue_text(dialogue.turns[:count]) for dialogue in long]
        prompts = [processor.retrieval_text(text) for text in texts]
        pairs = {"ours": (embeds[numbers], embed_prompts(model, processor, prompts, batch_size=batch_size))}
        if dual_encoder is not None:
            pairs["dual encoder"] = (images.dual_embeds[numbers], dual_encoder.text_embeds(texts))
        results[str(count)] = retrieval_metrics(pairs, rows, DIRECTIONS)
    return results


def leave_out(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    read: Dialogues,
    images: EncodedImages,
    protocol: VisdialProtocol,
) -> None:
    """Replace unusable dialogues by `None`, and count the reasons."""
    for number, dialogue in enumerate(read.dialogues):
        if dialogue is None:
            continue
        options = [text for turn in dialogue.turns for text in turn.options or []]
        if dialogue.image not in images:
            problem = "dialogue whose image is not usable"
        elif has_special_token(
            processor, [*options, *(text for turn in dialogue.turns for text in (turn.question, turn.answer))]
        ):
            problem = "dialogue with a special token in a text"
        elif is_too_long(
            model,
            processor,
            context(processor, dialogue.turns, protocol),
            processor.retrieval_text(f" {max([dialogue.turns[-1].answer, *options], key=len)}."),
        ):
            problem = "dialogue longer than the language model's context"
        else:
            continue
        read.dialogues[number] = None
        read.left_out[problem] += 1


@dataclass(kw_only=True)
class VisdialEvaluator(Evaluator):
    """Ranking of candidate answers, and retrieval between images and dialogues.

    Args:
        data: `visdial_1.0_val.json`.
        images: Folder of the images.
        dense: `visdial_1.0_val_dense_annotations.json`, for NDCG.
        protocol: One of [`PROTOCOLS`].
        tasks: Some of [`TASKS`].
        rounds: Retrieve from the first N rounds, for each N.
        sample: Number of random dialogues to use (always the same ones), for quick trials.
    """

    name: ClassVar[str] = "visdial"
    sections: ClassVar[Mapping[str, str]] = {"answers": "dialogue_to_answer", "retrieval": "rounds"}
    protocols: ClassVar[Mapping[str, Any]] = PROTOCOLS

    data: Path
    images: Path
    dense: Path | None = None
    protocol: VisdialProtocol = PAPER
    tasks: Sequence[str] = TASKS
    rounds: Sequence[int] = tuple(range(1, ROUNDS + 1))
    sample: int | None = None

    @property
    def primary_metric(self) -> str:
        if "answers" in self.tasks:
            return f"dialogue_to_answer_{'MRR' if self.dense is None else 'NDCG'}"
        return f"rounds_{self.rounds[-1]}_image_to_dialogue_R@1"

    @property
    def data_files(self) -> list[Path]:
        return [self.data] if self.dense is None else [self.data, self.dense]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, required=True, help="visdial_1.0_val.json")
        parser.add_argument("--dense", type=Path, help="visdial_1.0_val_dense_annotations.json, for NDCG")
        parser.add_argument("--images", type=Path, required=True, help="folder VisualDialog_val2018")
        parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
        parser.add_argument("--rounds", type=int, nargs="+", default=list(range(1, ROUNDS + 1)), metavar="N",
                            help="retrieval from the first N rounds, for each N; by default 1 to 10")  # fmt: skip
        parser.add_argument(
            "--sample", type=at_least(1), metavar="N", help="use N random dialogues, always the same, for quick trials"
        )

    def run(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> Evaluation:
        options: dict[str, Any] = {"batch_size": self.batch_size, "dual_encoder": self.dual_encoder}
        read = read_dialogues(self.data, self.dense)
        total = len(read.dialogues)
        if self.sample is not None:
            kept = set(random.Random(0).sample(range(total), min(self.sample, total)))  # noqa: S311 (no secret)
            read.dialogues = [dialogue if i in kept else None for i, dialogue in enumerate(read.dialogues)]
        images = encode_dialogue_images(model, processor, read, self.images, self.protocol, **options)
        leave_out(model, processor, read, images, self.protocol)
        used = [dialogue for dialogue in read.dialogues if dialogue is not None]
        if not used:
            raise ValueError(f"No dialogue can be used: {dict(read.left_out)}; images: {images.report()}.")
        results: dict[str, Any] = {}
        if "retrieval" in self.tasks:
            results["retrieval"] = retrieve(model, processor, used, images, self.rounds, **options)
        if "answers" in self.tasks:
            cache = ScoreCache(self.scores, self._depends_on(model, images))
            results["answers"], uncounted = rank_answers(
                model, processor, read.dialogues, images, self.protocol, self.dual_encoder, cache
            )
            read.left_out += uncounted
        results |= {
            "denominator": {
                "rule": "answers: rounds with candidates, of dialogues whose image is usable; NDCG: those with a dense "
                "annotation; retrieval: those dialogues and images",
                "dialogues": len(used),
                "images": len(images.ids),
            },
            "images": images.report(),
            "dialogues": {"read": total, "sampled": self.sample, "left_out": dict(+read.left_out)},
        }
        manifest = {
            "dialogues": [dialogue.image for dialogue in used],
            "images": images.ids,
            "not_usable": images.skipped,
        }
        return Evaluation(results, manifest)

    def _depends_on(self, model: FromageForConditionalGeneration, images: EncodedImages) -> dict[str, Any]:
        """Everything that the answers' scores depend on."""
        return {
            "data": digest_of(self.data),
            "model": model.retrieval_fingerprint(),
            "dtype": str(model.language_model.dtype),
            "protocol": self.protocol.name,
            "sample": self.sample,
            "images": hashlib.sha256("\n".join(images.ids).encode()).hexdigest(),
            "dual_encoder": None if self.dual_encoder is None else self.dual_encoder.model.name_or_path,
        }
