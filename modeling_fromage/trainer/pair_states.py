"""Pairs of images and captions as cached vectors: an encoder's features, a language model's states at `[RET]`.

A pair may have several captions and several views of its image. The images of documents are pairs too, with the texts
before them. Axes: N pairs, W the encoder's width.
"""

import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils.logging import tqdm

from ..modeling_fromage import FromageForConditionalGeneration
from .data_collator import FromageDataCollator, retrieval_caption
from .document_contexts import text_contexts
from .documents import document_of
from .draws import number_of
from .image_batches import image_tensors
from .ret_states import RetStates, as_stored, cache_ret_states

logger = logging.getLogger(__name__)

Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and scale, (width,) each
_SAMPLE = 65_536  # pairs that means and scales are taken of
_IMAGES = 64  # that are read at a time
_SMALLEST_SCALE = 0.1  # of the mean deviation: entries that hardly vary are not blown up


class Choices:
    """What each of N pairs has one or several of, by number.

    Args:
        rows (`Iterable[Sequence[int]]`): The numbers of each pair.

    Raises:
        ValueError: A pair has none.
    """

    def __init__(self, rows: Iterable[Sequence[int]]):
        counts, numbers = array("q", [0]), array("q")
        for number, row in enumerate(rows):
            if not row:
                raise ValueError(
                    f"Example {number} of the data set has an empty list of captions or of views. Remove it."
                )
            counts.append(len(row))
            numbers.extend(row)
        self.numbers, self.starts = torch.tensor(numbers), torch.tensor(counts).cumsum(0)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pick(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A number for each of `rows` (n,): drawn, or without a generator the first."""
        starts = self.starts[rows]
        if generator is not None:
            drawn = torch.rand(len(rows), generator=generator, dtype=torch.float64)
            starts = starts + (drawn * (self.starts[rows + 1] - starts)).long()
        return self.numbers[starts]


class TooFewPairsError(ValueError):
    """Data have fewer than two images with a text before them."""


class PairStates(Dataset):
    """N pairs of an image and its caption, or one of its captions, as vectors.

    Args:
        features (`torch.Tensor`): Pooled features of images, or of views of them, (number of views, W).
        states ([`RetStates`]): The states of `[RET]` behind captions.
        views ([`Choices`], *optional*): The rows of `features` of each pair; by default one each.
        captions ([`Choices`], *optional*): The rows of `states` of each pair; by default one each.
        seed (`int`, *optional*): With it, one of each pair's views and captions is drawn whenever it is read, by the
            seed and the batch's numbers; without, the first is taken.
    """

    def __init__(
        self,
        features: torch.Tensor,
        states: RetStates,
        views: Choices | None = None,
        captions: Choices | None = None,
        seed: int | None = None,
    ):
        self.features, self.states, self.seed = features, states, seed
        self._views, self._captions = (
            Choices([number] for number in range(len(features))) if given is None else given
            for given in (views, captions)
        )

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch at once."""
        rows, generator = torch.as_tensor(indices), None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed ^ number_of(rows.numpy().tobytes()))
        features = self.features[self._views.pick(rows, generator)].float()
        states = self.states.rows(self._captions.pick(rows, generator))
        return {"pooled_image_features": features, "ret_states": states, "labels": rows}

    def statistics(self, widths: Sequence[int]) -> list[Statistics]:
        """Mean and scale of the image features' entries, and of those of each layer's states: `widths`, of the vectors
        that a projection takes, the features' first. States of several `[RET]` tokens may be several of them."""
        generator = torch.Generator().manual_seed(0)
        sample = self.__getitems__(torch.randperm(len(self), generator=generator)[:_SAMPLE].tolist())
        inputs = (sample["pooled_image_features"], *sample["ret_states"])
        return [statistics_of(rows.reshape(-1, width)) for rows, width in zip(inputs, widths, strict=True)]


def read_pairs(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    dataset: Any,
    directory: Path,
    seed: int | None = None,
) -> PairStates:
    """The features of a dataset's images, encoded here where they are not cached, and the states of its captions.

    Args:
        seed (`int`, *optional*): Draws one of each pair's captions and views; without it, the first is taken.
    """
    features, views, rows = _read(model, collator, dataset)
    if seed is None:
        rows = [row[:1] for row in rows]
    numbers: dict[Any, int] = {}  # of each text, which several pairs may share
    choices = Choices([numbers.setdefault(text, len(numbers)) for text in row] for row in rows)
    cache_ret_states(model, collator, list(numbers), directory)
    return PairStates(features, RetStates(directory, len(numbers)), views, choices, seed)


