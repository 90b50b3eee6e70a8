"""Reads Visual Dialog: dialogues about images, candidate answers, and dense annotations."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor

from .files import find_images, read_json
from .images import EncodedImages, encode_images

ROUNDS = 10


@dataclass(frozen=True)
class VisdialProtocol:
    """How dialogues and answers become tokens and scores, and images become pixels.

    Attributes:
        name: Value of `--protocol`, and its name in results files.
        answer_cue: Text between the last question and its candidates.
        bos_before_answers: Start every candidate with BOS, which is scored. Otherwise it starts with a space.
        allow_empty_answers: Score an empty candidate by its BOS. Otherwise it ranks last.
        shift: Score a token with the logits of the position before it. Otherwise with those of its own position.
        dense_rounds_from_0: Read the rounds of dense annotations as if they counted from 0, so that the last one
            becomes the first of the next dialogue. In the challenge's file they count from 1.
        squash_images: Resize images to 224 x 224 first, without keeping the aspect ratio.
    """

    name: str
    answer_cue: str
    bos_before_answers: bool
    allow_empty_answers: bool
    shift: bool
    dense_rounds_from_0: bool
    squash_images: bool


PAPER = VisdialProtocol(
    name="paper",
    answer_cue="A: ",
    bos_before_answers=True,
    allow_empty_answers=True,
    shift=False,
    dense_rounds_from_0=True,
    squash_images=True,
)
CORRECTED = VisdialProtocol(
    name="corrected",
    answer_cue="A:",
    bos_before_answers=False,
    allow_empty_answers=False,
    shift=True,
    dense_rounds_from_0=False,
    squash_images=False,
)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, CORRECTED)}


@dataclass
class Turn:
    """A question, its answer and, if the file has them, the candidate answers and the index of the correct one."""

    question: str
    answer: str
    options: list[str] | None = None
    target: int | None = None


@dataclass
class Dialogue:
    image: str
    turns: list[Turn]
    relevance: tuple[int, list[float]] | None = None  # the file's round, and each candidate's relevance


@dataclass
class Dialogues:
    """Dialogues in file order, `None` for broken ones, and counts of skipped entries by reason."""

    dialogues: list[Dialogue | None] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def read_dialogues(path: Path, dense_path: Path | None = None) -> Dialogues:
    """Read `visdial_1.0_{train,val,test}.json` and its dense annotations, which may be in any order.

    Raises:
        ValueError: A file does not have that format, or contains no dialogue.
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
    answer = entry(answers, turn["answer"]) if "answer" in turn else ""  # missing in the last round of the test set
    if options is not None:
        options = [entry(answers, number) for number in options]
    target = turn.get("gt_index")
    if options is not None and target is not None:
        entry(options, target)
    return Turn(entry(questions, turn["question"]), answer, options, target)


def encode_dialogue_images(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    dialogues: Dialogues,
    folder: Path,
    protocol: VisdialProtocol,
    **kwargs: Any,
) -> EncodedImages:
    """Encode the dialogues' images, found in `folder` by the ids at the end of their names.

    Such a name is `VisualDialog_val2018_000000254080.jpg`.
    """
    files = {}
    for stem, path in find_images(folder).items():
        number = stem.rpartition("_")[2]
        files[number.lstrip("0") or "0"] = path
    ids = dict.fromkeys(dialogue.image for dialogue in dialogues.dialogues if dialogue is not None)
    return encode_images(model, processor, {i: files.get(i) for i in ids}, protocol.squash_images, **kwargs)
