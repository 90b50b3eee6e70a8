"""Ids of an index's images, as their users give them."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def as_ids(ids: Any) -> list[str]:
    """One id or several, strings or whole numbers, as strings that SQLite can store.

    Raises:
        ValueError: One is something else.
    """
    several = list(ids) if isinstance(ids, Iterable) and not is_id(ids) else [ids]
    for image_id in several:
        if not is_id(image_id):
            raise ValueError(f"Image ids are strings, got {image_id!r} ({type(image_id).__name__}).")
    return [storable(str(image_id)) for image_id in several]


def is_id(value: Any) -> bool:
    return isinstance(value, (str, int, np.integer))


def storable(text: str) -> str:
    """`text`, with what is not UTF-8 in it (of a file's name, say) written as `\\udc..`."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


__all__ = ["as_ids", "is_id", "storable"]
