"""The images of an image index: which files it may read, where those in memory are kept, and what is published."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from ..images_fromage import ImageLimits, UnreadableImageError, is_url, load_rgb_image

IMAGE_FOLDERS = "index-images-*"  # of PNG files, each called by its image's position


def readable_file(
    path: str, image_id: str, own_folder: Path | None, image_root: Path | None, stored_root: str | None
) -> Path:
    """The file of a metadata "path", for an index that may have been written by anyone: it is below the index's own
    folder, or below the `image_root` that the caller gave. Its own word for where its images are is not taken.

    Raises:
        UnreadableImageError: It is elsewhere.
    """
    start = own_folder if image_root is None else image_root
    folders = [
        *([] if own_folder is None else own_folders(own_folder)),
        *([] if image_root is None else [image_root.resolve()]),
    ]
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a loop of links, or a NUL
        found = None if start is None else (start / path).resolve()
        allowed = found is not None and any(found.is_relative_to(folder) for folder in folders)
        # Most paths are relative to where the images were, not to the index.
        if allowed and (image_root is not None or found.is_file()):
            return found
    value = f"{stored_root!r}, which the index names" if stored_root else "the folder that they are in"
    raise UnreadableImageError(
        image_id, "local files are refused",
        f"{path[:200]!r} is not in the index's own folder{'' if image_root is None else f' or {str(image_root)!r}'}; "
        f"if its images may be read, give `image_root=`: {value}",
    )  # fmt: skip


def own_folders(directory: Path) -> list[Path]:
    """What belongs to an index in `directory`: the folder, and in the Hub's cache the files that it links to."""
    resolved = directory.resolve()
    cache = [resolved.parent.parent / "blobs"] if resolved.parent.name == "snapshots" else []
    return [resolved, *cache]


def kept_images(directory: Path, state: dict[str, Any]) -> dict[int, Path]:
    """The files of the images that an index in `directory` keeps, as its listing says, by position."""
    folder = directory / Path(state.get("images", "")).name
    if "images" not in state or not folder.is_dir():
        return {}
    return {int(path.stem): path for path in folder.iterdir() if re.fullmatch(r"\d{1,18}\.png", path.name)}


def own_image(path: Path) -> Path:
    """The file of one of [`kept_images`].

    Raises:
        UnreadableImageError: It is gone, or is a link that leads out of the index's folder.
    """
    found, folder = path.resolve(), path.parent.parent
    if not any(found.is_relative_to(own) for own in own_folders(folder)):
        raise UnreadableImageError(str(path), "local files are refused", "it leads out of the index's folder")
    if not found.is_file():
        raise UnreadableImageError(str(path), "not found", f"if the index in {folder} was saved anew, reopen it")
    return found


def write_image(image: Image.Image | Path, path: Path):
    """Keep an image as the RGB that [`FromageImageIndex.load_image`] returns, without loss.

    Raises:
        UnreadableImageError: It cannot be read (any more).
    """
    if isinstance(image, Path):
        shutil.copyfile(own_image(image), path)
        return
    pixels = max(ImageLimits.max_pixels, image.width * image.height)
    rgb = load_rgb_image(image, ImageLimits(max_pixels=pixels, max_aspect_ratio=float("inf")))
    rgb.save(path, format="png", transparency=None, icc_profile=None)  # which were the original's


class Scrubber:
    """Metadata and names without this machine's folders: of a path the file's name is published.

    Args:
        folders: Those that are known to be this machine's; they are cut out of longer texts, too.
    """

    def __init__(self, folders: Iterable[str | os.PathLike | None]):
        known = {
            str(folder).rstrip("/\\") for folder in (*folders, os.path.expanduser("~"), tempfile.gettempdir()) if folder
        }
        longest_first = sorted((re.escape(folder) for folder in known if folder), key=len, reverse=True)
        self._known = re.compile(rf"(?<![\w.~-])(?:{'|'.join(longest_first)})(?![\w.-])[/\\]?")

    def __call__(self, value: Any, is_path: bool = False) -> Any:
        """`value` (anything that JSON holds) scrubbed, in all its depth; `is_path`: any absolute path is one."""
        if isinstance(value, dict):
            return {self(name): self(item, name == "path") for name, item in value.items()}
        if isinstance(value, list):
            return [self(item, is_path) for item in value]
        return self._text(value, is_path) if isinstance(value, str) else value

    def _text(self, text: str, is_path: bool) -> str:
        if is_url(text):
            return text
        if text.lower().startswith("file:"):
            return PurePosixPath(text).name
        windows = PureWindowsPath(text)
        if windows.drive and windows.root:
            return windows.name
        path = PurePosixPath(text)
        # "/m/01g317" is a label and "/r/funny" a name, but "/home/me/pets" is a path, and so is "/data/pets/a.png".
        if path.is_absolute() and path.name and (is_path or path.suffix or os.path.exists("/" + path.parts[1])):
            return path.name
        return self._known.sub("", text)
