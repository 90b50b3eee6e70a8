"""An index of image embeddings, searched with `[RET]` embeddings.

Axes: N images, Q queries, k results a query, q the width of the shared image-text space.
"""

import contextlib
import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from torch.nn import functional as F

from .faiss_fromage import FaissBackend
from .fetching_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError, is_url
from .images_fromage import load_rgb_image
from .index_builder_fromage import ImageEmbedder, build_folder, is_built
from .index_files_fromage import INDEX_FILE, IndexWriter, listed_file, read_index_file
from .index_search_fromage import search_faiss, search_flat
from .index_sources_fromage import image_sources
from .index_storage_fromage import SHARD_ROWS, Entries, Shard, check_file, crc32_of_file

logger = logging.getLogger(__name__)
_QUERIES_AT_A_TIME = 256
_HUB_FILES = [INDEX_FILE, "embeds-*.safetensors", "entries-*.sqlite", "backend-*.faiss"]


class FromageImageIndex:
    """Images by their unit-norm embeddings, with a string id and a metadata dict each.

    Args:
        embeds (`torch.Tensor`): (N, q); normalised here.
        ids (`list[str]`): One unique id an image.
        metadata (`list[dict]`, *optional*): JSON-serialisable facts. A "path" or "url" lets [`load_image`] find the
            image.
        backend (`str`): `"flat"`, exact; or `"faiss"`, with `backend_options` as for [`use_backend`].
        dtype (`torch.dtype`): Of the stored embeddings: `torch.float32`, or `torch.float16` for half the size.
        model_fingerprint (`str`, *optional*): `model.retrieval_fingerprint()` of the model that made `embeds`.

    Raises:
        ValueError: Counts differ, an id occurs twice, or an embedding is not finite.
    """

    def __init__(
        self,
        embeds: torch.Tensor,
        ids: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        backend: str = "flat",
        dtype: torch.dtype = torch.float32,
        model_fingerprint: str | None = None,
        **backend_options: Any,
    ):
        self._start(embeds.shape[-1], dtype, model_fingerprint)
        self.add(embeds, ids, metadata)
        self.use_backend(backend, **backend_options)

    def _start(self, dim: int, dtype: torch.dtype, model_fingerprint: str | None):
        _check_dtype(dtype)
        self.dim, self.dtype, self.model_fingerprint = dim, dtype, model_fingerprint
        self.device = torch.device("cpu")
        self.image_root: Path | None = None
        self.image_loader: Callable[[str, dict[str, Any]], Any] | None = None
        self._may_read_files = True
        self._count = 0  # positions, deleted ones included
        self._shards: list[Shard] = []
        self._added: list[torch.Tensor] = []  # not in a shard yet
        self._deleted: torch.BoolTensor | None = None
        self._entries = Entries()
        self._images: dict[str, Image.Image] = {}  # those that have neither path nor URL
        self._faiss: FaissBackend | None = None
        self._faiss_file: dict[str, Any] | None = None
        self._lock = threading.RLock()  # a server's threads search at once

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state, _lock=threading.RLock())

    # ---- what is in it --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._count - (0 if self._deleted is None else int(self._deleted.sum()))

    def __contains__(self, image_id: str) -> bool:
        return bool(self._entries.positions([image_id]))

    def __repr__(self) -> str:
        return f"FromageImageIndex({len(self):,} images, {self.dim} dimensions, {self.dtype}, {self.backend})"

    @property
    def backend(self) -> str:
        return "flat" if self._faiss is None else "faiss"

    @property
    def ids(self) -> list[str]:
        """All ids, in order."""
        return [image_id for _, image_id, _ in self._entries]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """All metadata, in order."""
        return [facts for _, _, facts in self._entries]

    @property
    def embeds(self) -> torch.Tensor:
        """All embeddings (N, q), in order, as they are stored."""
        return torch.cat([torch.empty(0, self.dim, dtype=self.dtype), *self._kept_rows()])

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that a build left out: "id", "source" and "reason" each."""
        return self._entries.skipped

    def get(self, image_id: str) -> dict[str, Any]:
        """The metadata of one image.

        Raises:
            KeyError: There is no such image.
        """
        positions = self._entries.positions([image_id])
        if image_id not in positions:
            raise KeyError(f"The index has no image {image_id!r}.")
        return self._entries.at([positions[image_id]])[positions[image_id]][1]

    def load_image(self, image_id: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The image itself, as RGB, from memory, or from its metadata's "url" or "path".

        Where the images are elsewhere (in a `datasets` dataset, a database), set `image_loader`, a function of an id
        and its metadata that returns a PIL image, a path, a URL or `{"bytes": ...}`. Relative paths are relative to
        `image_root`. An index from the Hub reads files below an `image_root` alone, so that it cannot name any file of
        this machine.

        Raises:
            UnreadableImageError: It cannot be read, or may not.
            KeyError: There is no such image.
        """
        if image_id in self._images:
            return load_rgb_image(self._images[image_id], limits)
        facts = self.get(image_id)
        if self.image_loader is not None:
            return load_rgb_image(self.image_loader(image_id, facts), limits)
        path = facts.get("path")
        if is_url(facts.get("url")):
            return load_rgb_image(facts["url"], limits)
        if not isinstance(path, str):
            raise UnreadableImageError(
                image_id, "no path or url in the index's metadata", "set the index's `image_loader` to say where it is"
            )
        found = Path(path) if self.image_root is None else self.image_root / path
        if not self._may_read_files:
            root = None if self.image_root is None else self.image_root.resolve()
            if root is None or not found.resolve().is_relative_to(root):
                raise UnreadableImageError(
                    image_id, "local files are refused", "the index is from the Hub; set `image_root` to allow a folder"
                )
        return load_rgb_image(found, limits)

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
            if not is_built(directory, sources, facts):
                embed = ImageEmbedder(model, processor, limits)
                build_folder(directory, facts, sources, total, embed, batch_size, num_workers, show_progress)
            index = cls.from_pretrained(directory)
            if save_directory is None:
                index._into_memory()
        if save_directory is None and isinstance(images, (list, tuple)):  # which the caller holds in any case
            for source in image_sources(images, ids, metadata)[0]:
                if isinstance(source.image, Image.Image) and source.id in index:
                    index._images.setdefault(source.id, source.image)  # of those with one id the first is indexed
        if backend != index.backend or backend_options:
            index.use_backend(backend, **backend_options)
            if save_directory is not None:
                progress = read_index_file(directory)[0]["progress"]
                index._save(save_directory, root, progress)  # still the index of these images to the next call
        return index

    def _into_memory(self):
        """Let go of the files, which are temporary."""
        self._shards = [Shard(shard.count, shard.rows().clone()) for shard in self._shards]
        self._entries.detach()

    def add(self, embeds: torch.Tensor, ids: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None):
        """Append images by their embeddings (N, q); arguments and errors as for the class."""
        metadata = [{} for _ in ids] if metadata is None else list(metadata)
        if not len(embeds) == len(ids) == len(metadata):
            raise ValueError(f"Got {len(embeds)} embeddings, {len(ids)} ids and {len(metadata)} metadata entries.")
        self._add_rows(self._normalized(embeds).to(self.dtype), ids, metadata)

    def _add_rows(self, rows: torch.Tensor, ids: Sequence[str], metadata: Sequence[dict[str, Any]]):
        faiss = None if self._faiss is None else self._loaded_faiss()
        self._entries.add(self._count, ids, metadata)
        self._added.append(rows)
        self._count += len(rows)
        if self._deleted is not None:
            self._deleted = F.pad(self._deleted, (0, len(rows)))
        if faiss is not None:
            faiss.add(rows)

    def add_images(self, model: Any, processor: Any, images: Any, **kwargs: Any):
        """Embed and append `images`; arguments as for [`build`].

        Raises:
            ValueError: `model` is not the one that made this index.
        """
        self.check_model(model)
        more = type(self).build(model, processor, images, dtype=self.dtype, **kwargs)
        self._append(more, absolute=more.image_root != self.image_root)

    def delete(self, ids: Sequence[str]):
        """Remove images.

        Raises:
            KeyError: One of `ids` is not in the index; then nothing is removed.
        """
        positions = self._entries.positions(ids)
        missing = [image_id for image_id in ids if image_id not in positions]
        if missing:
            raise KeyError(f"The index has no images {missing[:10]}; nothing was removed.")
        if self._deleted is None:
            self._deleted = torch.zeros(self._count, dtype=torch.bool)
        self._deleted[list(positions.values())] = True
        self._entries.delete(list(positions.values()))
        for image_id in positions:
            self._images.pop(image_id, None)

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
        roots = {part.image_root for part in parts}
        merged.image_root = roots.pop() if len(roots) == 1 else None
        for part in parts:
            merged._append(part, absolute=part.image_root != merged.image_root)
        return merged

    def _append(self, other: "FromageImageIndex", absolute: bool):
        """Add all of another index, with `absolute` paths where its `image_root` is not this one's."""
        if other.dim != self.dim:
            raise ValueError(f"Embeddings of width {other.dim} cannot be added to those of width {self.dim}.")
        if self._entries.positions(other.ids):  # before any of its pieces is added
            raise ValueError("Image ids must be unique; at least one is in both indexes.")
        for rows, ids, metadata in other._pieces():
            if absolute and other.image_root is not None:
                metadata = [
                    {**facts, "path": str(other.image_root / facts["path"])} if facts.get("path") else facts
                    for facts in metadata
                ]
            self._add_rows(rows, ids, metadata)  # as they are: normalised again, they would be rounded again
        self._may_read_files &= other._may_read_files
        self._entries.skip((row["id"], row["source"], row["reason"]) for row in other.skipped)
        self._images.update(other._images)

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
        faiss = None
        if backend == "faiss":
            faiss = FaissBackend(**options)
            faiss.build(self._all_shards(), self.dim)
        self._faiss, self._faiss_file = faiss, None
        return self

    def to(self, device: torch.device | str) -> "FromageImageIndex":
        """Keep the embeddings on `device`, where the flat search then runs."""
        self.device = torch.device(device)
        self._shards = [shard.to(device) for shard in self._all_shards()]
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
        embeds: torch.Tensor,
        top_k: int = 1,
        exclude_ids: Sequence[str] | Sequence[Sequence[str]] | None = None,
        where: dict[str, Any] | None = None,
        model: Any = None,
    ) -> tuple[list[list[str]], torch.Tensor, list[list[dict[str, Any]]]]:
        """Nearest images of `embeds` (Q, q) by cosine.

        Args:
            exclude_ids: Ids never returned: one list for all queries, or one list a query.
            where: Only images whose metadata has these values; a list means any of its values. Searched exactly,
                whatever the backend.
            model: The model that made `embeds`, to make sure that it is the index's.

        Returns:
            Ids, one list of k a query; cosines (Q, k); metadata likewise. Ties rank by position in the index.

        Raises:
            ValueError: `top_k` is not between 1 and the number of images left, a query is not finite or of another
                width, or `model` is not the index's.
            CorruptIndexError: A file of the index is damaged.
        """
        if model is not None:
            self.check_model(model)
        queries = self._normalized(embeds)
        banned = self._banned(exclude_ids, len(queries))
        allowed = self._allowed(where)
        counts = [len(rows) if allowed is None else int(allowed[rows].sum()) for rows in banned]
        available = (self._count if allowed is None else int(allowed.sum())) - max(counts, default=0)
        if not 1 <= top_k <= available:
            raise ValueError(
                f"`top_k` is {top_k}, but the index has {max(available, 0)} images to choose from (of {len(self)})."
            )
        pieces = []
        for start in range(0, len(queries), _QUERIES_AT_A_TIME):
            piece = slice(start, start + _QUERIES_AT_A_TIME)
            some, excluded = queries[piece], banned[piece]
            if self._faiss is None or where:
                pieces.append(search_flat(self._all_shards(), some, top_k, excluded, allowed))
            else:
                found = search_faiss(self._loaded_faiss(), self._all_shards(), some, top_k, excluded, allowed)
                pieces.append(found)
        scores = torch.cat([scores for scores, _ in pieces]) if pieces else torch.empty(0, top_k)
        positions = [row for _, found in pieces for row in found.tolist()]
        entries = self._entries.at(sorted({position for row in positions for position in row}))
        ids = [[entries[position][0] for position in row] for row in positions]
        return ids, scores, [[entries[position][1] for position in row] for row in positions]

    def _normalized(self, embeds: torch.Tensor) -> torch.Tensor:
        if embeds.dim() != 2 or embeds.shape[-1] != self.dim:
            raise ValueError(f"Expected embeddings (N, {self.dim}), got {tuple(embeds.shape)}.")
        embeds = embeds.detach().float().cpu()
        if not torch.isfinite(embeds).all():
            raise ValueError("The embeddings contain NaN or infinite values.")
        return F.normalize(embeds, dim=-1)

    def _banned(self, exclude_ids, count: int) -> list[torch.LongTensor]:
        """The positions of excluded images, for each query."""
        lists = list(exclude_ids or [])
        if not lists or isinstance(lists[0], str):
            lists = [lists] * count
        if len(lists) != count:
            raise ValueError(f"Got {len(lists)} lists of excluded ids for {count} queries.")
        known = self._entries.positions(sorted({image_id for ids in lists for image_id in ids}))
        return [torch.tensor(sorted({known[i] for i in ids if i in known}), dtype=torch.long) for ids in lists]

    def _allowed(self, where: dict[str, Any] | None) -> torch.BoolTensor | None:
        """(N,), True for the images that `where` and deletions leave; `None` for all."""
        if not where:
            return None if self._deleted is None else ~self._deleted
        allowed = torch.zeros(self._count, dtype=torch.bool)
        allowed[self._entries.matching(where)] = True
        return allowed

    def _loaded_faiss(self) -> FaissBackend:
        with self._lock:
            if self._faiss.index is None:
                check_file(self._faiss_file["path"], self._faiss_file["crc32"])
                self._faiss.load(self._faiss_file["path"])
            return self._faiss

    def _all_shards(self) -> list[Shard]:
        """The shards, with what was added since in them."""
        with self._lock:
            if self._added:
                shards, rows = list(self._shards), torch.cat(self._added)
                if shards and shards[-1].path is None and shards[-1].count < SHARD_ROWS:
                    rows = torch.cat([shards.pop().rows().cpu(), rows])
                shards += [Shard(len(piece), piece.to(self.device)) for piece in rows.split(SHARD_ROWS) if len(piece)]
                self._shards, self._added = shards, []
            return self._shards

    # ---- keeping it -----------------------------------------------------------------------------------------------

    def _kept_rows(self) -> Iterator[torch.Tensor]:
        start = 0
        for shard in self._all_shards():
            rows = shard.rows().cpu()
            yield rows if self._deleted is None else rows[~self._deleted[start : start + shard.count]]
            start += shard.count

    def _pieces(self) -> Iterator[tuple[torch.Tensor, list[str], list[dict[str, Any]]]]:
        """Embeddings, ids and metadata of what is not deleted, a shard at a time."""
        entries = iter(self._entries)
        for rows in self._kept_rows():
            some = list(itertools.islice(entries, len(rows)))
            yield rows, [image_id for _, image_id, _ in some], [facts for _, _, facts in some]

    def save_pretrained(self, save_directory: str | os.PathLike):
        """Write the index into a folder. An index that is there stays whole until the new one is."""
        self._save(save_directory, None if self.image_root is None else str(self.image_root.resolve()))

    def _save(
        self,
        directory: str | os.PathLike,
        image_root: str | None,
        progress: dict[str, Any] | None = None,
        public: bool = False,
    ):
        facts = {
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": self.model_fingerprint,
            "image_root": image_root,
            "may_read_files": self._may_read_files,
        }
        writer = IndexWriter(directory, facts, progress=progress)
        for rows, ids, metadata in self._pieces():
            writer.add(rows, ids, [_without_folders(facts) for facts in metadata] if public else metadata)
        skipped = [(row["id"], row["source"], row["reason"]) for row in self.skipped]
        if public:
            skipped = [(name, where if is_url(where) else Path(where).name, why) for name, where, why in skipped]
        writer.entries.skip(skipped)
        if self._faiss is None:
            writer.finish()
            return
        faiss = self._loaded_faiss()
        if self._deleted is not None and self._deleted.any():  # positions move up
            faiss = FaissBackend(**faiss.options)
            try:
                faiss.build([Shard(len(rows), rows) for rows in self._kept_rows()], self.dim)
            except ValueError as error:  # the images are not to be lost for it
                logger.warning("Saved without its FAISS index: %s", error)
                writer.finish()
                return
        temporary = writer.directory / "backend.tmp"
        faiss.save(temporary)
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

        Embeddings, ids and metadata stay in their files; each file's checksum is compared when it is first used.

        Args:
            image_root: The folder that metadata's relative "path"s are in.

        Raises:
            FileNotFoundError: The folder holds no finished index.
            CorruptIndexError: A file is missing or of another size.
        """
        directory, local = Path(index_name_or_path), True
        if not directory.is_dir() and (directory.is_absolute() or len(directory.parts) > 2):
            raise FileNotFoundError(f"There is no folder {directory}, and it is no repository's name (org/name).")
        if not directory.is_dir():
            local = False
            directory = Path(
                snapshot_download(
                    str(index_name_or_path), repo_type=repo_type, revision=revision, token=token, cache_dir=cache_dir,
                    allow_patterns=_HUB_FILES,
                )
            )  # fmt: skip
        state, shards, entries = read_index_file(directory)
        index = cls.__new__(cls)
        index._start(state["dim"], getattr(torch, state["dtype"]), state["model"])
        index._shards, index._entries, index._count = shards, entries, state["count"]
        index._may_read_files = local and state["may_read_files"]  # a copy of a Hub's is no more trusted
        image_root = image_root or (state["image_root"] if local else None)
        index.image_root = None if image_root is None else Path(image_root)
        if state.get("faiss"):
            index._faiss = FaissBackend(**state["faiss"]["options"])
            index._faiss_file = {**state["faiss"], "path": listed_file(directory, state["faiss"])}
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

        Of absolute paths in the metadata the file's name alone is published.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, image_root=None, public=True)  # folders of this machine are of no one else's concern
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, repo_type=repo_type, revision=revision,
                commit_message=commit_message, delete_patterns=_HUB_FILES[1:],
            )  # fmt: skip
        return commit.commit_url


def _without_folders(facts: dict[str, Any]) -> dict[str, Any]:
    """Metadata with the name alone of a path that leads through this machine's folders."""
    path = facts.get("path")
    return {**facts, "path": Path(path).name} if isinstance(path, str) and Path(path).is_absolute() else facts


def _check_dtype(dtype: torch.dtype):
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"Embeddings are stored in torch.float32 or torch.float16, not {dtype}.")


__all__ = ["FromageImageIndex"]
