"""Captions and retrievals of a few held-out images, as a picture after each evaluation."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..images_fromage import load_rgb_image
from ..late_interaction_fromage import similarities
from .data_collator import FromageDataCollator, retrieval_caption, takes_common_examples
from .evaluation import generate_captions
from .pictures import Cell, Word, draw_sheet, words_of

logger = logging.getLogger(__name__)

FOUND = 3  # images that are shown for a text
_SAME = 0.99  # a cosine: an embedding and the one of the same image in an evaluation differ in their last bits
_RIGHT = "palegreen"
_TITLES = ("image", "its caption, and the model's", "its text finds", "second", "third")
_WIDTHS = (160, 280, 160, 160, 160)


class EvaluationSamples(TrainerCallback):
    """Writes `samples/step-N.png` into `output_dir` after each evaluation: greedy captions of a few images of the data
    set, drawn by `seed` once, and the images of the whole data set that are nearest to their texts. TensorBoard, wandb
    and trackio get the picture too.

    Args:
        count (`int`): How many images; 0 for no picture.
        collator ([`FromageDataCollator`]): As in training. With any other, no picture is made.
        callbacks (`Sequence[TrainerCallback]`): The trainer's, those of TensorBoard and its like among them.
    """

    def __init__(self, count: int, collator: Any, callbacks: Sequence[TrainerCallback]):
        self.count, self.callbacks = count, callbacks
        self.collator: Any = copy.copy(collator) if takes_common_examples(collator) else None
        self.embeds: Mapping[str, Any] = {}  # of the evaluation that has ended: image_embeds and text_embeds, (N, q)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        embeds, self.embeds = self.embeds, {}
        dataset = kwargs["eval_dataloader"].dataset
        if not self.count or self.collator is None or isinstance(dataset, IterableDataset):
            return
        self.collator.training = False
        generator = torch.Generator().manual_seed(args.seed)
        numbers = torch.randperm(len(dataset), generator=generator)[: self.count].tolist()
        # In all processes: of a model that is sharded, none can run it alone.
        sheet = draw_samples(kwargs["model"], self.collator, dataset, numbers, embeds)
        if state.is_world_process_zero:
            (prefix,) = [name.removesuffix("_runtime") for name in kwargs["metrics"] if name.endswith("_runtime")]
            name = prefix.removeprefix("eval").strip("_")  # of several evaluation sets
            path = Path(args.output_dir or "", "samples", f"step-{state.global_step}{f'-{name}' if name else ''}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            report_picture(f"{prefix}/samples", sheet, state.global_step, self.callbacks)


@torch.no_grad()
def draw_samples(
    model: Any, collator: FromageDataCollator, dataset: Any, numbers: Sequence[int], embeds: Mapping[str, Any]
) -> Image.Image:
    """A row for each of the examples `numbers`: its image, its caption and the model's, and what its text finds.

    Args:
        embeds (`Mapping`): `image_embeds` and `text_embeds` (N, projection_dim) of the N examples of `dataset`; where
            there are none, or they stand in another order, nothing is searched for.
    """
    read = {i: example for i in numbers if (example := _read(dataset, i)) is not None}
    numbers, examples = list(read), list(read.values())
    if not examples:
        return draw_sheet(_TITLES, [], _WIDTHS)
    batch = {name: tensor.to(model.device) for name, tensor in collator(examples).items()}
    features = batch.get("pooled_image_features")
    if features is None:
        features = model.get_pooled_image_features(batch["pixel_values"])
    captions = generate_captions(model, collator.processor, features, min(collator.max_length or 32, 64))
    found: list[list[tuple[int, float]]] = [[] for _ in numbers]
    if _are_in_order(model.get_image_embeds(pooled_image_features=features), numbers, len(dataset), embeds):
        images, texts = (torch.as_tensor(embeds[name]).float() for name in ("image_embeds", "text_embeds"))
        scores, nearest = similarities(texts[numbers], images).topk(min(FOUND, len(images)))
        found = [list(zip(row, own, strict=True)) for row, own in zip(nearest.tolist(), scores.tolist(), strict=True)]
    rows = []
    for number, example, caption, places in zip(numbers, examples, captions, found, strict=True):
        own = [*words_of(f"caption: {_first(example['caption'])}"), *words_of(f"model: {caption}", "lightyellow")]
        if retrieval_caption(example) != example["caption"]:
            own += words_of(f"found by: {_first(retrieval_caption(example))}")
        cells = [_cell(_read(dataset, i), f"{score:.2f}", i == number) for i, score in places]
        rows.append([Cell(example.get("image")), Cell(words=own), *cells, *[Cell()] * (FOUND - len(cells))])
    return draw_sheet(_TITLES, rows, _WIDTHS)


def _read(dataset: Any, number: int) -> dict[str, Any] | None:
    """An example with its image decoded; `None` where it cannot be read, which an evaluation may have left out."""
    try:
        example = dict(dataset[number])
        if example.get("image") is not None:
            example["image"] = load_rgb_image(example["image"])
        return example if _first(example.get("caption")).strip() else None  # not of documents
    except (ValueError, OSError):
        return None


def _are_in_order(own: torch.Tensor, numbers: Sequence[int], count: int, embeds: Mapping[str, Any]) -> bool:
    """Whether an evaluation's embeddings are those of the data set, row by row: not if it was grouped by length."""
    if len(embeds.get("image_embeds", ())) != count:
        return False
    theirs = torch.as_tensor(embeds["image_embeds"])[list(numbers)].to(own)
    return bool(((own * theirs).sum(-1) > _SAME).all())


def _cell(example: Mapping[str, Any] | None, score: str, is_right: bool) -> Cell:
    words = [Word(score + " ", _RIGHT if is_right else None)]
    if example is None:
        return Cell(words=words)
    return Cell(example.get("image"), [*words, *words_of(_first(example["caption"]))])


def _first(texts: Any) -> str:
    return texts if isinstance(texts, str) else str((texts or [""])[0])


def report_picture(name: str, picture: Image.Image, step: int, callbacks: Sequence[TrainerCallback]) -> None:
    """Hand a picture to TensorBoard, wandb and trackio, if a run reports to them."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            import wandb

            wandb.log({name: wandb.Image(picture), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            trackio.log({name: trackio.Image(picture), "train/global_step": step})


__all__ = ["EvaluationSamples", "draw_samples", "report_picture"]
