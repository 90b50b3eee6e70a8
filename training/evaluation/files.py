"""JSON files and image folders."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: The file cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def find_images(folder: Path) -> dict[str, Path]:
    """Image files in a folder and its subfolders, by name without suffix.

    Raises:
        ValueError: The folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} of images.")
    suffixes = Image.registered_extensions()
    return {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes}
