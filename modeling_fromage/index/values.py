"""Check and convert what callers give an index: embeddings, ids, metadata, filters; NumPy's types included."""

import json
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..image_ids_fromage import as_ids, is_id


def as_embeds(embeds: Any, dim: int | None = None) -> torch.Tensor:
    """A tensor or an array (N, q), in fp32 on the CPU.

    Raises:
        ValueError: It has another shape, or holds something other than finite numbers.
    """
    if not isinstance(embeds, torch.Tensor):
        try:
            embeds = torch.tensor(np.asarray(embeds))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Expected embeddings as a tensor or an array, got {type(embeds)}: {error}") from error
    if embeds.dim() == 3 and embeds.shape[-1] == dim:
        raise ValueError(
            f"Got {embeds.shape[1]} queries for each of {len(embeds)} texts (ret_aggregation='max'); an index takes "
            "one each. Search with FromagePipeline, or with `search_by_queries` of late_interaction_fromage, which "
            "merges what each of them finds."
        )
    if embeds.dim() != 2 or embeds.shape[-1] != (embeds.shape[-1] if dim is None else dim) or embeds.is_complex():
        raise ValueError(
            f"Expected embeddings (N, {'q' if dim is None else dim}), got {tuple(embeds.shape)} of {embeds.dtype}."
        )
    embeds = embeds.detach().float().cpu()
    if not torch.isfinite(embeds).all():
        raise ValueError("The embeddings contain NaN or infinite values.")
    return embeds


def unit_embeds(embeds: Any, dim: int) -> torch.Tensor:
    """Embeddings (N, q) that a caller gave, in fp32, of unit norm; errors as of [`as_embeds`]."""
    return F.normalize(as_embeds(embeds, dim), dim=-1)


def check_found(ids: list[str], found: Container[str], done: str) -> None:
    """Raise a `KeyError` that says what was not `done` if one of `ids` is not among those that were found."""
    missing = [image_id for image_id in ids if image_id not in found]
    if missing:
        raise KeyError(f"The index has no images {missing[:10]}; nothing was {done}.")


def as_list(value: Any) -> list[Any]:
    """The items of a list, a tuple, a set or an array; another value as the only item."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def as_excluded(exclude_ids: Any, count: int) -> list[list[str]]:
    """The excluded ids of each of `count` queries: of one list (or one id) for all of them, or of a list for each.

    Raises:
        ValueError: There are not as many lists as queries, or an id is no string.
    """
    several = [] if exclude_ids is None else as_list(exclude_ids)
    if all(map(is_id, several)):
        return [as_ids(several)] * count
    if len(several) != count:
        raise ValueError(f"Got {len(several)} lists of excluded ids for {count} queries.")
    return [as_ids(ids) for ids in several]


def as_wanted(where: Any) -> dict[str, list[Any]]:
    """The values that a filter wants of each metadata name, as JSON has them.

    Raises:
        ValueError: It is not a dict of strings, numbers, booleans and `None`, or lists of these.
    """
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where):
        raise ValueError(f"`where` is a dict of metadata names and values, got {where!r}.")
    listed = {name: as_list(value) for name, value in where.items()}
    for name, values in listed.items():
        if any(isinstance(value, (dict, list, tuple, np.ndarray)) for value in values):
            raise ValueError(f"`where` compares texts, numbers, True, False and None, got {name!r}: {values}.")
    return {name: json.loads(as_json(values, "`where`")) for name, values in listed.items()}


def as_entries(ids: Any, metadata: Any) -> list[tuple[str, str]]:
    """Ids and metadata as they are stored: (id, JSON) of each image.

    Raises:
        ValueError: An id is not a string, metadata is not a dict or JSON cannot hold it, or the counts differ.
    """
    ids = as_ids(ids)
    metadata = [{}] * len(ids) if metadata is None else list(metadata)
    if len(metadata) != len(ids):
        raise ValueError(f"Got {len(ids)} ids and {len(metadata)} metadata entries.")
    for image_id, values in zip(ids, metadata, strict=True):
        if not isinstance(values, dict):
            raise ValueError(f"The metadata of an image is a dict, got {values!r} for {image_id!r}.")
    return [(name, as_json(values, f"metadata of image {name!r}")) for name, values in zip(ids, metadata, strict=True)]


def as_json(value: Any, name: str) -> str:
    """`value` as JSON; NumPy's numbers and arrays as plain ones.

    Raises:
        ValueError: JSON cannot hold it; it has no NaN, for one.
    """
    try:
        text = _READABLE_JSON.encode(value)
        # What is not UTF-8 in a file's name is a lone surrogate in Python, which JSON can only escape.
        return text if text.isascii() or is_utf8(text) else _ASCII_JSON.encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"JSON cannot hold the {name}: {error}. Give texts, numbers, lists and dicts.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biufUO":
        return value.tolist()
    raise TypeError(f"it has a {type(value).__name__}")


_READABLE_JSON, _ASCII_JSON = (
    json.JSONEncoder(ensure_ascii=ascii_only, allow_nan=False, default=_plain) for ascii_only in (False, True)
)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode `text`: not lone surrogates, which stand for other bytes in a file's name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
