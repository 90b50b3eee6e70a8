"""The ids of an index's images, as callers give them."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def as_ids(ids: Any) -> list[str]:
    """One id or several, strings or whole numbers, as a list of strings that SQLite can store.

    Raises:
        ValueError: An id is neither.
    """
    several = list(ids) if isinstance(ids, Iterable) and not is_id(ids) else [ids]
    for image_id in several:
        if not is_id(image_id):
            raise ValueError(f"Image ids are strings, got {image_id!r} ({type(image_id).__name__}).")
    return [storable(str(image_id)) for image_id in several]


def is_id(value: Any) -> bool:
    """Whether `value` is one id: a string or a whole number."""
    return isinstance(value, (str, int, np.integer))


def storable(text: str) -> str:
    """`text` with what UTF-8 cannot encode (of a file's name, say) written as `\\udc..`."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


__all__ = ["as_ids", "is_id", "storable"]
