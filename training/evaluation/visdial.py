"""Visual Dialog 1.0: ranking of the 100 candidate answers, and retrieval between images and whole dialogues.

Section 4.2 of the paper. `protocol="paper"` is the authors' scripts: an answer's tokens, its own BOS among them, are
scored with the logits of their own places, behind "A: " with its blank; the round of a dense annotation counts from 0;
images are squashed to 224 x 224. `"corrected"` predicts an answer's tokens, without a BOS of their own, each from the
one before, takes rounds from 1, as the challenge does, and the processor's own preprocessing.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_fromage.ranking_fromage import gallery_ranks
from training.evaluation.dual_encoder import DualEncoder
from training.evaluation.files import find_images, read_json
from training.evaluation.images import EncodedImages, encode_images
from training.evaluation.metrics import ndcg, rank_metrics, target_ranks
from training.evaluation.partial import PartialScores
from training.evaluation.prompts import (
    embed_prompts,
    has_special_token,
    image_embeds,
    image_text,
    is_too_long,
    tokenize,
)
from training.provenance import digest_of

ROUNDS = 10
TASKS = ("answers", "retrieval")
DIRECTIONS = ("image_to_dialogue", "dialogue_to_image")


@dataclass
class Turn:
    """A question with its answer and, where the file has them, the candidates and which of them is the answer."""

    question: str
    answer: str
    options: list[str] | None = None
    target: int | None = None


@dataclass
class Dialogue:
    image: str
    turns: list[Turn]
    relevance: tuple[int, list[float]] | None = None  # the round as the file counts it, and each candidate's relevance


@dataclass
class Dialogues:
    """In the order of the file, broken ones as `None`; and what is left out, counted."""

    dialogues: list[Dialogue | None] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def read_dialogues(path: Path, dense_path: Path | None = None) -> Dialogues:
    """Read `visdial_1.0_{train,val,test}.json`, and its dense annotations, which may be in any order.

    Raises:
        ValueError: A file is not of that format, or has no dialogue.
    """
    content, found = read_json(path), Dialogues()
    dense: dict[str, list[tuple[int, list[float]]]] = {}
    try:
        data = content["data"]
        questions, answers, dialogs = (list(data[name]) for name in ("questions", "answers", "dialogs"))
        for entry in read_json(dense_path) if dense_path else []:
            relevance = [float(value) for value in entry["gt_relevance"]]
            dense.setdefault(str(entry["image_id"]), []).append((int(entry["round_id"]), relevance))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}{f' or {dense_path}' if dense_path else ''} is not of VisDial's format: {type(error).__name__}: "
            f"{error}."
        ) from error
    for dialog in dialogs:
        try:
            turns = [_read_turn(turn, questions, answers) for turn in dialog["dialog"]]
            dialogue = Dialogue(str(dialog["image_id"]), turns)
            if not turns:
                raise IndexError("no round")
        except (KeyError, TypeError, IndexError) as error:
            found.dialogues.append(None)
            found.left_out[f"dialogue with a broken entry ({type(error).__name__})"] += 1
            continue
        annotations = dense.pop(dialogue.image, [])
        if annotations:
            dialogue.relevance = annotations[0]
            found.left_out["further dense annotation of an image"] += len(annotations) - 1
        found.dialogues.append(dialogue)
    found.left_out["dense annotation of no dialogue"] += sum(map(len, dense.values()))
    found.left_out = +found.left_out
    if not any(found.dialogues):
        raise ValueError(f"{path} has no dialogue that can be used: {dict(found.left_out)}.")
    return found


def _read_turn(turn: dict[str, Any], questions: list[str], answers: list[str]) -> Turn:
    def entry(texts: list[str], number: int) -> str:
        if number < 0:
            raise IndexError(number)
        return str(texts[number])

    options = turn.get("answer_options")
    answer = entry(answers, turn["answer"]) if "answer" in turn else ""  # the last round of the test set has none
    if options is not None:
        options = [entry(answers, number) for number in options]
    target = turn.get("gt_index")
    if options is not None and target is not None:
        entry(options, target)
    return Turn(entry(questions, turn["question"]), answer, options, target)


def encode_dialogue_images(
    model: Any, processor: Any, dialogues: Dialogues, folder: Path, protocol: str, **kwargs: Any
) -> EncodedImages:
    """The dialogues' images, from files of `folder` whose names end in their ids, such as
    `VisualDialog_val2018_000000254080.jpg`."""
    files = {}
    for stem, path in find_images(folder).items():
        number = stem.rpartition("_")[2]
        files[number.lstrip("0") or "0"] = path
    ids = dict.fromkeys(dialogue.image for dialogue in dialogues.dialogues if dialogue is not None)
    return encode_images(model, processor, {i: files.get(i) for i in ids}, protocol == "paper", **kwargs)


# ---- answers ----


def context(processor: Any, turns: Sequence[Turn], protocol: str) -> str:
    """An image, the rounds before the last of `turns`, and its question."""
    texts = [f"Q: {turn.question}?\nA: {turn.answer}\n" for turn in turns[:-1]]
    end = "A: " if protocol == "paper" else "A:"
    return image_text(processor) + processor.bos_text + "".join(texts) + f"Q: {turns[-1].question}?\n{end}"


@torch.no_grad()
def score_answers(
    model: Any, processor: Any, dialogue: Dialogue, rounds: list[int], features: torch.Tensor, protocol: str
) -> list[torch.Tensor]:
    """The log-likelihood (options,) of each candidate answer in some rounds of a dialogue, by an image (vision width,).

    A round's dialogue is encoded once for all its candidates. A candidate without a token ranks last.
    """
    contexts = [context(processor, dialogue.turns[: i + 1], protocol) for i in rounds]
    start = processor.bos_text if protocol == "paper" else " "
    counts = [len(dialogue.turns[i].options) for i in rounds]
    padded = []
    for i, count in zip(rounds, counts, strict=True):
        texts = [start + text if text or protocol == "paper" else "" for text in dialogue.turns[i].options]
        padded += texts + [start] * (max(counts) - count)
    ids, mask = (tensor.unflatten(0, (len(rounds), -1)) for tensor in tokenize(processor, padded, model.device))
    empty = ~mask.any(-1)
    if bool(empty.all()):
        return [torch.full((count,), -torch.inf) for count in counts]
    mask[..., -1] = 1  # candidates need a token; what the empty ones score is thrown away
    context_ids, context_mask = tokenize(processor, contexts, model.device)
    scores = model.score_candidates(
        context_ids,
        context_mask,
        ids,
        mask,
        pooled_image_features=features.expand(len(rounds), -1).to(model.device),
        shift=protocol == "corrected",
    )
    scores = scores.masked_fill(empty, -torch.inf).cpu()
    return [row[:count] for row, count in zip(scores, counts, strict=True)]


def answered_rounds(dialogue: Dialogue) -> list[int]:
    """The rounds that have candidates and say which of them is right."""
    return [i for i, turn in enumerate(dialogue.turns) if turn.options and turn.target is not None]


def dense_rows(dialogues: Sequence[Dialogue | None], protocol: str) -> list[tuple[tuple[int, int], list[float]]]:
    """Dialogue and round (from 0) of every dense annotation, and the relevance of the candidates.

    The authors' script adds the file's round, from 1, to ten times the dialogue's number, so that it takes each
    annotation for the round behind it, and round 10 for the next dialogue's first.
    """
    rows = []
    for number, dialogue in enumerate(dialogues):
        if dialogue is not None and dialogue.relevance is not None:
            round_id, relevance = dialogue.relevance
            place = divmod(number * ROUNDS + round_id, ROUNDS) if protocol == "paper" else (number, round_id - 1)
            rows.append((place, relevance))
    return rows


def answer_metrics(
    scores: dict[tuple[int, int], torch.Tensor], dialogues: Sequence[Dialogue | None], protocol: str
) -> tuple[dict[str, Any], Counter]:
    """NDCG, MRR, recall and mean rank of all rounds, and of each; and what could not be counted."""
    left_out: Counter = Counter()
    ranks: list[list[int]] = [[] for _ in range(ROUNDS)]
    for (number, i), row in scores.items():
        target = torch.tensor([dialogues[number].turns[i].target])
        ranks[min(i, ROUNDS - 1)].append(target_ranks(row[None], target).item())
    gains = []
    for place, relevance in dense_rows(dialogues, protocol):
        row = scores.get(place)
        if row is None:
            left_out["dense annotation of a round without scores"] += 1
        elif len(row) != len(relevance):
            left_out["dense annotation of another number of candidates"] += 1
        elif not any(relevance):
            left_out["dense annotation without a relevant candidate"] += 1
        else:
            gains.append(ndcg(row[None], torch.tensor([relevance])).item())
    metrics = rank_metrics(torch.tensor(sum(ranks, [])))
    if gains:
        metrics |= {"NDCG": sum(gains) / len(gains), "NDCG_N": len(gains)}
    metrics["MRR_by_round"] = [rank_metrics(torch.tensor(some)).get("MRR") for some in ranks]
    return metrics, left_out


def rank_answers(
    model: Any,
    processor: Any,
    dialogues: Sequence[Dialogue | None],
    images: EncodedImages,
    protocol: str,
    dual_encoder: DualEncoder | None = None,
    partial: PartialScores | None = None,
) -> tuple[dict[str, Any], Counter]:
    """[`answer_metrics`] of all dialogues with an image, of the model and of the baseline; and what is left out.

    Scores are kept in `partial` after each dialogue; those that it has are not computed again.
    """
    scores: dict[str, dict[tuple[int, int], torch.Tensor]] = {"ours": {}, "dual encoder": {}}
    left_out: Counter = Counter()
    empty = 0
    partial = partial or PartialScores(None, {})
    for number, dialogue in enumerate(tqdm(dialogues, desc="Ranking answers")):
        if dialogue is None or dialogue.image not in images:
            continue
        rounds = answered_rounds(dialogue)
        left_out["round without candidates or answer"] += len(dialogue.turns) - len(rounds)
        empty += sum(not text.strip() for i in rounds for text in dialogue.turns[i].options)
        if not rounds:
            continue
        if number not in partial.found:
            row = images.rows[dialogue.image]
            found = {"ours": score_answers(model, processor, dialogue, rounds, images.features[row], protocol)}
            if dual_encoder is not None:
                found["dual encoder"] = score_answers_dual(dual_encoder, dialogue, rounds, images.dual_embeds[row])
            partial.add(number, {who: [row.tolist() for row in rows] for who, rows in found.items()})
        for who, rows in partial.found[number].items():
            scores[who].update({(number, i): torch.tensor(row) for i, row in zip(rounds, rows, strict=True)})
    results: dict[str, Any] = {}
    for who in ("ours", "dual encoder"):
        if scores[who]:
            results[who], uncounted = answer_metrics(scores[who], dialogues, protocol)
    if not results:
        raise ValueError(f"No round has candidates and an answer: {dict(+left_out)}.")
    return {**results, "empty_candidates": empty}, +(left_out + uncounted)


def score_answers_dual(
    dual_encoder: DualEncoder, dialogue: Dialogue, rounds: list[int], image: torch.Tensor
) -> list[torch.Tensor]:
    """The baseline's cosine (options,) of an image (d,) and each candidate behind its question; without the rounds
    before, which its text half has no room for."""
    rows = []
    for i in rounds:
        turn = dialogue.turns[i]
        texts = [f"Q: {turn.question}? A: {text}" for text in turn.options]
        rows.append(dual_encoder.text_embeds(texts, show_progress=False) @ image)
    return rows


# ---- retrieval ----


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
        labels = torch.tensor([images.rows[dialogue.image] for dialogue in long])
        texts = [dialogue_text(dialogue.turns[:count]) for dialogue in long]
        prompts = [processor.bos_text + text + processor.ret_token for text in texts]
        pairs = {"ours": (embeds, embed_prompts(model, processor, prompts, batch_size=batch_size))}
        if dual_encoder is not None:
            pairs["dual encoder"] = (images.dual_embeds, dual_encoder.text_embeds(texts))
        results[str(count)] = {
            direction: {who: rank_metrics(_ranks(direction, *pair, labels)) for who, pair in pairs.items()}
            for direction in DIRECTIONS
        }
    return results


def _ranks(direction: str, image_rows: torch.Tensor, text_rows: torch.Tensor, labels: torch.LongTensor):
    numbers = labels.unique()  # of images with a dialogue
    image_rows = image_rows[numbers]
    if direction == "image_to_dialogue":
        return gallery_ranks(image_rows, text_rows, numbers, labels)
    return gallery_ranks(text_rows, image_rows, labels, numbers)


def leave_out(model: Any, processor: Any, read: Dialogues, images: EncodedImages, protocol: str):
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
        sample: Take so many dialogues at random (always the same), to try things out.
        scores: File of the answers' scores, from which a run that broke off goes on.
    """
    read = read_dialogues(data, dense)
    total = len(read.dialogues)
    if sample is not None:
        kept = set(random.Random(0).sample(range(total), min(sample, total)))  # noqa: S311 (no secret)
        read.dialogues = [dialogue if i in kept else None for i, dialogue in enumerate(read.dialogues)]
    images = encode_dialogue_images(
        model, processor, read, folder, protocol, batch_size=batch_size, dual_encoder=dual_encoder
    )
    leave_out(model, processor, read, images, protocol)
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
            model, processor, read.dialogues, images, protocol, dual_encoder, PartialScores(scores, facts)
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
