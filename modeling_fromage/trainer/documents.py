"""Rows with documents: chats, lists of texts and images, and what OBELICS and MMC4 call them."""

from collections.abc import Mapping
from typing import Any


def document_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document of a row, as `{"messages": ...}` or `{"document": list of parts}`; `None` where it has none."""
    for name in ("messages", "document"):
        if row.get(name) is not None:
            return {name: row[name]}
    return None
