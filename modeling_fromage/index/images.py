"""The images of an index: which files it may read, where images without a file are kept, and what is published."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from ..images_fromage import ImageLimits, UnreadableImageError, is_url, load_rgb_image

IMAGE_FOLDERS = "index-images-*"  # of PNG files, named after their images' positions
# An image that has neither path nor URL: in memory, as the bytes of a file, or one of `kept_images`.
KeptImage = Image.Image | bytes | Path
ImageLoader = Callable[[str, dict[str, Any]], Any]


@dataclass
class ImageAccess:
    """Where the images of an index are, and which files it may read.

    Attributes:
        image_root: The folder that relative paths in the metadata start from, as the caller gave it.
        loader: The caller's own way to an image, from its id and metadata.
        folder: The folder that the index was opened from.
        stored_root: What an index that was opened says that its `image_root` was. It is never taken at its word.
        may_read_files: Whether metadata may name any file: of an index made here, not of one that was opened.
    """

    image_root: Path | None = None
    loader: ImageLoader | None = None
    folder: Path | None = None
    stored_root: str | None = None
    may_read_files: bool = True

    @classmethod
    def shared(cls, several: Sequence["ImageAccess"]) -> "ImageAccess":
        """What several indexes agree on about where their images are."""
        roots, stored = {access.image_root for access in several}, {access.root for access in several}
        image_root = roots.pop() if len(roots) == 1 else None
        return cls(image_root=image_root, stored_root=stored.pop() if len(stored) == 1 else None)

    @property
    def root(self) -> str | None:
        """The folder that relative paths start from, which is not to say that it may be read."""
        return self.stored_root if self.image_root is None else str(self.image_root.absolute())

    def scrubber(self) -> "Scrubber":
        """What removes the folders of this machine, this index's among them."""
        return Scrubber([self.root, self.image_root and self.image_root.resolve()])

    def load(self, image_id: str, metadata: dict[str, Any], kept: KeptImage | None, limits: ImageLimits) -> Image.Image:
        """One image as RGB; `kept` is the one that the index keeps, if any.

        Raises:
            UnreadableImageError: It cannot be read, or may not.
        """
        if kept is not None:
            return load_rgb_image(_source(kept), limits)
        if self.loader is not None:
            return load_rgb_image(self.loader(image_id, metadata), limits)
        path = metadata.get("path")
        if is_url(metadata.get("url")):
            return load_rgb_image(metadata["url"], limits)
        if not isinstance(path, str):
            raise UnreadableImageError(
                image_id, "no path or url in the index's metadata", "set the index's `image_loader` to say where it is"
            )
        if self.may_read_files:
            return load_rgb_image(Path(self.image_root or "") / path, limits)
        return load_rgb_image(readable_file(path, image_id, self.folder, self.image_root, self.stored_root), limits)


def _source(image: KeptImage) -> Any:
    """What [`load_rgb_image`] takes."""
    if isinstance(image, Path):
        return own_image(image)
    return {"bytes": image} if isinstance(image, bytes) else image


def readable_file(
    path: str, image_id: str, own_folder: Path | None, image_root: Path | None, stored_root: str | None
) -> Path:
    """The file of a metadata "path" of an index that anyone may have written. It must be below the index's own folder,
    or below the `image_root` that the caller gave, whatever the index says about where its images are.

    Raises:
        UnreadableImageError: The file is elsewhere.
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
        if found is not None and allowed and (image_root is not None or found.is_file()):
            return found
    value = f"{stored_root!r}, which the index names" if stored_root else "the folder that they are in"
    raise UnreadableImageError(
        image_id, "local files are refused",
        f"{path[:200]!r} is not in the index's own folder{'' if image_root is None else f' or {str(image_root)!r}'}; "
        f"if its images may be read, give `image_root=`: {value}",
    )  # fmt: skip


def own_folders(directory: Path) -> list[Path]:
    """The folders of an index in `directory`: itself and, in the Hub's cache, that of the files it links to."""
    resolved = directory.resolve()
    cache = [resolved.parent.parent / "blobs"] if resolved.parent.name == "snapshots" else []
    return [resolved, *cache]


def kept_images(directory: Path, state: dict[str, Any]) -> dict[int, Path]:
    """The files of the images that an index in `directory` keeps, by position; `state` is its listing."""
    folder = directory / Path(state.get("images", "")).name
    # Anyone may have written the listing: its ".." or "" would be a folder that is not of images.
    if not fnmatch(folder.name, IMAGE_FOLDERS) or not folder.is_dir():
        return {}
    return {int(path.stem): path for path in folder.iterdir() if re.fullmatch(r"\d{1,18}\.png", path.name)}


def own_image(path: Path) -> Path:
    """The file of one of [`kept_images`].

    Raises:
        UnreadableImageError: It is gone, or a link that leads out of the index's folder.
    """
    found, folder = path.resolve(), path.parent.parent
    if not any(found.is_relative_to(own) for own in own_folders(folder)):
        raise UnreadableImageError(str(path), "local files are refused", "it leads out of the index's folder")
    if not found.is_file():
        raise UnreadableImageError(str(path), "not found", f"if the index in {folder} was saved anew, reopen it")
    return found


def write_image(image: KeptImage, path: Path) -> None:
    """Keep an image as the RGB that [`FromageImageIndex.load_image`] returns, without loss.

    Raises:
        UnreadableImageError: It cannot be read (any more).
    """
    if isinstance(image, Path):
        shutil.copyfile(own_image(image), path)
        return
    pixels = ImageLimits.max_pixels
    if isinstance(image, Image.Image):  # its owner has it in memory in any case
        pixels = max(pixels, image.width * image.height)
    rgb = load_rgb_image(_source(image), ImageLimits(max_pixels=pixels, max_aspect_ratio=float("inf")))
    write_png(rgb, path)


def write_png(rgb: Image.Image, file: Any) -> None:
    """Write pixels alone: what else the image's file said is left out."""
    rgb.save(file, format="png", transparency=None, icc_profile=None)


class Scrubber:
    """Removes this machine's folders from what is published. Of a path the file's name remains.

    Args:
        folders: Folders of this machine, which are also cut out of longer texts.
    """

    def __init__(self, folders: Iterable[str | os.PathLike | None]):
        known = {
            str(folder).rstrip("/\\") for folder in (*folders, os.path.expanduser("~"), tempfile.gettempdir()) if folder
        }
        longest_first = sorted((re.escape(folder) for folder in known if folder), key=len, reverse=True)
        self._known = re.compile(rf"(?<![\w.~-])(?:{'|'.join(longest_first)})(?![\w.-])[/\\]?")

    def __call__(self, value: Any, is_path: bool = False) -> Any:
        """Scrub anything that JSON holds, in all its depth; `is_path` if any absolute path is certainly one."""
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

    def check_ids(self, ids: Iterable[str]) -> None:
        """Raise a `ValueError` if an id is a path of this machine."""
        paths = [image_id for image_id in ids if self(image_id) != image_id]
        if paths:
            raise ValueError(
                f"Ids that are paths of this machine would be published: {paths[:5]}. Give the images other ids."
            )
