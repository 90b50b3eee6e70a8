"""Files of a data set on disk."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: The file is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def find_images(folder: Path) -> dict[str, Path]:
    """Image files below a folder by their names without suffix.

    Raises:
        ValueError: There is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} of images.")
    suffixes = Image.registered_extensions()
    return {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes}
