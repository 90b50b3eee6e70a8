"""The contents of an index: embeddings, metadata and kept images, changed as a whole.

Axes: N images, n of them in a shard, q the width of the shared image-text space.
"""

import copy
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..image_ids_fromage import as_ids
from .backends import SearchBackend
from .backends.base import Hits, SearchRequest
from .backends.ranking import rows_at
from .images import KeptImage
from .metadata_store import MetadataStore
from .shards import Shard, appended
from .snapshot import Snapshot
from .values import as_entries, as_excluded, check_found, unit_embeds

Entry = tuple[int, str, dict[str, Any]]  # position, id, metadata


class IndexStore:
    """Embeddings and a backend in a snapshot, ids and metadata in a database, and the images that the index keeps.

    Changes hold a lock. What only reads takes `now`, which is replaced and never changed, and needs the lock if that
    must go together with the entries or images of the same moment.

    Args:
        dim (`int`): q.
        dtype (`torch.dtype`): Of the stored embeddings.
        now, entries, images: What is in it at first; nothing by default.

    Raises:
        ValueError: Embeddings are not stored in `dtype`.
    """

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype,
        now: Snapshot | None = None,
        entries: MetadataStore | None = None,
        images: dict[int, KeptImage] | None = None,
    ):
        check_dtype(dtype)
        self.dim, self.dtype, self.device = dim, dtype, torch.device("cpu")
        self.now = Snapshot() if now is None else now
        self.entries = MetadataStore() if entries is None else entries
        self.images: dict[int, KeptImage] = {**(images or {})}  # by position
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        with self.lock:
            # Two indexes must not write to one buffer, nor to one backend.
            shards = tuple(map(copy.copy, self.now.shards))
            now = dataclasses.replace(self.now, shards=shards, backend=self.now.backend.copy())
            state = {**self.__dict__, "now": now, "entries": self.entries.__getstate__(), "images": {**self.images}}
        del state["lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, entries=MetadataStore(), lock=threading.RLock())
        self.entries.__setstate__(state["entries"])

    # ---- reading --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.now.count - self.now.removed

    @property
    def backend_name(self) -> str:
        return self.now.backend.name

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that a build left out."""
        return self.entries.skipped

    def moment(self) -> tuple[Snapshot, dict[int, KeptImage], list[dict[str, str]]]:
        """Snapshot, kept images and skipped images of one moment."""
        with self.lock:
            return self.now, {**self.images}, self.entries.skipped

    def positions(self, ids: Any) -> dict[str, int]:
        """Position by id, of those of `ids` that are in the index. What is just being added is not in it yet."""
        count = self.now.count
        return {name: place for name, place in self.entries.positions(as_ids(ids)).items() if place < count}

    def find(self, image_id: str) -> tuple[int, dict[str, Any]]:
        """Position and metadata of one image.

        Raises:
            KeyError: The index has no such image.
        """
        position = next(iter(self.positions([image_id]).values()), None)
        if position is None:
            raise KeyError(f"The index has no image {image_id!r}.")
        return position, self.entries.at([position])[position][1]

    def kept_entries(self, now: Snapshot | None = None) -> Iterator[list[Entry]]:
        """The entries of the images that are kept, in order, a shard at a time; as they are now by default."""
        now = self.now if now is None else now
        for shard, start, kept in now.pieces():
            entries = self.entries.between(start, start + shard.count)
            if kept is not None:
                is_kept = kept.tolist()
                entries = [entry for entry in entries if is_kept[entry[0] - start]]
            count = shard.count if kept is None else int(kept.sum())
            if len(entries) != count:
                raise self.entries.error(f"{count} embeddings from position {start} on have {len(entries)} entries")
            yield entries

    def kept_rows(self) -> Iterator[torch.Tensor]:
        """The embeddings (n, q) that are kept, in order, a shard at a time."""
        return self.now.kept_rows()

    def pieces(self, now: Snapshot | None = None) -> Iterator[tuple[torch.Tensor, list[Entry]]]:
        """The same with their entries."""
        now = self.now if now is None else now
        return zip(now.kept_rows(), self.kept_entries(now), strict=True)

    def normalized(self, embeds: Any) -> torch.Tensor:
        """Embeddings (N, q) that a caller gave, in fp32, of unit norm."""
        return unit_embeds(embeds, self.dim)

    def request(self, embeds: Any, top_k: int, exclude_ids: Any, where: dict[str, Any] | None) -> SearchRequest:
        """What [`FromageImageIndex.search`] is asked for, of this moment."""
        queries = self.normalized(embeds)
        excluded, now = as_excluded(exclude_ids, len(queries)), self.now
        positions = [torch.empty(0, dtype=torch.long)] * len(queries)
        if any(excluded):
            with self.lock:  # an id that is deleted and added again between the two would be excluded in vain
                now, known = self.now, self.positions(sorted({image_id for ids in excluded for image_id in ids}))
            found = [sorted({known[image_id] for image_id in ids if image_id in known}) for ids in excluded]
            positions = [torch.tensor(places, dtype=torch.long) for places in found]
        return SearchRequest(queries, top_k, where, excluded, positions, now, self.entries)

    def search(self, embeds: Any, top_k: int, exclude_ids: Any, where: dict[str, Any] | None) -> Hits:
        """See [`FromageImageIndex.search`]."""
        request = self.request(embeds, top_k, exclude_ids, where)
        with torch.autocast(self.device.type, enabled=False):  # a caller's would make bf16 of the cosines
            return request.snapshot.backend.search(request)

    # ---- changing -------------------------------------------------------------------------------------------------

    def insert(
        self,
        pieces: Iterable[tuple[torch.Tensor, list[tuple[str, str]]]],
        images: dict[int, KeptImage] | None = None,
        skipped: Iterable[dict[str, str]] = (),
        replaces: list[int] | None = None,
    ) -> None:
        """Append embeddings with their (id, metadata as JSON): all or, after an error, none.

        Args:
            images: Kept images by their number among those that are appended.
            skipped: Images that were left out.
            replaces: Positions of images that are deleted at the same moment.
        """
        with self.lock:
            before = self.now
            now = before.without(replaces) if replaces else before
            try:
                with self.entries.transaction():
                    if replaces:
                        self._forget(replaces)
                    for rows, entries in pieces:
                        self.entries.add(now.count, entries)
                        now = now.grown(appended(now.shards, rows, self.device))
                        now.backend.add(rows, entries)
                    self.entries.skip((row["id"], row["source"], row["reason"]) for row in skipped)
            except BaseException:
                before.backend.restore(before.shards)
                raise
            for position in replaces or ():
                self.images.pop(position, None)
            self.images.update({before.count + number: image for number, image in (images or {}).items()})
            self.now = now

    def delete(self, ids: Any) -> None:
        """Remove images: all or, after an error, none."""
        with self.lock:
            positions = list(self._found(as_ids(ids), "removed").values())
            if positions:
                now = self.now.without(positions)
                with self.entries.transaction():
                    self._forget(positions)
                self.now = now
                for position in positions:
                    self.images.pop(position, None)

    def update(self, ids: Any, metadata: Any, embeds: Any) -> None:
        """Replace metadata or embeddings or both: of all `ids` or, after an error, of none."""
        names = as_ids(ids)
        if len(set(names)) < len(names):
            raise ValueError("An id occurs twice; nothing was updated.")
        with self.lock:
            places = self._found(names, "updated")
            positions = [places[name] for name in names]
            if embeds is None:
                rows = rows_at(self.now.shards, torch.tensor(positions)) if positions else torch.empty(0, self.dim)
            else:
                rows = self.normalized(embeds)
            if metadata is None:
                known = self.entries.at(positions)
                metadata = [known[position][1] for position in positions]
            entries = as_entries(names, metadata)
            if len(rows) != len(entries):
                raise ValueError(f"Got {len(rows)} embeddings for {len(entries)} ids.")
            images = {n: self.images[position] for n, position in enumerate(positions) if position in self.images}
            if positions:
                self.insert([(rows.to(self.dtype), entries)], images, replaces=positions)

    def _found(self, ids: list[str], done: str) -> dict[str, int]:
        found = self.positions(ids)
        check_found(ids, found, done)
        return found

    def _forget(self, positions: list[int]) -> None:
        known = self.entries.at(positions)
        self.entries.delete(positions)
        self.now.backend.delete([known[position][0] for position in positions])

    def use_backend(self, backend: SearchBackend) -> None:
        """Fill a backend, while the index is in use, and search with it from then on."""
        before = self.now
        backend.build(before, self.dim, self.entries)
        with self.lock:
            position = before.count
            for rows in self.now.rows_from(position):  # added in the meantime
                added = self.entries.between(position, position + len(rows))
                backend.add(rows, as_entries([name for _, name, _ in added], [values for _, _, values in added]))
                position += len(rows)
            self.now = dataclasses.replace(self.now, backend=backend)

    def set_search_options(self, **options: Any) -> None:
        """See [`FromageImageIndex.set_search_options`]."""
        self.now.backend.set_options(**options)

    def to(self, device: torch.device | str) -> None:
        """Move the embeddings to `device`."""
        with self.lock:
            self.device = torch.device(device)
            shards = tuple(shard.to(device) for shard in self.now.shards)
            self.now = dataclasses.replace(self.now, shards=shards)

    def into_memory(self, images: Iterable[tuple[str, KeptImage]]) -> None:
        """Let go of the files, and keep `images` by their ids; the first of an id is the one that is indexed."""
        shards = tuple(Shard(shard.count, shard.rows().clone()) for shard in self.now.shards)
        self.now = dataclasses.replace(self.now, shards=shards)
        self.entries.detach()
        for image_id, image in images:
            for position in self.positions([image_id]).values():
                self.images.setdefault(position, image)

    def images_moved(self, directory: Path, images: dict[int, KeptImage], moved: dict[int, Path]) -> None:
        """After a save into `directory` that wrote `images` into the files `moved`: use these where the old files were
        in the same folder, as they will be removed."""
        with self.lock:
            for position, path in moved.items():
                old = images[position]
                if (
                    isinstance(old, Path)
                    and self.images.get(position) is old
                    and old.parent.parent.resolve() == directory.resolve()
                ):
                    self.images[position] = path


def check_dtype(dtype: torch.dtype) -> None:
    """Raise a `ValueError` if embeddings are not stored in `dtype`."""
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"Embeddings are stored in torch.float32 or torch.float16, not {dtype}.")
