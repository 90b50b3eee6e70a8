"""The image and the caption of a row, whatever its columns are called."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..images_fromage import DEFAULT_LIMITS, is_url

# The first that a row has counts; upper and lower case are one.
IMAGE_COLUMNS = ("image", "file_name", "url", "image_url", "image_path", "jpg", "jpeg", "png", "webp", "path", "img")
CAPTION_COLUMNS = ("caption", "text", "captions", "title", "txt")
NEGATIVES = "negative_images"  # hard negatives, a list of images, as `fromage mine-negatives` writes it


# Of documents: chats, lists of parts, and the names in OBELICS and MMC4. A group counts where all of it is there.
DOCUMENT_COLUMNS = (("messages",), ("document",), ("images", "texts"), ("text_list", "image_info"))


def document_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns of a table that hold a document; none where it has captioned images."""
    there = set(columns)
    return next((group for group in DOCUMENT_COLUMNS if there.issuperset(group)), ())


def find_column(columns: Iterable[str], wanted: str | None, known: tuple[str, ...]) -> str | None:
    """The column that is `wanted`, or else the first that is `known`; `None` where there is none."""
    if wanted is not None:
        return wanted if wanted in columns else None
    by_name = {name.lower(): name for name in columns}
    return next((by_name[name] for name in known if name in by_name), None)


def find_columns(
    source: str, columns: list[str], image_column: str | None, caption_column: str | None
) -> tuple[str, str]:
    """The names of the image column and the caption column.

    Raises:
        ValueError: One of them is missing.
    """
    image = find_column(columns, image_column, IMAGE_COLUMNS)
    caption = find_column(columns, caption_column, CAPTION_COLUMNS)
    if image is None or caption is None:
        needed = [
            repr(wanted) if wanted else f"{known[0]!r} (or {', '.join(known[1:])})"
            for wanted, known in ((image_column, IMAGE_COLUMNS), (caption_column, CAPTION_COLUMNS))
        ]
        raise ValueError(
            f"{source} needs a column {' and one '.join(needed)}; it has {columns}. Name them with image_column and "
            "caption_column."
        )
    return image, caption


def as_image(value: Any, folder: Path) -> Any:
    """The image of a row as an example has it: bytes as `{"bytes", "path"}`, relative paths from `folder`."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, dict) and not value.get("bytes") and value.get("path"):
        return value | {"path": as_image(value["path"], folder)}
    if isinstance(value, str) and value and not is_url(value):
        return str(folder / value)
    return value or None if isinstance(value, (str, dict)) else value


def negatives_of(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The hard negatives of a row as an example has them, where it has some."""
    found = row.get(NEGATIVES)
    if found is None:
        return {}
    return {NEGATIVES: [as_image(image, folder) for image in found] if isinstance(found, list) else found}


def image_suffixes() -> set[str]:
    """The suffixes, as in ".jpg", of files of the formats that are decoded."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in DEFAULT_LIMITS.formats}


def bad_row(place: str, problem: str) -> dict[str, Any]:
    """The example that stands for a row that cannot be read."""
    return {"image": None, "caption": None, "place": place, "problem": problem}


__all__ = [
    "CAPTION_COLUMNS",
    "DOCUMENT_COLUMNS",
    "IMAGE_COLUMNS",
    "NEGATIVES",
    "as_image",
    "bad_row",
    "document_columns",
    "find_column",
    "find_columns",
    "image_suffixes",
    "negatives_of",
]
