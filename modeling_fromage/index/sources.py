"""The images that an index is built from: folders, tables, datasets or lists, read ahead by threads."""

import contextlib
import hashlib
import itertools
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import is_datasets_available

from ..image_ids_fromage import as_ids, storable
from ..images_fromage import UnreadableImageError, is_url
from ..io.tables import SUFFIXES, is_table, read_rows
from .image_shards import IMAGE_COLUMNS, SHARD_SUFFIXES, ImageShards, count_rows, find_shards, parquet_rows

if is_datasets_available():
    import datasets

_EXPECTED = (
    f"a folder, a table ({', '.join(SUFFIXES)}), shards ({', '.join(SHARD_SUFFIXES)}), a dataset or a list of images"
)


@dataclass
class ImageSource:
    """One image to be indexed: what [`load_rgb_image`] takes, or the error that is known already, its id, and its
    metadata."""

    image: Any
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The image's URL or path, or else its type."""
        if isinstance(self.image, dict):
            return str(self.image.get("path") or "in memory")
        if isinstance(self.image, UnreadableImageError):
            return self.image.name[:1000]
        return str(self.image)[:1000] if isinstance(self.image, (str, os.PathLike)) else type(self.image).__name__


class ImageSources(NamedTuple):
    """The images of a build.

    Attributes:
        images: In order.
        total: Their number, if it is known.
        root: The folder that relative paths in the metadata start from.
        shards: Digest of the shards that they come from, if they do: it tells others without reading the images.
    """

    images: Iterator[ImageSource]
    total: int | None
    root: str | None
    shards: str | None = None

    def digest(self) -> str:
        """What tells these images from others. Without shards, `images` are used up."""
        if self.shards is not None:
            return self.shards
        digest = SourceDigest()
        for source in self.images:
            digest.update(source)
        return digest.hexdigest()


