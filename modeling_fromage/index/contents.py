"""What an index of images holds, image by image.

Axes: N images, q the width of the shared image-text space.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..images_fromage import DEFAULT_LIMITS, ImageLimits
from .images import ImageAccess, ImageLoader
from .stores import Store


class IndexEntry(NamedTuple):
    """One image of an index: its id, its metadata, and its embedding (q,) as it is stored."""

    id: str
    metadata: dict[str, Any]
    embedding: torch.Tensor


class IndexContents:
    """The images of an index with their ids, metadata and embeddings, to be read."""

    _store: Store
    _access: ImageAccess

    @contextlib.contextmanager
    def _held_store(self) -> Iterator[Store]:
        """The store, which only this thread changes or replaces meanwhile."""
        while True:
            with (store := self._store).lock:
                if store is self._store:
                    yield store
                    return

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, image_id: object) -> bool:
        try:
            return bool(self._store.positions([image_id]))
        except ValueError:  # it is not an id
            return False

    def __iter__(self) -> Iterator[IndexEntry]:
        for rows, entries in self._store.pieces():
            for row, (_, image_id, metadata) in zip(rows, entries, strict=True):
                yield IndexEntry(image_id, metadata, row.clone())  # the caller's own, not a view of the index

    def __repr__(self) -> str:
        return f"FromageImageIndex({len(self):,} images, {self.dim} dimensions, {self.dtype}, {self.backend})"

    @property
    def dim(self) -> int:
        """Width of the embeddings, q."""
        return self._store.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored embeddings."""
        return self._store.dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are; see [`to`]."""
        return self._store.device

    @property
    def backend(self) -> str:
        """What searches: `"flat"`, `"faiss"` or `"milvus"`."""
        return self._store.backend_name

    @property
    def ids(self) -> list[str]:
        """All ids, in order."""
        return [image_id for entries in self._store.kept_entries() for _, image_id, _ in entries]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """All metadata, in order."""
        return [metadata for entries in self._store.kept_entries() for _, _, metadata in entries]

    @property
    def embeds(self) -> torch.Tensor:
        """All embeddings (N, q), in order, as they are stored."""
        return torch.cat([torch.empty(0, self.dim, dtype=self.dtype), *self._store.kept_rows()])

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that a build left out: "id", "source" and "reason" of each."""
        return self._store.skipped

    @property
    def image_root(self) -> Path | None:
        """The folder that relative paths in the metadata start from. Files below it may be read."""
        return self._access.image_root

    @image_root.setter
    def image_root(self, folder: str | os.PathLike[str] | None) -> None:
        self._access.image_root = None if folder is None else Path(folder)

    @property
    def image_loader(self) -> ImageLoader | None:
        """A function of an id and its metadata that returns a PIL image, a path, a URL or `{"bytes": ...}`."""
        return self._access.loader

    @image_loader.setter
    def image_loader(self, loader: ImageLoader | None) -> None:
        self._access.loader = loader

    def get(self, image_id: str) -> dict[str, Any]:
        """The metadata of one image. Raises a `KeyError` if there is no such image."""
        return self._store.find(image_id)[1]

    def load_image(self, image_id: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The image itself, as RGB: the one that the index keeps, or the one at its metadata's "url" or "path".

        For images that are elsewhere (in a database, say), set `image_loader`. Relative paths are relative to
        `image_root`. An index that was opened, from a folder or from the Hub, reads only files below its own folder and
        below the `image_root` that [`from_pretrained`] was given, so it cannot name any file of this machine.

        Raises:
            UnreadableImageError: It cannot be read, or may not.
            KeyError: There is no such image.
        """
        position, metadata = self._store.find(image_id)
        return self._access.load(image_id, metadata, self._store.images.get(position), limits)


__all__ = ["IndexContents", "IndexEntry"]
