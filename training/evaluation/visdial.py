"""Visual Dialog 1.0: ranking of the 100 candidate answers, and retrieval between images and whole dialogues.

Section 4.2 of the paper, by the authors' scripts with their quirks or without them: see
[`training.evaluation.dialogues.PROTOCOLS`].
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..publishing.provenance import digest_of
from .answers import context, rank_answers
from .dialogues import (
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
from .images import EncodedImages
from .metrics import retrieval_metrics
from .prompts import embed_prompts, has_special_token, image_embeds, is_too_long
from .score_cache import ScoreCache

TASKS = ("answers", "retrieval")
DIRECTIONS = ("dialogue_to_image", "image_to_dialogue")


def dialogue_text(turns: Sequence[Turn]) -> str:
    return " ".join(f"Q: {turn.question}? A: {turn.answer}." for turn in turns)


def retrieve(
    model: Any,
    processor: Any,
    dialogues: list[Dialogue],
    images: EncodedImages,
    rounds: Sequence[int],
    dual_encoder: DualEncoder | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Recall, in both directions, between images and their dialogues' first rounds; by how many rounds, of those
    dialogues that have so many.

    The authors' script prints image to dialogue, and calls it text to image.
    """
    embeds = image_embeds(model, images.features)
    results = {}
    for count in rounds:
        long = [dialogue for dialogue in dialogues if len(dialogue.turns) >= count]
        if not long:
            continue
        # Of the images, those that such a dialogue is about.
        numbers, rows = torch.tensor([images.rows[dialogue.image] for dialogue in long]).unique(return_inverse=True)
        texts = [dialogue_text(dialogue.turns[:count]) for dialogue in long]
        prompts = [processor.retrieval_text(text) for text in texts]
        pairs = {"ours": (embeds[numbers], embed_prompts(model, processor, prompts, batch_size=batch_size))}
        if dual_encoder is not None:
            pairs["dual encoder"] = (images.dual_embeds[numbers], dual_encoder.text_embeds(texts))
        results[str(count)] = retrieval_metrics(pairs, rows, DIRECTIONS)
    return results


def leave_out(model: Any, processor: Any, read: Dialogues, images: EncodedImages, protocol: VisdialProtocol):
    """Set dialogues that cannot be used to `None`, and count why."""
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
            f"{processor.bos_text} {max([dialogue.turns[-1].answer, *options], key=len)}.{processor.ret_token}",
        ):
            problem = "dialogue longer than the language model's context"
        else:
            continue
        read.dialogues[number] = None
        read.left_out[problem] += 1


def evaluate(
    model: Any,
    processor: Any,
    data: Path,
    folder: Path,
    dense: Path | None = None,
    protocol: str = "paper",
    tasks: Sequence[str] = TASKS,
    rounds: Sequence[int] = tuple(range(1, ROUNDS + 1)),
    sample: int | None = None,
    batch_size: int = 32,
    dual_encoder: DualEncoder | None = None,
    scores: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both tasks; results, and the manifest of what was really used.

    Args:
        protocol: A key of [`PROTOCOLS`].
        sample: Take so many dialogues at random (always the same), to try things out.
        scores: File of the answers' scores, from which a run that broke off goes on.
    """
    rules, read = PROTOCOLS[protocol], read_dialogues(data, dense)
    total = len(read.dialogues)
    if sample is not None:
        kept = set(random.Random(0).sample(range(total), min(sample, total)))  # noqa: S311 (no secret)
        read.dialogues = [dialogue if i in kept else None for i, dialogue in enumerate(read.dialogues)]
    images = encode_dialogue_images(
        model, processor, read, folder, rules, batch_size=batch_size, dual_encoder=dual_encoder
    )
    leave_out(model, processor, read, images, rules)
    used = [dialogue for dialogue in read.dialogues if dialogue is not None]
    if not used:
        raise ValueError(f"No dialogue can be used: {dict(read.left_out)}; images: {images.report()}.")
    results: dict[str, Any] = {}
    if "retrieval" in tasks:
        results["retrieval"] = retrieve(model, processor, used, images, rounds, dual_encoder, batch_size)
    if "answers" in tasks:
        facts = {
            "data": digest_of(data),
            "model": model.retrieval_fingerprint(),
            "dtype": str(model.language_model.dtype),
            "protocol": protocol,
            "sample": sample,
            "images": hashlib.sha256("\n".join(images.ids).encode()).hexdigest(),
            "dual_encoder": None if dual_encoder is None else dual_encoder.model.name_or_path,
        }
        results["answers"], uncounted = rank_answers(
            model, processor, read.dialogues, images, rules, dual_encoder, ScoreCache(scores, facts)
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
        "dialogues": {"read": total, "sampled": sample, "left_out": dict(+read.left_out)},
    }
    manifest = {
        "dialogues": [dialogue.image for dialogue in used],
        "images": images.ids,
        "not_usable": images.skipped,
    }
    return results, manifest
