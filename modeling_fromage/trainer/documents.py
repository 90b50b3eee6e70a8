"""Rows that hold a document of texts and images: chats, lists of parts, and the fields of OBELICS and MMC4."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.columns import as_image, document_columns
from ..messages_fromage import image_source

_NAMES = ("raw_url", "url", "image_name", "image")  # of an image in MMC4's `image_info`


def document_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document of a row, as `{"messages": [...]}` or `{"document": [...]}`, a list of texts and images in order;
    `None` of a row that has none.

    Args:
        row: With `messages` (transformers' chats), `document` (a list of parts), `images` and `texts` (OBELICS: of each
            place one, the other is `None`), or `text_list` and `image_info` (MMC4: an image stands before the text of
            its `matched_text_index`).
    """
    columns = document_columns(name for name in row if row[name] is not None)
    if columns in (("messages",), ("document",)):
        return {columns[0]: row[columns[0]]}
    if columns == ("images", "texts"):
        return {"document": _of_obelics(row["images"], row["texts"])}
    return {"document": _of_mmc4(row["text_list"], row["image_info"])} if columns else None


def document_in(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a table's row, with paths from the table's `folder`. A row without one has an empty one."""
    document = document_of(row) or {}
    name, parts = next(iter(document.items()), ("document", None))
    if parts is None or name == "document":
        return {name: _located([] if parts is None else parts, folder)}
    if not isinstance(parts, list):
        return document
    return {
        name: [
            {**message, "content": _located(message["content"], folder)}
            if isinstance(message, Mapping) and isinstance(message.get("content"), list)
            else message
            for message in parts
        ]
    }


def _of_obelics(images: Any, texts: Any) -> Any:
    if not _are_lists(images, texts) or len(images) != len(texts):
        return None
    pairs = list(zip(images, texts, strict=True))
    if any(image is not None and text is not None for image, text in pairs):
        return None
    return [_image(image) if text is None else text for image, text in pairs if image is not None or text is not None]


def _of_mmc4(texts: Any, images: Any) -> Any:
    if not _are_lists(texts, images):
        return None
    before: dict[Any, list[Any]] = {}
    for image in images:
        if not isinstance(image, Mapping):
            return None
        place = image.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            return None
        source = next((image[name] for name in _NAMES if image.get(name) is not None), None)
        before.setdefault(place, []).append(_image(source))
    return [part for number, text in enumerate(texts) for part in (*before.get(number, ()), text)]


def _are_lists(*values: Any) -> bool:
    return all(isinstance(value, Sequence) and not isinstance(value, str) for value in values)


def _image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def _located(parts: Any, folder: Path) -> Any:
    if not isinstance(parts, list):
        return parts
    return [
        _image(as_image(image_source(part), folder)) if isinstance(part, dict) and part.get("type") == "image" else part
        for part in parts
    ]


__all__ = ["document_in", "document_of"]
