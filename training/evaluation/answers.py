"""Ranks the candidate answers of Visual Dialog by their likelihood."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor

from .dialogues import ROUNDS, Dialogue, Turn, VisdialProtocol
from .dual_encoder import DualEncoder
from .images import EncodedImages
from .metrics import ndcg, rank_metrics, target_ranks
from .prompts import tokenize
from .score_cache import ScoreCache


def context(processor: FromageProcessor, turns: Sequence[Turn], protocol: VisdialProtocol) -> str:
    """The prompt of the last of `turns`: the image, the earlier rounds, and its question."""
    texts = [f"Q: {turn.question}?\nA: {turn.answer}\n" for turn in turns[:-1]]
    question = f"Q: {turns[-1].question}?\n{protocol.answer_cue}"
    return processor.add_bos(processor.image_placeholders + "".join(texts) + question)


@torch.no_grad()
def score_answers(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    dialogue: Dialogue,
    rounds: list[int],
    features: torch.Tensor,
    protocol: VisdialProtocol,
) -> list[torch.Tensor]:
    """Log-likelihoods (options,) of the candidate answers in each of `rounds`, given image features (vision_width,).

    The prompt of a round is encoded once for all its candidates. A candidate without tokens ranks last.
    """
    contexts = [context(processor, dialogue.turns[: i + 1], protocol) for i in rounds]
    start = processor.bos_text if protocol.bos_before_answers else " "
    counts = [len(dialogue.turns[i].options) for i in rounds]
    padded = []
    for i, count in zip(rounds, counts, strict=True):
        texts = [start + text if text or protocol.allow_empty_answers else "" for text in dialogue.turns[i].options]
        padded += texts + [start] * (max(counts) - count)
    ids, mask = (tensor.unflatten(0, (len(rounds), -1)) for tensor in tokenize(processor, padded, model.device))
    empty = ~mask.any(-1)
    if bool(empty.all()):
        return [torch.full((count,), -torch.inf) for count in counts]
    mask[..., -1] = 1  # every candidate needs a token; scores of empty ones are masked below
    context_ids, context_mask = tokenize(processor, contexts, model.device)
    scores = model.score_candidates(
        context_ids,
        context_mask,
        ids,
        mask,
        pooled_image_features=features.expand(len(rounds), -1).to(model.device),
        shift=protocol.shift,
    )
    scores = scores.masked_fill(empty, -torch.inf).cpu()
    return [row[:count] for row, count in zip(scores, counts, strict=True)]


def answered_rounds(dialogue: Dialogue) -> list[int]:
    """The rounds that have candidates and a correct answer."""
    return [i for i, turn in enumerate(dialogue.turns) if turn.options and turn.target is not None]


def dense_rows(
    dialogues: Sequence[Dialogue | None], protocol: VisdialProtocol
) -> list[tuple[tuple[int, int], list[float]]]:
    """The dialogue and round (from 0) of every dense annotation, with the relevance of its candidates.

    The authors' script adds the file's round, which counts from 1, to ten times the dialogue's number. It thus assigns
    each annotation to the following round, and round 10 to the first round of the next dialogue.
    """
    rows = []
    for number, dialogue in enumerate(dialogues):
        if dialogue is not None and dialogue.relevance is not None:
            round_id, relevance = dialogue.relevance
            place = (number, round_id - 1)
            if protocol.dense_rounds_from_0:
                place = divmod(number * ROUNDS + round_id, ROUNDS)
            rows.append((place, relevance))
    return rows


def answer_metrics(
    scores: dict[tuple[int, int], torch.Tensor], dialogues: Sequence[Dialogue | None], protocol: VisdialProtocol
) -> tuple[dict[str, Any], Counter]:
    """NDCG, MRR, recall and mean rank over all rounds, MRR by round, and counts of skipped annotations by reason."""
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
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    dialogues: Sequence[Dialogue | None],
    images: EncodedImages,
    protocol: VisdialProtocol,
    dual_encoder: DualEncoder | None = None,
    score_cache: ScoreCache | None = None,
) -> tuple[dict[str, Any], Counter]:
    """[`answer_metrics`] of the model and of the baseline on all dialogues with an image.

    Scores go into `score_cache` after each dialogue and are not computed again.
    """
    scores: dict[str, dict[tuple[int, int], torch.Tensor]] = {"ours": {}, "dual encoder": {}}
    left_out: Counter = Counter()
    empty = 0
    score_cache = score_cache or ScoreCache(None, {})
    for number, dialogue in enumerate(tqdm(dialogues, desc="Ranking answers")):
        if dialogue is None or dialogue.image not in images:
            continue
        rounds = answered_rounds(dialogue)
        left_out["round without candidates or answer"] += len(dialogue.turns) - len(rounds)
        empty += sum(not text.strip() for i in rounds for text in dialogue.turns[i].options)
        if not rounds:
            continue
        if number not in score_cache.found:
            row = images.rows[dialogue.image]
            found = {"ours": score_answers(model, processor, dialogue, rounds, images.features[row], protocol)}
            if dual_encoder is not None:
                found["dual encoder"] = score_answers_dual(dual_encoder, dialogue, rounds, images.dual_embeds[row])
            score_cache.add(number, {who: [row.tolist() for row in rows] for who, rows in found.items()})
        for who, rows in score_cache.found[number].items():
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
    """The baseline's cosine similarities (options,) of an image (d,) with each candidate after its question.

    Earlier rounds are left out: its text encoder has no room for them.
    """
    rows = []
    for i in rounds:
        turn = dialogue.turns[i]
        texts = [f"Q: {turn.question}? A: {text}" for text in turn.options]
        rows.append(dual_encoder.text_embeds(texts, show_progress=False) @ image)
    return rows
