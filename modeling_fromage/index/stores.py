"""Where the contents of an index are: on this machine, or in Milvus; and how they get from one to the other."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .backends import make_backend
from .backends.milvus import MilvusCollection, MilvusOptions
from .images import KeptImage
from .milvus_store import MilvusStore, finish, unfinished_store
from .store import IndexStore
from .values import as_entries

Store = IndexStore | MilvusStore


def check_backend(name: str, options: dict[str, Any]) -> None:
    """Raise what [`FromageImageIndex.use_backend`] would about a name or options, before there is an index."""
    if name == MilvusStore.backend_name:
        MilvusCollection(MilvusOptions.of(options))
    else:
        make_backend(name, options)


def has_backend(store: Store, name: str, options: dict[str, Any]) -> bool:
    """Whether a store has this backend, and it need not be made for `options`."""
    if isinstance(store, MilvusStore):
        return name == store.backend_name and store.is_at(MilvusOptions.of(options))
    return name == store.backend_name and not options


def moves(store: Store, name: str) -> bool:
    """Whether a change to the backend `name` moves the contents, so that they may not be changed meanwhile."""
    return name == MilvusStore.backend_name or not isinstance(store, IndexStore)


def with_backend(store: Store, name: str, options: dict[str, Any]) -> Store:
    """The contents of `store` with another backend: `store` itself where it can have that one, else a new store.

    Raises:
        ValueError: See [`FromageImageIndex.use_backend`].
    """
    if name == MilvusStore.backend_name:
        new = unfinished_store(store.dim, store.dtype, MilvusOptions.of(options))
        try:
            extend(new, store)
        except BaseException:
            new.collection.drop()
            raise
        finish(new)
        return new
    backend = make_backend(name, options)
    store = on_this_machine(store)
    store.use_backend(backend)
    return store


def on_this_machine(store: Store) -> IndexStore:
    """`store` or, of contents in Milvus, a copy in memory."""
    if isinstance(store, IndexStore):
        return store
    copy = IndexStore(store.dim, store.dtype)
    extend(copy, store)
    return copy


def extend(store: Store, other: Store, root: str | None = None) -> None:
    """Append all of another store. Where its images have another root than this one's, `root` makes their paths
    absolute.

    Raises:
        ValueError: Their widths differ, an id is in both, or Milvus cannot hold what is in it.
    """
    if other.dim != store.dim:
        raise ValueError(f"Embeddings of width {other.dim} cannot be added to those of width {store.dim}.")
    now, kept, skipped = other.moment()
    images: dict[int, KeptImage] = {}

    def pieces() -> Iterator[tuple[torch.Tensor, list[tuple[str, str]]]]:
        number = itertools.count()
        for rows, entries in other.pieces(now):
            images.update({n: kept[p] for (p, _, _), n in zip(entries, number, strict=False) if p in kept})
            metadata = [with_root(values, root) for _, _, values in entries]
            # As they are: normalised again, they would be rounded again.
            yield rows, as_entries([image_id for _, image_id, _ in entries], metadata)

    if isinstance(store, IndexStore):
        store.insert(pieces(), images, skipped)
        return
    if kept:
        raise ValueError(
            f"The index keeps {len(kept)} images themselves, for which a collection of Milvus has no place. Save them "
            'as files, and give their "path" or "url" in the metadata.'
        )
    store.insert(pieces(), skipped)


def with_root(metadata: dict[str, Any], root: str | None) -> dict[str, Any]:
    path = metadata.get("path")
    return {**metadata, "path": str(Path(root) / path)} if root and isinstance(path, str) and path else metadata
