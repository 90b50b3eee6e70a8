"""An index of image embeddings, searched with `[RET]` embeddings.

Axes: N images, Q queries, k results a query, q the width of the shared image-text space.
"""

import contextlib
import copy
import dataclasses
import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from torch.nn import functional as F

from ..image_ids_fromage import as_ids
from ..images_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError, is_url, load_rgb_image
from .backends.faiss import FaissBackend
from .builder import ImageEmbedder, build_folder, is_built
from .files import INDEX_FILE, IndexWriter, listed_file, one_at_a_time, read_index_file
from .images import IMAGE_FOLDERS, Scrubber, kept_images, own_image, readable_file
from .search import search_faiss, search_flat
from .snapshot import Snapshot, appended
from .sources import ImageSource, image_sources
from .store import SHARD_ROWS, Entries, IndexFolder, Shard, crc32_of_file
from .values import as_embeds, as_entries, as_excluded

logger = logging.getLogger(__name__)
_QUERIES_AT_A_TIME = 256
_HUB_FILES = [INDEX_FILE, "embeds-*.safetensors", "entries-*.sqlite", "backend-*.faiss", f"{IMAGE_FOLDERS}/*.png"]


class FromageImageIndex:
    """Images by their unit-norm embeddings, with a string id and a metadata dict each.

    Threads may search, change and save one at once: each change is seen as a whole or not at all, and a search or a
    save that has begun is of the images that there were then.

    Args:
        embeds (`torch.Tensor` or `numpy.ndarray`): (N, q); normalised here.
        ids (`list[str]`): One unique id an image.
        metadata (`list[dict]`, *optional*): JSON-serialisable facts. A "path" or "url" lets [`load_image`] find the
            image.
        backend (`str`): `"flat"`, exact; or `"faiss"`, with `backend_options` as for [`use_backend`].
        dtype (`torch.dtype`): Of the stored embeddings: `torch.float32`, or `torch.float16` for half the size.
        model_fingerprint (`str`, *optional*): `model.retrieval_fingerprint()` of the model that made `embeds`.

    Raises:
        ValueError: Counts differ, an id occurs twice or is no string, JSON cannot hold the metadata, or an embedding is
            not finite.
    """

    def __init__(
        self,
        embeds: Any,
        ids: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        backend: str = "flat",
        dtype: torch.dtype = torch.float32,
        model_fingerprint: str | None = None,
        **backend_options: Any,
    ):
        embeds = as_embeds(embeds)
        self._start(embeds.shape[-1], dtype, model_fingerprint)
        self.add(embeds, ids, metadata)
        self.use_backend(backend, **backend_options)

    def _start(self, dim: int, dtype: torch.dtype, model_fingerprint: str | None):
        _check_dtype(dtype)
        self.dim, self.dtype, self.model_fingerprint = dim, dtype, model_fingerprint
        self.device = torch.device("cpu")
        self.image_root: Path | None = None
        self.image_loader: Callable[[str, dict[str, Any]], Any] | None = None
        self._folder: IndexFolder | None = None  # that it was opened from
        self._stored_root: str | None = None  # where that says that its images are
        self._may_read_files = True  # those that its metadata names: of an index made here, not of one that was opened
        self._now = Snapshot()
        self._entries = Entries()
        self._images: dict[int, Image.Image | Path] = {}  # by position: those that have neither path nor URL
        # Held while anything changes. What only reads takes `_now`, which is replaced and never changed, and needs the
        # lock where that must go together with the entries or images of the same moment.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            faiss = None if self._faiss is None else self._faiss.copy()
            # No two indexes may write to one buffer, which `copy.copy` would let them.
            now = dataclasses.replace(self._now, shards=tuple(map(copy.copy, self._now.shards)), faiss=faiss)
            state = {
                **self.__dict__,
                "_now": now,
                "_entries": self._entries.__getstate__(),
                "_images": {**self._images},
            }
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state, _entries=Entries(), _lock=threading.RLock())
        self._entries.__setstate__(state["_entries"])

    # ---- what is in it --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        now = self._now
        return now.count - now.removed

    def __contains__(self, image_id: str) -> bool:
        try:
            return bool(self._positions([image_id]))
        except ValueError:  # it is no id
            return False

    def _positions(self, ids: Any) -> dict[str, int]:
        """Of those of `ids` that there are; what is just being added is not there yet."""
        count = self._now.count
        return {name: place for name, place in self._entries.positions(as_ids(ids)).items() if place < count}

    def __repr__(self) -> str:
        return f"FromageImageIndex({len(self):,} images, {self.dim} dimensions, {self.dtype}, {self.backend})"

    @property
    def _faiss(self) -> FaissBackend | None:
        return self._now.faiss

    @property
    def backend(self) -> str:
        return "flat" if self._faiss is None else "faiss"

    @property
    def ids(self) -> list[str]:
        """All ids, in order."""
        return [image_id for entries in self._kept_entries(self._now) for _, image_id, _ in entries]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """All metadata, in order."""
        return [facts for entries in self._kept_entries(self._now) for _, _, facts in entries]

    @property
    def embeds(self) -> torch.Tensor:
        """All embeddings (N, q), in order, as they are stored."""
        return torch.cat([torch.empty(0, self.dim, dtype=self.dtype), *self._now.kept_rows()])

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that a build left out: "id", "source" and "reason" each."""
        return self._entries.skipped

    def _kept_entries(self, now: Snapshot) -> Iterator[list[tuple[int, str, dict[str, Any]]]]:
        """Position, id and metadata of the images that are kept, a shard at a time."""
        for shard, start, kept in now.pieces():
            entries = self._entries.between(start, start + shard.count)
            if kept is not None:
                is_kept = kept.tolist()
                entries = [entry for entry in entries if is_kept[entry[0] - start]]
            count = shard.count if kept is None else int(kept.sum())
            if len(entries) != count:
                raise self._entries.error(f"{count} embeddings from position {start} on have {len(entries)} entries")
            yield entries

    def get(self, image_id: str) -> dict[str, Any]:
        """The metadata of one image.

        Raises:
            KeyError: There is no such image.
        """
        return self._find(image_id)[1]

    def _find(self, image_id: str) -> tuple[int, dict[str, Any]]:
        """Position and metadata of one image."""
        position = next(iter(self._positions([image_id]).values()), None)
        if position is None:
            raise KeyError(f"The index has no image {image_id!r}.")
        return position, self._entries.at([position])[position][1]

    def load_image(self, image_id: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The image itself, as RGB, from memory, or from its metadata's "url" or "path".

        Where the images are elsewhere (in a `datasets` dataset, a database), set `image_loader`, a function of an id
        and its metadata that returns a PIL image, a path, a URL or `{"bytes": ...}`. Relative paths are relative to
        `image_root`. An index that was opened, from a folder or from the Hub, reads files below its own folder and
        below the `image_root` that [`from_pretrained`] was given, so that it cannot name any file of this machine.

        Raises:
            UnreadableImageError: It cannot be read, or may not.
            KeyError: There is no such image.
        """
        position, facts = self._find(image_id)
        image = self._images.get(position)
        if image is not None:
            return load_rgb_image(own_image(image) if isinstance(image, Path) else image, limits)
        if self.image_loader is not None:
            return load_rgb_image(self.image_loader(image_id, facts), limits)
        path = facts.get("path")
        if is_url(facts.get("url")):
            return load_rgb_image(facts["url"], limits)
        if not isinstance(path, str):
            raise UnreadableImageError(
                image_id, "no path or url in the index's metadata", "set the index's `image_loader` to say where it is"
            )
        if self._may_read_files:
            return load_rgb_image(Path(self.image_root or "") / path, limits)
        own = None if self._folder is None else self._folder.path
        root = None if self.image_root is None else Path(self.image_root)
        return load_rgb_image(readable_file(path, image_id, own, root, self._stored_root), limits)

    # ---- making it ------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        images: Any,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 32,
        save_directory: str | os.PathLike | None = None,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 8,
        limits: ImageLimits = DEFAULT_LIMITS,
        show_progress: bool = True,
        shard: tuple[int, int] | None = None,
        backend: str = "flat",
        **backend_options: Any,
    ) -> "FromageImageIndex":
        """Embed `images` with `model.get_image_embeds`, `batch_size` at a time.

        Args:
            images: A folder, a TSV or CSV file (columns "image" or "url"; "id" and others optional), a `datasets`
                dataset, or an iterable of PIL images, paths, URLs or rows like a table's. See [`image_sources`].
            ids, metadata: One an image, where `images` has none of its own. Ids default to the images' numbers.
            save_directory: Where the index is written as it grows. After a kill the same call goes on; once it is
                complete, the same call opens it.
            num_workers: Threads that read and preprocess images.
            limits: What an image may cost; see [`ImageLimits`].
            shard: (i, n) takes every n-th image from the i-th on, for n processes whose indexes are then merged.

        Images that cannot be read are left out; [`skipped`] lists them, and the log counts them by reason.

        Raises:
            ValueError: There is no image, or none that can be read, or `save_directory` holds another index.
        """
        _check_dtype(dtype)
        sources, total, root = image_sources(images, ids, metadata)
        if shard is not None:
            first, step = shard
            if not 0 <= first < step:
                raise ValueError(f"`shard` is (i, n) with i from 0 to n - 1, got {shard}.")
            sources = itertools.islice(sources, first, None, step)
            total = None if total is None else len(range(first, total, step))
        facts = {
            "dim": model.config.projection_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "model": model.retrieval_fingerprint(),
            "image_root": root,
            "may_read_files": True,
        }
        with contextlib.ExitStack() as stack:
            directory = Path(save_directory or stack.enter_context(tempfile.TemporaryDirectory()))
            in_memory = isinstance(images, (list, tuple))  # which the caller holds in any case
            if not is_built(directory, sources, facts):
                embed = ImageEmbedder(model, processor, limits)
                keep = in_memory and save_directory is not None
                build_folder(directory, facts, sources, total, embed, batch_size, num_workers, show_progress, keep)
            index = cls.from_pretrained(directory)
            index.image_root, index._may_read_files = None if root is None else Path(root), True  # as the caller says
            if save_directory is None:
                index._into_memory(image_sources(images, ids, metadata)[0] if in_memory else ())
        if backend != index.backend or backend_options:
            index.use_backend(backend, **backend_options)
            if save_directory is not None:
                progress = read_index_file(directory)[0]["progress"]
                index._save(save_directory, progress)  # still the index of these images to the next call
        return index

    def _into_memory(self, sources: Iterable[ImageSource]):
        """Let go of the files, which are temporary, and keep those images of `sources` that are in memory."""
        shards = tuple(Shard(shard.count, shard.rows().clone()) for shard in self._now.shards)
        self._now = dataclasses.replace(self._now, shards=shards)
        self._entries.detach()
        self._folder = None
        for source in sources:
            if isinstance(source.image, Image.Image):
                for position in self._positions([source.id]).values():
                    self._images.setdefault(position, source.image)  # of those with one id the first is indexed

    def add(self, embeds: Any, ids: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None):
        """Append images by their embeddings (N, q): all or, after an error, none; arguments and errors as for the
        class."""
        rows = self._normalized(embeds).to(self.dtype)
        entries = as_entries(ids, metadata)
        if len(rows) != len(entries):
            raise ValueError(f"Got {len(rows)} embeddings, {len(entries)} ids and {len(entries)} metadata entries.")
        self._insert([(rows, entries)])

    def _insert(
        self,
        pieces: Iterable[tuple[torch.Tensor, list[tuple[str, str]]]],
        images: dict[int, Image.Image | Path] | None = None,
        skipped: Iterable[tuple[str, str, str]] = (),
    ):
        """Append embeddings with their ids and metadata, and `images` by their numbers among them: all or none."""
        with self._lock:
            before = now = self._now
            try:
                with self._entries.transaction():
                    for rows, entries in pieces:
                        self._entries.add(now.count, entries)
                        now = now.grown(appended(now.shards, rows, self.device, SHARD_ROWS))
                    self._entries.skip(skipped)
                    if now.faiss is not None:
                        for rows in now.rows_from(before.count):
                            now.faiss.add(rows)
            except BaseException:
                if before.faiss is not None:
                    before.faiss.restore(before.shards)
                raise
            self._images.update({before.count + number: image for number, image in (images or {}).items()})
            self._now = now

    def add_images(self, model: Any, processor: Any, images: Any, **kwargs: Any):
        """Embed and append `images`; arguments as for [`build`].

        Raises:
            ValueError: `model` is not the one that made this index.
        """
        self.check_model(model)
        more = type(self).build(model, processor, images, dtype=self.dtype, **kwargs)
        self._append(more)

    def delete(self, ids: Sequence[str] | str):
        """Remove images: of one id, or of several.

        Raises:
            KeyError: One of `ids` is not in the index; then nothing is removed.
        """
        ids = as_ids(ids)
        with self._lock:
            found = self._positions(ids)
            missing = [image_id for image_id in ids if image_id not in found]
            if missing:
                raise KeyError(f"The index has no images {missing[:10]}; nothing was removed.")
            if not found:
                return
            positions = list(found.values())
            now = self._now.without(positions)
            self._entries.delete(positions)
            self._now = now
            for position in positions:
                self._images.pop(position, None)

    @classmethod
    def merge(cls, indexes: Sequence["FromageImageIndex | str | os.PathLike"]) -> "FromageImageIndex":
        """One index of all images of `indexes` (or their folders), in order: the shards of a build on many machines.

        Raises:
            ValueError: They are of different models, widths or dtypes, or an id occurs twice.
        """
        parts = [part if isinstance(part, cls) else cls.from_pretrained(part) for part in indexes]
        if not parts:
            raise ValueError("`merge` needs at least one index.")
        kinds = {(part.dim, part.dtype, part.model_fingerprint) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"Only indexes of one model and kind can be merged; got (width, dtype, model): {kinds}.")
        merged = cls.__new__(cls)
        merged._start(*kinds.pop())
        roots, stored = {part.image_root for part in parts}, {part._root() for part in parts}
        merged.image_root = roots.pop() if len(roots) == 1 else None
        merged._stored_root = stored.pop() if len(stored) == 1 else None
        for part in parts:
            merged._append(part)
        return merged

    def _root(self) -> str | None:
        """The folder that relative paths in the metadata start from, which is not to say that it may be read."""
        return self._stored_root if self.image_root is None else str(Path(self.image_root).absolute())

    def _append(self, other: "FromageImageIndex"):
        """Add all of another index, with absolute paths where its images are elsewhere than this one's."""
        if other.dim != self.dim:
            raise ValueError(f"Embeddings of width {other.dim} cannot be added to those of width {self.dim}.")
        with other._lock:
            now, kept, skipped = other._now, {**other._images}, other.skipped
        root = other._root()
        root = None if root == self._root() else root
        images: dict[int, Image.Image | Path] = {}

        def pieces() -> Iterator[tuple[torch.Tensor, list[tuple[str, str]]]]:
            number = itertools.count()
            for rows, entries in zip(now.kept_rows(), other._kept_entries(now), strict=True):
                images.update({n: kept[p] for (p, _, _), n in zip(entries, number, strict=False) if p in kept})
                metadata = [facts for _, _, facts in entries]
                if root is not None:
                    metadata = [_with_root(facts, root) for facts in metadata]
                # As they are: normalised again, they would be rounded again.
                yield rows, as_entries([image_id for _, image_id, _ in entries], metadata)

        with self._lock:
            self._insert(pieces(), images, ((row["id"], row["source"], row["reason"]) for row in skipped))
            self._may_read_files &= other._may_read_files

    # ---- searching ------------------------------------------------------------------------------------------------

    def use_backend(self, backend: str, **options: Any) -> "FromageImageIndex":
        """Search with another backend from now on.

        Args:
            backend: `"flat"` is exact. `"faiss"` takes `factory` (a string of `faiss.index_factory`, `"Flat"` by
                default), `nprobe` and `training_size`; see [`FaissBackend`].

        Raises:
            ValueError: The backend is not known, or cannot be trained on so few images.
        """
        if backend == "milvus":
            raise ValueError("backend='milvus' is not in this version; it has 'flat' and 'faiss'.")
        if backend not in ("flat", "faiss"):
            raise ValueError(f"Unknown backend {backend!r}; this version has 'flat' and 'faiss'.")
        if backend == "flat" and options:
            raise ValueError(f"The flat backend takes no options, got {sorted(options)}.")
        faiss, now = None, self._now
        if backend == "faiss":
            faiss = FaissBackend(**options)
            faiss.build(now.shards, self.dim)
        with self._lock:
            for rows in self._now.rows_from(now.count) if faiss else ():  # added while it was trained
                faiss.add(rows)
            self._now = dataclasses.replace(self._now, faiss=faiss)
        return self

    def to(self, device: torch.device | str) -> "FromageImageIndex":
        """Keep the embeddings on `device`, where the flat search then runs."""
        with self._lock:
            self.device = torch.device(device)
            shards = tuple(shard.to(device) for shard in self._now.shards)
            self._now = dataclasses.replace(self._now, shards=shards)
        return self

    def check_model(self, model: Any):
        """Raise a `ValueError` where `model` is not the one whose embeddings these are."""
        theirs = model.retrieval_fingerprint()
        if self.model_fingerprint is not None and theirs != self.model_fingerprint:
            raise ValueError(
                f"The index was made by the model {self.model_fingerprint}, not by this one ({theirs}): their "
                "embeddings cannot be compared. Load the model that made it, or build the index anew."
            )

    def search(
        self,
        embeds: Any,
        top_k: int = 1,
        exclude_ids: Sequence[str] | Sequence[Sequence[str]] | str | None = None,
        where: dict[str, Any] | None = None,
        model: Any = None,
    ) -> tuple[list[list[str]], torch.Tensor, list[list[dict[str, Any]]]]:
        """Nearest images of `embeds` (Q, q), a tensor or an array, by cosine.

        Args:
            exclude_ids: Ids never returned: one list for all queries, or one list a query; or a single id.
            where: Only images whose metadata has these values; a list means any of its values, and metadata that is a
                list has each of its items. Searched exactly, whatever the backend.
            model: The model that made `embeds`, to make sure that it is the index's.

        Returns:
            Ids, one list of k a query; cosines (Q, k); metadata likewise. Ties rank by position in the index. Where
            `where` leaves a query fewer than `top_k` images, its lists are of those that there are; then k is the
            length of the longest list, and shorter ones have cosines of -inf at their end.

        Raises:
            ValueError: `top_k` is less than 1 or, without `where`, more than the number of images left; a query is not
                finite or of another width; or `model` is not the index's.
            CorruptIndexError: A file of the index is damaged.
            ReplacedIndexError: Another index was saved into its folder before this one's files were all opened.
        """
        if model is not None:
            self.check_model(model)
        queries = self._normalized(embeds)
        now, banned = self._with_excluded(exclude_ids, len(queries))
        allowed = now.kept
        if where:
            allowed = torch.zeros(now.count, dtype=torch.bool)
            allowed[self._entries.matching(where, now.count)] = True
            allowed = allowed if now.kept is None else allowed & now.kept
        counts = [len(rows) if allowed is None else int(allowed[rows].sum()) for rows in banned]
        available = int(allowed.sum()) if where else now.count - now.removed
        if not 1 <= top_k <= (top_k if where else available - max(counts, default=0)):
            raise ValueError(
                f"`top_k` is {top_k}, but the index has {max(available - max(counts, default=0), 0)} images to choose "
                f"from (of {now.count - now.removed})."
            )
        top_k = min(top_k, available - min(counts, default=0))
        scores, positions = [torch.empty(0, top_k)], []
        for start in range(0, len(queries) if top_k else 0, _QUERIES_AT_A_TIME):
            piece = slice(start, start + _QUERIES_AT_A_TIME)
            several = (now.shards, queries[piece], top_k, banned[piece], allowed)
            found = search_flat(*several) if now.faiss is None or where else search_faiss(now.faiss, *several)
            scores.append(found[0])
            positions += found[1].tolist()
        scores = torch.cat(scores) if top_k else torch.empty(len(queries), 0)
        if where:
            lengths = (available - count for count in counts)
            positions = [row[:length] for row, length in zip(positions or [[]] * len(queries), lengths, strict=True)]
        entries = self._entries.at(sorted({position for row in positions for position in row}))
        ids = [[entries[position][0] for position in row] for row in positions]
        return ids, scores, [[entries[position][1] for position in row] for row in positions]

    def _normalized(self, embeds: Any) -> torch.Tensor:
        return F.normalize(as_embeds(embeds, self.dim), dim=-1)

    def _with_excluded(self, exclude_ids: Any, count: int) -> tuple[Snapshot, list[torch.LongTensor]]:
        """What there is, and the positions of excluded images in it, for each of `count` queries."""
        lists = as_excluded(exclude_ids, count)
        if not any(lists):
            return self._now, [torch.empty(0, dtype=torch.long)] * count
        with self._lock:  # an id that is deleted and added again between the two would be excluded in vain
            now, known = self._now, self._positions(sorted({image_id for ids in lists for image_id in ids}))
        return now, [torch.tensor(sorted({known[i] for i in ids if i in known}), dtype=torch.long) for ids in lists]

    # ---- keeping it -----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike):
        """Write the index into a folder, images in memory included. An index that is there stays whole until the new
        one is."""
        self._save(save_directory)

    def _save(
        self, directory: str | os.PathLike, progress: dict[str, Any] | None = None, scrub: Scrubber | None = None
    ):
        """Write it as it is now, whatever is changed meanwhile; `scrub` is for what is published."""
        with self._lock:
            now, images, skipped = self._now, {**self._images}, self.skipped
        image_root = self._stored_root if self.image_root is None else str(Path(self.image_root).resolve())
        facts = {
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": self.model_fingerprint,
            "image_root": None if scrub else image_root,
            "may_read_files": self._may_read_files,
        }
        with one_at_a_time(directory):
            writer, moved = IndexWriter(directory, facts, progress=progress), {}
            for rows, entries in zip(now.kept_rows(), self._kept_entries(now), strict=True):
                for number, (position, _, _) in enumerate(entries, writer.count):
                    if position in images:
                        moved[position] = writer.keep_image(number, images[position])
                metadata = [facts if scrub is None else scrub(facts) for _, _, facts in entries]
                writer.add(rows, [image_id for _, image_id, _ in entries], metadata)
            rows = [(row["id"], row["source"], row["reason"]) for row in skipped]
            writer.entries.skip(rows if scrub is None else [tuple(scrub(row, is_path=True)) for row in map(list, rows)])
            self._move_images(writer.directory, images, moved)
            self._finish(writer, now)

    def _move_images(self, directory: Path, images: dict[int, Image.Image | Path], moved: dict[int, Path]):
        """Of the images that are kept in `directory`, take the new files from now on: the old ones will be removed."""
        with self._lock:
            for position, path in moved.items():
                old = images[position]
                is_same = isinstance(old, Path) and self._images.get(position) is old
                if is_same and old.parent.parent.resolve() == directory.resolve():
                    self._images[position] = path

    def _finish(self, writer: IndexWriter, now: Snapshot):
        """Add the FAISS index to what was written."""
        if now.faiss is None:
            writer.finish()
            return
        temporary, faiss = writer.directory / "backend.tmp", now.faiss
        if now.removed or not faiss.save(temporary, now.count):  # positions move up, or images were added meanwhile
            faiss = FaissBackend(**faiss.options)
            try:
                faiss.build([Shard(len(rows), rows) for rows in now.kept_rows()], self.dim)
            except ValueError as error:  # the images are not to be lost for it
                logger.warning("Saved without its FAISS index: %s", error)
                writer.finish()
                return
            faiss.save(temporary, now.count - now.removed)
        crc32 = crc32_of_file(temporary)
        path = writer.directory / f"backend-{crc32:08x}.faiss"
        os.replace(temporary, path)
        listed = {"file": path.name, "bytes": path.stat().st_size, "crc32": crc32, "options": faiss.options}
        writer.finish({"faiss": listed}, files=[path.name])

    @classmethod
    def from_pretrained(
        cls,
        index_name_or_path: str | os.PathLike,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        repo_type: str = "dataset",
    ) -> "FromageImageIndex":
        """Open what [`save_pretrained`], [`build`] or [`push_to_hub`] wrote: a folder, or a repository of the Hub.

        Embeddings, ids and metadata stay in their files; each file is checked when it is first used. Whoever wrote an
        index could write anything: it is not taken at its word about where its images are.

        Args:
            image_root: The folder that metadata's relative "path"s are in. Images below it may be read, and those in
                the index's own folder; see [`load_image`].

        Raises:
            FileNotFoundError: The folder holds no finished index.
            CorruptIndexError: A file is missing or of another size.
        """
        directory = Path(index_name_or_path)
        if not directory.is_dir() and (directory.is_absolute() or len(directory.parts) > 2):
            raise FileNotFoundError(f"There is no folder {directory}, and it is no repository's name (org/name).")
        if not directory.is_dir():
            directory = Path(
                snapshot_download(
                    str(index_name_or_path), repo_type=repo_type, revision=revision, token=token, cache_dir=cache_dir,
                    allow_patterns=_HUB_FILES,
                )
            )  # fmt: skip
        state, shards, entries, folder = read_index_file(directory)
        index = cls.__new__(cls)
        index._start(state["dim"], getattr(torch, state["dtype"]), state["model"])
        faiss = None
        if state.get("faiss"):
            file = listed_file(folder, state["faiss"])
            faiss = FaissBackend.from_file(file, state["count"], state["dim"], state["faiss"]["options"])
        index._now = Snapshot(tuple(shards), state["count"], faiss=faiss)
        index._entries, index._folder, index._stored_root = entries, folder, state["image_root"]
        kept = kept_images(directory, state)
        index._images = {position: path for position, path in kept.items() if position < state["count"]}
        index._may_read_files = False
        index.image_root = None if image_root is None else Path(image_root)
        return index

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload image index",
        repo_type: str = "dataset",
    ) -> str:
        """Upload the index in one commit, in the place of the one that is there; returns the commit's address.

        Of absolute paths in the metadata the file's name alone is published, and this machine's folders are cut out of
        all its texts.

        Raises:
            ValueError: An id is a path of this machine.
        """
        api = HfApi(token=token)
        scrub = Scrubber([self._root(), self.image_root and Path(self.image_root).resolve()])
        paths = [image_id for image_id in self.ids if scrub(image_id) != image_id]
        if paths:
            raise ValueError(
                f"Ids that are paths of this machine would be published: {paths[:5]}. Give the images other ids."
            )
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, scrub=scrub)  # folders of this machine are of no one else's concern
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, repo_type=repo_type, revision=revision,
                commit_message=commit_message, delete_patterns=_HUB_FILES[1:],
            )  # fmt: skip
        return commit.commit_url


def _with_root(facts: dict[str, Any], root: str) -> dict[str, Any]:
    path = facts.get("path")
    return {**facts, "path": str(Path(root) / path)} if isinstance(path, str) and path else facts


def _check_dtype(dtype: torch.dtype):
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"Embeddings are stored in torch.float32 or torch.float16, not {dtype}.")


__all__ = ["FromageImageIndex"]
