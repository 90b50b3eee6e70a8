"""The contents of an index that are in a collection of Milvus, which alone is the truth about them.

Axes: N images, n of them in a piece, Q queries, k results a query, q the width of the shared image-text space.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..image_ids_fromage import as_ids
from .backends.base import Hits
from .backends.milvus import (
    EMBEDDING,
    FACTS,
    ID,
    METADATA,
    MOST_HITS,
    POSITION,
    MilvusCollection,
    MilvusOptions,
    filter_expression,
    is_file,
    key_of,
    make_row,
)
from .backends.ranking import SPARE, cosines
from .images import KeptImage
from .shards import LONGEST_ROW
from .values import as_entries, as_excluded, check_found, unit_embeds

logger = logging.getLogger(__name__)
Entry = tuple[int, str, dict[str, Any]]  # position, id, metadata
_ROWS_AT_A_TIME = 1000
_ANSWER_BYTES = 1 << 25  # of embeddings, of one search
_UNFINISHED = "_unfinished"  # at the end of the name of a collection that is being filled for the first time


class MilvusStore:
    """What [`IndexStore`] is for an index of this machine. Positions grow with time, and are not counted from 0.

    Whatever was added, and not refused, is in the collection: there is nothing to save but the header. Other processes
    may search and change the collection as well; two that add one id at the same moment leave one image of it.

    Args:
        dim (`int`): q.
        dtype (`torch.dtype`): Of the embeddings, which are rounded to it; the collection holds fp32.
        options ([`MilvusOptions`]): Where the collection is.
        skipped (`list[dict]`): Images that a build left out.
    """

    backend_name = "milvus"
    device = torch.device("cpu")

    def __init__(self, dim: int, dtype: torch.dtype, options: MilvusOptions, skipped: Iterable[dict[str, str]] = ()):
        self.dim, self.dtype, self.skipped = dim, dtype, list(skipped)
        self.collection = MilvusCollection(options)
        self.images: dict[int, KeptImage] = {}  # always empty: a collection has no place for them
        self.lock = threading.RLock()
        self._last_position = 0

    @property
    def options(self) -> MilvusOptions:
        return self.collection.options

    def is_at(self, options: MilvusOptions) -> bool:
        """Whether this is the collection that `options` describe, whatever the token."""
        return dataclasses.replace(self.options, token=None) == dataclasses.replace(options, token=None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def __copy__(self) -> "MilvusStore":
        raise ValueError(
            "An index in Milvus is not copied: both would change one collection. Open it again with `from_pretrained`, "
            "or take its contents out of Milvus with `use_backend('flat')`."
        )

    # ---- reading --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.collection.count()

    def moment(self) -> tuple[None, dict[int, KeptImage], list[dict[str, str]]]:
        """As of [`IndexStore`], but no snapshot: what is read later is as it is then."""
        return None, {}, [*self.skipped]

    def positions(self, ids: Any) -> dict[str, int]:
        """Position by id, of those of `ids` that are in the index."""
        names = {key_of(name): name for name in as_ids(ids)}
        return {names[key]: row[POSITION] for key, row in self.collection.rows(list(names), [POSITION]).items()}

    def find(self, image_id: str) -> tuple[int, dict[str, Any]]:
        """Position and metadata of one image.

        Raises:
            KeyError: The index has no such image.
        """
        rows = self.collection.rows(list(map(key_of, as_ids([image_id]))), [POSITION, METADATA])
        for row in rows.values():
            return row[POSITION], row[METADATA]
        raise KeyError(f"The index has no image {image_id!r}.")

    def _in_order(self, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
        """The `fields` of all rows in order, some at a time. What is deleted meanwhile is left out."""
        known = [np.empty(0, dtype=[("position", "i8"), ("key", "S32")])]  # 40 bytes an image
        known += (np.array(some, dtype=known[0].dtype) for some in self.collection.positions())
        keys = np.sort(np.concatenate(known), order="position")["key"].astype(str)
        for start in range(0, len(keys), _ROWS_AT_A_TIME):
            some = keys[start : start + _ROWS_AT_A_TIME].tolist()
            rows = self.collection.rows(some, fields)
            yield [rows[key] for key in some if key in rows]

    def kept_entries(self) -> Iterator[list[Entry]]:
        """All entries in order, some at a time."""
        for rows in self._in_order([ID, POSITION, METADATA]):
            yield [(row[POSITION], row[ID], row[METADATA]) for row in rows]

    def kept_rows(self) -> Iterator[torch.Tensor]:
        """All embeddings in order, (n, q) at a time."""
        return (rows for rows, _ in self.pieces())

    def pieces(self, now: object = None) -> Iterator[tuple[torch.Tensor, list[Entry]]]:
        """All embeddings (n, q) in order, with their entries, some at a time."""
        for rows in self._in_order([ID, POSITION, METADATA, EMBEDDING]):
            yield self._embeds(rows).to(self.dtype), [(row[POSITION], row[ID], row[METADATA]) for row in rows]

    def _embeds(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """The embeddings (n, q) of rows.

        Raises:
            MilvusIndexError: They are not of unit norm. NaN and longer ones would come first in every search.
        """
        embeds = torch.tensor(np.array([row[EMBEDDING] for row in rows], dtype=np.float32)).reshape(-1, self.dim)
        if not bool((torch.linalg.vector_norm(embeds, dim=-1) <= LONGEST_ROW).all()):
            raise self.collection.error("it holds embeddings that are not finite or not of unit norm")
        return embeds

    def normalized(self, embeds: Any) -> torch.Tensor:
        """Embeddings (N, q) that a caller gave, in fp32, of unit norm."""
        return unit_embeds(embeds, self.dim)

    def search(self, embeds: Any, top_k: int, exclude_ids: Any, where: dict[str, Any] | None) -> Hits:
        """See [`FromageImageIndex.search`]."""
        queries = self.normalized(embeds)
        excluded = as_excluded(exclude_ids, len(queries))
        if not 1 <= top_k <= MOST_HITS:
            raise ValueError(f"`top_k` is {top_k}; Milvus finds 1 to {MOST_HITS:,} images a query.")
        alike: dict[tuple[str, ...], list[int]] = {}  # queries by the ids that they exclude
        for number, ids in enumerate(excluded):
            alike.setdefault(tuple(sorted(set(ids))), []).append(number)
        ranked: list[list[tuple[float, dict[str, Any]]]] = [[] for _ in queries]
        limit = min(top_k + SPARE, MOST_HITS)
        step = max(1, _ANSWER_BYTES // (4 * self.dim * limit))
        for names, numbers in alike.items():
            expression = filter_expression(where, names)
            for start in range(0, len(numbers) if expression is not None else 0, step):
                some = numbers[start : start + step]
                hits = self.collection.search(queries[some], limit, expression or "")
                for number, rows in zip(some, hits, strict=True):
                    ranked[number] = self._ranked(queries[number], rows, top_k)
        if not where:
            self._check_found(top_k, ranked, excluded)
        longest = max(map(len, ranked), default=0)
        scores = [[score for score, _ in row] + [-torch.inf] * (longest - len(row)) for row in ranked]
        return Hits(
            [[row[ID] for _, row in found] for found in ranked],
            torch.tensor(scores, dtype=torch.float32).reshape(len(queries), longest),
            [[row[METADATA] for _, row in found] for found in ranked],
        )

    def _ranked(self, query: torch.Tensor, rows: list[dict[str, Any]], k: int) -> list[tuple[float, dict[str, Any]]]:
        """The k best rows by their cosines with a query (q,), computed as those of other backends; equal ones by
        position."""
        scores = cosines(query[None], self._embeds(rows)[None])[0].tolist()
        return sorted(zip(scores, rows, strict=True), key=lambda found: (-found[0], found[1][POSITION]))[:k]

    def _check_found(self, top_k: int, ranked: list[list[Any]], excluded: list[list[str]]) -> None:
        """Raise a `ValueError` if a query without a filter found fewer images than it was asked for."""
        short = next((number for number, found in enumerate(ranked) if len(found) < top_k), None)
        if short is None:
            return
        left = len(self) - len(self.positions(excluded[short]) if excluded[short] else ())
        if left < top_k:
            raise ValueError(f"`top_k` is {top_k}, but the index has {left} images to choose from (of {len(self)}).")
        raise ValueError(
            f"The {self.options.index_type} index found {len(ranked[short])} of {top_k} images for a query. Let it "
            f"search more, with `set_search_options`: nprobe or ef; they are {self.options.search_params}."
        )

    # ---- changing -------------------------------------------------------------------------------------------------

    def insert(
        self,
        pieces: Iterable[tuple[torch.Tensor, list[tuple[str, str]]]],
        skipped: Iterable[dict[str, str]] = (),
    ) -> None:
        """Append embeddings with their (id, metadata as JSON): all or, after an error, none. A kill leaves those that
        Milvus has acknowledged, a few megabytes at a time."""
        with self.lock:
            done: list[str] = []
            new: set[str] = set()
            try:
                for rows, entries in pieces:
                    names = [name for name, _ in entries]
                    if len(new | set(names)) < len(new) + len(names) or self.positions(names):
                        raise ValueError("Image ids must be unique; at least one occurs twice.")
                    new.update(names)
                    self.collection.put(self._new_rows(rows, entries), done)
            except BaseException:
                self.collection.delete(done)
                raise
            self.skipped += skipped

    def _new_rows(self, embeds: torch.Tensor, entries: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Rows at new positions; all are made, or refused, before the first is sent."""
        first = max(time.time_ns(), self._last_position + 1)  # after those of other processes, too
        self._last_position = first + len(entries) - 1
        embeds = embeds.to(self.dtype).float()
        return [
            make_row(name, position, row, metadata)
            for position, (row, (name, metadata)) in enumerate(zip(embeds, entries, strict=True), first)
        ]

    def delete(self, ids: Any) -> None:
        """Remove images: all or, after an error, none."""
        with self.lock:
            names = as_ids(ids)
            check_found(names, self.positions(names), "removed")
            self.collection.delete(list(map(key_of, names)))

    def update(self, ids: Any, metadata: Any, embeds: Any) -> None:
        """Replace metadata or embeddings or both: of all `ids` or, after an error, of none."""
        names = as_ids(ids)
        if len(set(names)) < len(names):
            raise ValueError("An id occurs twice; nothing was updated.")
        with self.lock:
            check_found(names, self.positions(names), "updated")
            keys = list(map(key_of, names))
            before = self.collection.rows(keys, [ID, POSITION, METADATA, EMBEDDING, FACTS])
            old = [before[key] for key in keys]
            rows = self._embeds(old) if embeds is None else self.normalized(embeds)
            entries = as_entries(names, [row[METADATA] for row in old] if metadata is None else metadata)
            if len(rows) != len(entries):
                raise ValueError(f"Got {len(rows)} embeddings for {len(entries)} ids.")
            new, done = self._new_rows(rows, entries), list[str]()
            try:
                self.collection.put(new, done, replace=True)
            except BaseException:
                self.collection.put((before[key] for key in done), [], replace=True)
                raise

    def set_search_options(self, **options: Any) -> None:
        """Change how the collection's index is searched: `nprobe`, `ef`."""
        params = {**self.options.search_params, **options}
        self.collection.options = dataclasses.replace(self.options, search_params=params)

    def to(self, device: torch.device | str) -> None:
        """Refuse any other device."""
        if torch.device(device) != self.device:
            raise ValueError(f"An index in Milvus is searched where that runs, not on {device}.")


