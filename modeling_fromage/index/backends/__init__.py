"""What searches an index: exact search and FAISS, behind one protocol, and Milvus, which also holds it."""

import inspect
from collections.abc import Callable
from typing import Any

from .base import SearchBackend
from .faiss import FaissBackend
from .flat import FlatBackend

BACKENDS: dict[str, Callable[..., SearchBackend]] = {
    "flat": FlatBackend,
    "faiss": FaissBackend,
}


def make_backend(name: str, options: dict[str, Any]) -> SearchBackend:
    """The backend called `name`, still empty.

    Raises:
        ValueError: There is none, or it has other options.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; this version has {', '.join(BACKENDS)} and milvus.")
    allowed = list(inspect.signature(BACKENDS[name]).parameters)
    if unknown := sorted(set(options) - set(allowed)):
        takes = f"takes the options {allowed}" if allowed else "takes no options"
        raise ValueError(f"The {name} backend {takes}, got {unknown}.")
    return BACKENDS[name](**options)