def image_sources(
    images: Any,
    ids: Sequence[str] | None = None,
    metadata: Sequence[dict[str, Any]] | None = None,
    shard: tuple[int, int] | None = None,
) -> ImageSources:
    """The images of a folder, a table (see [`read_rows`]), of shards (see [`find_shards`]), a `datasets` dataset, or of
    any iterable of PIL images, paths, URLs or rows (dicts with an "image").

    An image's id comes from `ids`, or else from its row's "id", its path below the folder, its place in its shard, or
    its number. Paths, URLs and a table's other columns become metadata; `metadata` adds to it. `shard` (i, n) takes
    every n-th image from the i-th on, or every n-th file of many shards.

    Raises:
        ValueError: `images` is none of these, or the number of `ids` or `metadata` is not that of the images.
    """
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` is (i, n) with i from 0 to n - 1, got {shard}.")
    rows, count, root = _rows_of(images, shard)
    ids = None if ids is None else as_ids(ids)
    for name, given in (("ids", ids), ("metadata entries", metadata)):
        if given is not None and len(given) != count:
            got = "a stream of images; let its rows carry them" if count is None else f"{count} images"
            raise ValueError(f"Got {len(given)} {name} for {got}.")
    given_ids: Iterable[str | None] = itertools.repeat(None) if ids is None else ids
    given_metadata: Iterable[dict[str, Any]] = itertools.repeat({}) if metadata is None else metadata
    columns = zip(rows, given_ids, given_metadata, strict=False)
    sources: Iterator[ImageSource] = (_source(number, *row, root) for number, row in enumerate(columns))
    folder = None if root is None else str(root)
    if isinstance(rows, ImageShards):
        return ImageSources(sources, None, folder, rows.digest())
    if shard is not None:
        sources = itertools.islice(sources, shard[0], None, shard[1])
        count = None if count is None else len(range(shard[0], count, shard[1]))
    return ImageSources(sources, count, folder)


def _rows_of(images: Any, shard: tuple[int, int] | None) -> tuple[Any, int | None, Path | None]:
    """Images or rows, their number if it is known, and the folder that their paths start from."""
    path = Path(images).absolute() if isinstance(images, (str, os.PathLike)) else None
    if path is not None and path.is_dir():
        found = sorted(file for file in path.rglob("*") if _may_be_image(file))
        if found:
            return [{"image": str(file), "id": file.relative_to(path).as_posix()} for file in found], len(found), path
    if path is not None and path.suffix.lower() == ".parquet" and path.is_file():
        return parquet_rows(path, path.name), count_rows(path), path.parent
    shards, folder = find_shards(images)
    if shards:
        return ImageShards(shards, shard), None, None if folder is None else Path(folder)
    if path is None:
        rows = _undecoded(images)
        return rows, len(rows) if isinstance(rows, Sized) else None, None
    if path.is_dir():
        return [], 0, path
    if not is_table(path):
        raise ValueError(f"Expected {_EXPECTED}, got {images!r}.")
    rows = _read_table(path)
    return rows, len(rows), path.parent


def _may_be_image(file: Path) -> bool:
    """By its name. A device or a pipe is none: it could be read for ever. A broken link is a missing image."""
    return file.suffix.lower() in Image.registered_extensions() and (file.is_file() or not file.exists())


def _source(number: int, row: Any, given_id: str | None, given: dict[str, Any], root: Path | None) -> ImageSource:
    if not isinstance(row, dict):
        row = {"image": row}
    columns = [name for name in IMAGE_COLUMNS if row.get(name) is not None]
    column = next((name for name in columns if row[name] != ""), None) or next(iter(columns), None)
    if column is None:
        raise ValueError(f"Row {number} has none of the columns {IMAGE_COLUMNS}; it has {sorted(row)}.")
    image = row[column]
    if root is not None and isinstance(image, str) and image and not is_url(image):
        image = str(Path(root) / image)  # a table's are relative to it
    metadata = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    metadata = {name: value for name, value in metadata.items() if name not in (column, "id") and _is_scalar(value)}
    where = image if not isinstance(image, dict) else None if image.get("bytes") else image.get("path")
    if is_url(where):
        metadata["url"] = where
    elif isinstance(where, (str, os.PathLike)):
        path = Path(where).absolute()
        metadata["path"] = (path.relative_to(root) if root and path.is_relative_to(root) else path).as_posix()
    image_id = given_id if given_id is not None else row.get("id")
    image_id = storable(str(number if image_id is None else image_id))
    return ImageSource(image, image_id, {**metadata, **given})


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, bool)) or (isinstance(value, float) and math.isfinite(value))


def _read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table with a column of images."""
    rows = [row for _, row in read_rows(path)]
    if rows and not any(name in rows[0] for name in IMAGE_COLUMNS):
        raise ValueError(f"{path} needs a header with one of the columns {IMAGE_COLUMNS}; it has {list(rows[0])}.")
    for row in rows:
        for name in IMAGE_COLUMNS:
            if name in row:
                row[name] = row[name] or ""  # of a short row: left out like a missing file, not for all to fail
    return rows


def _undecoded(images: Any) -> Any:
    """`images`, with a dataset's image column not decoded, so that a broken file costs that file alone."""
    if is_datasets_available() and isinstance(images, (datasets.Dataset, datasets.IterableDataset)):
        for name, feature in (images.features or {}).items():
            if isinstance(feature, datasets.Image):
                images = images.cast_column(name, datasets.Image(decode=False))
                return images if name in IMAGE_COLUMNS else images.rename_column(name, "image")
        return images
    if isinstance(images, Iterable) and not isinstance(images, (bytes, dict)):
        return images
    raise ValueError(f"Expected {_EXPECTED}, got {type(images)}.")


def read_ahead(
    sources: Iterable[ImageSource], load: Callable[[Any], Any], workers: int, ahead: int
) -> Iterator[tuple[ImageSource, Any, UnreadableImageError | None]]:
    """Each source, in order, with what `load` makes of its image in a thread, or with the error that it raises."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending: deque = deque()
        try:
            for source in sources:
                pending.append((source, pool.submit(load, source.image)))
                if len(pending) > ahead:
                    yield _result(*pending.popleft())
            while pending:
                yield _result(*pending.popleft())
        finally:
            for _, future in pending:
                future.cancel()


def _result(source: ImageSource, future: Future[Any]) -> tuple[ImageSource, Any, UnreadableImageError | None]:
    try:
        return source, future.result(), None
    except UnreadableImageError as error:
        return source, None, error


def _content(image: Any) -> str:
    """What tells an image from another of the same name; empty for a URL or an image that cannot be read."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        if isinstance(image, Image.Image):
            return f"{image.size} {image.mode} {zlib.crc32(image.tobytes())}"
        if isinstance(image, dict) and image.get("bytes"):
            return str(zlib.crc32(image["bytes"]))
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(path, (str, os.PathLike)) and not is_url(path):
            found = os.stat(path)
            return f"{found.st_size} {found.st_mtime_ns}"
    return ""


class SourceDigest:
    """A running digest of the images of a build, to tell whether the next call is about the same ones. It covers ids,
    and bytes, pixels, a file's size and time of change, or a URL."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, source: ImageSource) -> None:
        self._hash.update(f"{source.id}\0{source.name}\0{_content(source.image)}\n".encode(errors="surrogatepass"))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