def unfinished_store(dim: int, dtype: torch.dtype, options: MilvusOptions) -> MilvusStore:
    """A new collection under another name, which [`finish`] gives the right one: whoever opens it finds all of it.

    Raises:
        ValueError: There is a collection of that name.
    """
    if MilvusCollection(options).exists():
        token = ", token=..." if options.token else ""
        raise ValueError(
            f"There is a collection {options.collection!r} at {options.uri}. If it is the index, open the folder that "
            "it was saved in; else give another name as `collection`. If no folder names it, as after a run that was "
            "killed before it wrote one, drop it: pymilvus.MilvusClient("
            f"{options.uri!r}{token}).drop_collection({options.collection!r})"
        )
    store = MilvusStore(dim, dtype, dataclasses.replace(options, collection=options.collection + _UNFINISHED))
    if store.collection.exists():
        logger.warning("An unfinished %s was left there; it is made anew.", store.options.collection)
        store.collection.drop()
    store.collection.create(dim)
    return store


def finish(store: MilvusStore) -> None:
    """Give an unfinished collection its own name."""
    store.collection.flush()
    store.collection.rename(store.options.collection.removesuffix(_UNFINISHED))


def header_of(store: MilvusStore, directory: Path) -> dict[str, Any]:
    """What the folder `directory` is to say about the collection. A file below it is named relative to it."""
    options = {field.name: getattr(store.options, field.name) for field in dataclasses.fields(store.options)}
    del options["token"]
    if store.options.is_file:
        file, folder = Path(store.options.uri), directory.resolve()
        options["uri"] = str(file.relative_to(folder) if file.is_relative_to(folder) else file)
    return {"milvus": options, "skipped": store.skipped}


def open_store(directory: Path, state: dict[str, Any], token: str | None) -> MilvusStore:
    """The collection that [`header_of`] wrote about in the folder `directory`.

    Raises:
        MilvusIndexError: It is not there, or is another one's.
        ValueError: It is not as `header_of` writes it.
    """
    uri = state["milvus"]["uri"]
    if is_file(uri):
        uri = directory / uri
    options = MilvusOptions.of({**state["milvus"], "uri": uri, "token": token})
    store = MilvusStore(state["dim"], getattr(torch, state["dtype"]), options, state["skipped"])
    store.collection.open(store.dim)
    return store


__all__ = ["MilvusStore", "finish", "header_of", "open_store", "unfinished_store"]
