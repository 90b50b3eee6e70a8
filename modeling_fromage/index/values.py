"""What a caller gives an image index, checked and made plain: embeddings, ids, metadata; NumPy's kinds among them."""

import json
from typing import Any

import numpy as np
import torch

from ..image_ids_fromage import as_ids, is_id


def as_embeds(embeds: Any, dim: int | None = None) -> torch.Tensor:
    """A tensor or array (N, q) in fp32 on the CPU.

    Raises:
        ValueError: It is not of this shape, or not of numbers, or not finite.
    """
    if not isinstance(embeds, torch.Tensor):
        try:
            embeds = torch.tensor(np.asarray(embeds))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Expected embeddings as a tensor or an array, got {type(embeds)}: {error}") from error
    if embeds.dim() != 2 or embeds.shape[-1] != (embeds.shape[-1] if dim is None else dim) or embeds.is_complex():
        raise ValueError(
            f"Expected embeddings (N, {'q' if dim is None else dim}), got {tuple(embeds.shape)} of {embeds.dtype}."
        )
    embeds = embeds.detach().float().cpu()
    if not torch.isfinite(embeds).all():
        raise ValueError("The embeddings contain NaN or infinite values.")
    return embeds


def as_list(value: Any) -> list[Any]:
    """The items of a list, a tuple, a set or an array; one value by itself otherwise."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def as_excluded(exclude_ids: Any, count: int) -> list[list[str]]:
    """The excluded ids of each of `count` queries: those of one list for all of them (or one id), or of a list each.

    Raises:
        ValueError: There are not as many lists as queries, or an id is no string.
    """
    several = [] if exclude_ids is None else as_list(exclude_ids)
    if all(map(is_id, several)):
        return [as_ids(several)] * count
    if len(several) != count:
        raise ValueError(f"Got {len(several)} lists of excluded ids for {count} queries.")
    return [as_ids(ids) for ids in several]


def as_entries(ids: Any, metadata: Any) -> list[tuple[str, str]]:
    """Ids and metadata (dicts) as they are stored: (id, JSON) each.

    Raises:
        ValueError: An id is no string, a metadata entry is no dict or JSON cannot hold it, or counts differ.
    """
    ids = as_ids(ids)
    metadata = [{}] * len(ids) if metadata is None else list(metadata)
    if len(metadata) != len(ids):
        raise ValueError(f"Got {len(ids)} ids and {len(metadata)} metadata entries.")
    for image_id, facts in zip(ids, metadata, strict=True):
        if not isinstance(facts, dict):
            raise ValueError(f"The metadata of an image is a dict, got {facts!r} for {image_id!r}.")
    return [(name, as_json(facts, f"metadata of image {name!r}")) for name, facts in zip(ids, metadata, strict=True)]


def as_json(value: Any, name: str) -> str:
    """JSON of plain values, NumPy's among them.

    Raises:
        ValueError: It has no JSON; JSON has no NaN.
    """
    try:
        text = _READABLE_JSON.encode(value)
        # What is not UTF-8 in a file's name is a lone surrogate in Python, which JSON can only escape.
        return text if text.isascii() or _is_utf8(text) else _ASCII_JSON.encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"JSON cannot hold the {name}: {error}. Give texts, numbers, lists and dicts.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biufUO":
        return value.tolist()
    raise TypeError(f"it has a {type(value).__name__}")


_READABLE_JSON, _ASCII_JSON = (
    json.JSONEncoder(ensure_ascii=ascii_only, allow_nan=False, default=_plain) for ascii_only in (False, True)
)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