def retrieval_captions(rows: Any) -> list[Sequence[Any]]:
    """The texts that the image of each row is found by; of a `datasets.Dataset` without reading its other columns."""
    columns = getattr(rows, "column_names", None)
    if columns is None:
        captions = [retrieval_caption(row) for row in rows]
    else:
        captions = rows["retrieval_caption" if "retrieval_caption" in columns else "caption"]
    return [caption if isinstance(caption, (list, tuple)) else [caption] for caption in captions]


def _read(
    model: FromageForConditionalGeneration, collator: FromageDataCollator, dataset: Any
) -> tuple[torch.Tensor, Choices, list[Sequence[Any]]]:
    """Features, the rows of them that are views of each pair's image, and the texts that it is found by: all in one
    pass, since a data set with errors in it gives other examples for bad ones."""
    found, counts = [], array("q")
    captions: list[Sequence[Any]] = []
    for rows in _some_images(collator, dataset):
        pixels = image_tensors(collator.processor, rows).get("pixel_values")  # first: others come in for bad ones
        texts = [_texts_of(collator, row) for row in rows]
        captions += [own for of_row in texts for own in of_row.values()]
        if pixels is None:
            views = [own for row, of_row in zip(rows, texts, strict=True) for own in _views_of(row, of_row)]
            counts.extend(map(len, views))
            found += views
            continue
        if not found:
            logger.info(
                "Images are encoded for the warm start, and again in training. `fromage cache-features` saves both."
            )
        firsts = itertools.accumulate((row.get("num_images", 1) for row in rows), initial=0)
        images = [first + image for first, of_row in zip(firsts, texts, strict=False) for image in of_row]
        if images:
            counts.extend([1] * len(images))
            found.append(model.get_pooled_image_features(pixels[images].to(model.device)).cpu())
    if len(counts) < 2:
        raise TooFewPairsError(
            f"The warm start needs two images or more with a text before them, got {len(counts)} in {len(dataset)} "
            "examples. Leave `retrieval_warm_start_steps` out, or give other data."
        )
    starts = itertools.accumulate(counts, initial=0)
    views_of = Choices(range(start, end) for start, end in itertools.pairwise(starts))
    features = torch.cat(found)
    model.adapter.check_features(features)
    return as_stored(features[:, : model.adapter.feature_width]), views_of, captions  # retrieval reads no patches


def _some_images(collator: FromageDataCollator, dataset: Any) -> Iterator[list[dict[str, Any]]]:
    """The examples of a dataset, with decoded images, as many at a time as have some images."""
    rows: list[dict[str, Any]] = []
    for number in tqdm(range(len(dataset)), desc="Reading image features"):
        row = dataset[number]
        is_cached_pair = row.get("pooled_image_features") is not None and document_of(row) is None
        rows.append(row if is_cached_pair else collator.prepare(row))
        if sum(row.get("num_images", 1) for row in rows) >= _IMAGES:
            yield rows
            rows = []
    if rows:
        yield rows


def _texts_of(collator: FromageDataCollator, row: dict[str, Any]) -> Mapping[int, Sequence[Any]]:
    """The texts that find an example's images, by the number of each: a pair's captions; of a document the texts before
    an image. What stands there with images holds trained visual tokens, and is left to joint training."""
    document = document_of(row)
    if document is None:
        return {0: retrieval_captions([row])[0]}
    return text_contexts(collator.processor, document, row["document_ids"], collator.max_document_length)


def _views_of(row: dict[str, Any], images: Iterable[int]) -> list[torch.Tensor]:
    """Cached features (number of views, W) of images of an example."""
    features = torch.as_tensor(row["pooled_image_features"])
    if "document_ids" in row:
        return [features[image][None] for image in images]
    return [features if features.dim() == 2 else features[None]]


def statistics_of(rows: torch.Tensor) -> Statistics:
    """Mean and scale of the entries of vectors (N, width), `(rows - mean) * scale` being of about unit deviation."""
    deviation = rows.double().std(0)
    scale = 1 / (deviation + _SMALLEST_SCALE * deviation.mean()).clamp_min(1e-12)
    return rows.double().mean(0).float(), scale.float()


__all__ = ["Choices", "PairStates", "TooFewPairsError", "read_pairs", "retrieval_captions", "statistics_of"]
