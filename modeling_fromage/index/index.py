"""An index of image embeddings, searched with `[RET]` embeddings.

Axes: N images, Q queries, k results a query, q the width of the shared image-text space.
"""

import contextlib
import copy
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import ArrayLike

from ..images_fromage import DEFAULT_LIMITS, ImageLimits
from .backends.base import Hits
from .builder import EmbeddingModel, ImageProcessorHolder, build_index
from .contents import IndexContents, IndexEntry
from .datasets_bridge import store_from_dataset, store_to_dataset
from .images import ImageAccess
from .reading import open_index
from .saving import index_folder, push_index, save_index
from .store import IndexStore
from .stores import Store, extend, moves, on_this_machine, with_backend
from .values import as_embeds, as_entries

if TYPE_CHECKING:
    import datasets


class FromageImageIndex(IndexContents):
    """Images by their unit-norm embeddings, with a string id and a metadata dict each.

    Threads may search, change and save an index at once. They see each change as a whole or not at all, and a search
    or a save keeps to the images that were there when it began. Iterating yields an [`IndexEntry`] for each image.

    Args:
        embeds (`torch.Tensor` or `numpy.ndarray` of shape `(N, q)`): Normalised here.
        ids (`list[str]`): A unique id for each image.
        metadata (`list[dict]`, *optional*): What JSON can hold. A "path" or "url" lets [`load_image`] find the image.
        backend (`str`): `"flat"`, which is exact, `"faiss"` or `"milvus"`; `backend_options` as for [`use_backend`].
        dtype (`torch.dtype`): Of the stored embeddings: `torch.float32`, or `torch.float16` for half the size.
        model_fingerprint (`str`, *optional*): `model.retrieval_fingerprint()` of the model that made `embeds`.

    Raises:
        ValueError: The counts differ, an id is not a string or occurs twice, JSON cannot hold the metadata, or an
            embedding is not finite.

    Example:

        index = FromageImageIndex(model.get_image_embeds(pixel_values), ["cat.png", "dog.png"])
        ids, scores, metadata = index.search(model.get_text_embeds(input_ids, attention_mask), top_k=1)
    """

    def __init__(
        self,
        embeds: torch.Tensor | ArrayLike,
        ids: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        backend: str = "flat",
        dtype: torch.dtype = torch.float32,
        model_fingerprint: str | None = None,
        **backend_options: Any,
    ):
        rows = as_embeds(embeds)
        self._store, self._access = IndexStore(rows.shape[-1], dtype), ImageAccess()
        self.model_fingerprint = model_fingerprint
        self.add(rows, ids, metadata)
        self.use_backend(backend, **backend_options)

    @classmethod
    def _of(cls, store: Store, access: ImageAccess, model_fingerprint: str | None) -> "FromageImageIndex":
        index = cls.__new__(cls)
        index._store, index._access, index.model_fingerprint = store, access, model_fingerprint
        return index

    def __copy__(self) -> "FromageImageIndex":
        return self._of(copy.copy(self._store), copy.copy(self._access), self.model_fingerprint)

    # ---- making and changing it -----------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model: EmbeddingModel,
        processor: ImageProcessorHolder,
        images: Any,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 32,
        save_directory: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 8,
        limits: ImageLimits = DEFAULT_LIMITS,
        show_progress: bool = True,
        shard: tuple[int, int] | None = None,
        backend: str = "flat",
        **backend_options: Any,
    ) -> "FromageImageIndex":
        """Embed `images` with `model.get_image_embeds`, `batch_size` at a time.

        Images that cannot be read are left out: [`skipped`] lists them, and the log counts them by reason.

        Args:
            images: A folder, a table (TSV, CSV; columns "image" or "url"), shards (tar, Parquet; a pattern, or an
                address such as `s3://bucket/*.tar`), a `datasets` dataset, or an iterable of images, paths or rows.
            ids, metadata: One for each image, if `images` has none of its own. Ids default to the images' numbers.
            save_directory: Where the index is written as it grows. After an interruption the same call resumes it;
                once it is complete, the same call opens it.
            num_workers: Threads that read and preprocess images.
            limits: What an image may cost; see [`ImageLimits`].
            shard: (i, n) takes every n-th image from the i-th on, or every n-th file of n or more shards, for n
                processes whose indexes [`merge`] joins. Such an index may be empty.

        Raises:
            ValueError: There is no image, or none can be read, or `save_directory` holds another index.

        Example:

            index = FromageImageIndex.build(model, processor, "photos/", save_directory="index")
        """
        return cls._of(*build_index(model, processor, images, ids, metadata, batch_size, save_directory, dtype,
                                    num_workers, limits, show_progress, shard, backend, backend_options))  # fmt: skip

    def add(
        self, embeds: torch.Tensor | ArrayLike, ids: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None
    ) -> None:
        """Append images by their embeddings (N, q): all or, after an error, none. Arguments and errors as for the
        class."""
        rows, entries = self._store.normalized(embeds).to(self.dtype), as_entries(ids, metadata)
        if len(rows) != len(entries):
            raise ValueError(f"Got {len(rows)} embeddings, {len(entries)} ids and {len(entries)} metadata entries.")
        with self._held_store() as store:
            store.insert([(rows, entries)])

    def add_images(self, model: EmbeddingModel, processor: ImageProcessorHolder, images: Any, **kwargs: Any) -> None:
        """Embed and append `images`; arguments as for [`build`]. Raises a `ValueError` if another model made the
        index."""
        self.check_model(model)
        self._append(type(self).build(model, processor, images, dtype=self.dtype, **kwargs))

    def update(
        self,
        ids: Sequence[str] | str,
        metadata: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
        embeds: torch.Tensor | ArrayLike | None = None,
    ) -> None:
        """Replace the metadata or the embeddings, or both, of one image or of several: all or, after an error, none.

        As if they were deleted and added again at once, the images move to the end of the index.

        Args:
            ids (`str` or `list[str]`): Images of the index.
            metadata (`dict` or `list[dict]`, *optional*): In the place of the present one, not merged with it.
            embeds (`torch.Tensor` or `numpy.ndarray` of shape `(N, q)`, *optional*): In the place of the present ones.

        Raises:
            KeyError: One of `ids` is not in the index; then nothing is changed.
            ValueError: There is nothing to replace, or metadata or embeddings are as [`add`] refuses them.

        Example:

            index.update("cat.png", metadata={**index.get("cat.png"), "caption": "a cat"})
        """
        if metadata is None and embeds is None:
            raise ValueError("`update` needs `metadata`, `embeds`, or both.")
        with self._held_store() as store:
            store.update(ids, [metadata] if isinstance(metadata, dict) else metadata, embeds)

    def delete(self, ids: Sequence[str] | str) -> None:
        """Remove one image, or several. Raises a `KeyError` if one is not in the index; then nothing is removed."""
        with self._held_store() as store:
            store.delete(ids)

    @classmethod
    def merge(cls, indexes: Sequence["FromageImageIndex | str | os.PathLike[str]"]) -> "FromageImageIndex":
        """One index of all images of `indexes` (or their folders), in order: the shards of a build on many machines.

        Raises:
            ValueError: They are of different models, widths or dtypes, or an id occurs twice.
        """
        parts = [part if isinstance(part, cls) else cls.from_pretrained(part) for part in indexes]  # type: ignore[arg-type]  # a cls is no path
        if not parts:
            raise ValueError("`merge` needs at least one index.")
        kinds = {(part.dim, part.dtype, part.model_fingerprint) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"Only indexes of one model and kind can be merged; got (width, dtype, model): {kinds}.")
        dim, dtype, model_fingerprint = kinds.pop()
        access = ImageAccess.shared([part._access for part in parts])
        merged = cls._of(IndexStore(dim, dtype), access, model_fingerprint)
        for part in parts:
            merged._append(part)
        return merged

    def _append(self, other: "FromageImageIndex") -> None:
        root = other._access.root
        with self._held_store() as store:
            extend(store, other._store, None if root == self._access.root else root)
            self._access.may_read_files &= other._access.may_read_files

    # ---- searching ------------------------------------------------------------------------------------------------

    def use_backend(self, backend: str, **options: Any) -> "FromageImageIndex":
        """Search with another backend from now on.

        Args:
            backend: `"flat"` is exact. `"faiss"` takes `factory` (a string of `faiss.index_factory`, `"Flat"` by
                default), `nprobe`, `k_factor` and `training_size`; see [`FaissBackend`]. `"milvus"` takes `uri` and
                others, see [`MilvusOptions`], and moves the contents there; the other two take a copy of them back.

        Raises:
            ValueError: The backend is not known, has other options, or cannot be trained on so few images; or the
                collection is there already, or Milvus cannot hold the contents.
            MilvusIndexError: Milvus cannot be reached.
        """
        held = self._held_store() if moves(self._store, backend) else contextlib.nullcontext(self._store)
        with held as store:
            self._store = with_backend(store, backend, options)
        return self

    def set_search_options(self, **options: Any) -> "FromageImageIndex":
        """Change how the backend searches: `k_factor` of a FAISS index, `nprobe` of IVF, `ef` of Milvus's HNSW.

        [`save_pretrained`] saves the options with the index.

        Raises:
            ValueError: The backend has no such option; the message names those that it has.

        Example:

            index.use_backend("faiss", factory="IVF1024,Flat").set_search_options(nprobe=16)
        """
        self._store.set_search_options(**options)
        return self

    def to(self, device: torch.device | str) -> "FromageImageIndex":
        """Keep the embeddings on `device`, where the flat search then runs."""
        self._store.to(device)
        return self

    def check_model(self, model: EmbeddingModel) -> None:
        """Raise a `ValueError` if another model made these embeddings."""
        theirs = model.retrieval_fingerprint()
        if self.model_fingerprint is not None and theirs != self.model_fingerprint:
            raise ValueError(
                f"The index was made by the model {self.model_fingerprint}, not by this one ({theirs}): their "
                "embeddings cannot be compared. Load the model that made it, or build the index anew."
            )

    def search(
        self,
        embeds: torch.Tensor | ArrayLike,
        top_k: int = 1,
        exclude_ids: Sequence[str] | Sequence[Sequence[str]] | str | None = None,
        where: dict[str, Any] | None = None,
        model: EmbeddingModel | None = None,
    ) -> Hits:
        """The nearest images of `embeds`, by cosine.

        Args:
            embeds (`torch.Tensor` or `numpy.ndarray` of shape `(Q, q)`): Queries.
            top_k (`int`): Number of images for each query.
            exclude_ids: Ids never returned: one list for all queries, or a list for each; or a single id.
            where (`dict`, *optional*): Only images whose metadata has these values. A list means any of its values, and
                metadata that is a list has each of its items. Such a search is exact, but for Milvus's
                approximate indexes.
            model (*optional*): The model that made `embeds`, to check that it is the index's.

        Returns:
            Ids (a list of k for each query), cosines (Q, k), and metadata (like the ids). Equal cosines rank by
            position in the index. If `where` leaves a query fewer than `top_k` images, its lists hold what there is; k
            is then the length of the longest list, and the cosines of shorter ones end in -inf.

        Raises:
            ValueError: `top_k` is less than 1 or, without `where`, more than the number of images left; a query is not
                finite or has another width; or `model` is not the index's.
            CorruptIndexError: A file of the index is damaged.
            ReplacedIndexError: Another index was saved into its folder before all of this one's files were opened.

        Example:

            ids, scores, metadata = index.search(embeds, top_k=5, where={"license": ["CC0", "CC-BY"]})
        """
        if model is not None:
            self.check_model(model)
        return self._store.search(embeds, top_k, exclude_ids, where)

    # ---- keeping it -----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the index into a folder, with the images that it keeps; of one in Milvus, the header alone. An index
        that is there stays whole until this one is."""
        save_index(save_directory, self._store, self._access, self.model_fingerprint)

    @classmethod
    def from_pretrained(
        cls,
        index_name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        image_root: str | os.PathLike[str] | None = None,
        repo_type: str = "dataset",
        milvus_token: str | None = None,
    ) -> "FromageImageIndex":
        """Open what [`save_pretrained`], [`build`] or [`push_to_hub`] wrote: a folder, or a repository of the Hub.

        Embeddings, ids and metadata stay in their files, and each file is checked when it is first used. Anyone may
        have written the index, so it is not taken at its word about where its images are.

        Args:
            image_root: The folder that relative paths in the metadata start from. Images below it may be read, besides
                those in the index's own folder; see [`load_image`].
            milvus_token: Of the Milvus server that an index in Milvus is on, if it asks for one. By default the
                environment's `MILVUS_TOKEN`, where its `MILVUS_URI` is that server's: whoever wrote the folder does not
                get it.

        Raises:
            FileNotFoundError: The folder holds no finished index.
            CorruptIndexError: A file is missing or has another size.
            MilvusIndexError: The collection is not there, or cannot be reached.
        """
        directory = index_folder(index_name_or_path, repo_type, revision, token, cache_dir)
        return cls._of(*open_index(directory, image_root, milvus_token))

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload image index",
        repo_type: str = "dataset",
    ) -> str:
        """Upload the index in one commit, in the place of the one that is there, and return the commit's address.

        Of absolute paths in the metadata only the file's name is published, and this machine's folders are cut out of
        all texts. Raises a `ValueError` if an id is a path of this machine.
        """
        return push_index(repo_id, self._store, self._access, self.model_fingerprint, private, token, revision,
                          commit_message, repo_type)  # fmt: skip

    def to_dataset(self, images: bool = True, limits: ImageLimits = DEFAULT_LIMITS) -> "datasets.Dataset":
        """The index as a `datasets.Dataset`, in memory, to look at or to publish, with the columns "id", "embedding",
        the metadata and "image".

        Metadata whose values a column cannot hold without loss (of several types, lists, dicts, `None`) is JSON in the
        column "metadata". As for [`push_to_hub`], this machine's folders are cut out.

        Args:
            images (`bool`): Whether to add the images as [`load_image`] returns them. Those that it cannot read, or
                may not, are `None`.
            limits ([`ImageLimits`]): What an image may cost.

        Raises:
            ImportError: `datasets` is not installed.
            ValueError: An id is a path of this machine.

        Example:

            index.to_dataset().push_to_hub("org/pictures")
        """
        load = partial(self._access.load, limits=limits) if images else None
        return store_to_dataset(on_this_machine(self._store), load, self._access.scrubber())

    @classmethod
    def from_dataset(
        cls,
        dataset: "datasets.Dataset",
        embedding_column: str = "embedding",
        id_column: str = "id",
        image_column: str = "image",
        dtype: torch.dtype | None = None,
        model_fingerprint: str | None = None,
        backend: str = "flat",
        **backend_options: Any,
    ) -> "FromageImageIndex":
        """An index of a dataset that has embeddings, such as one of [`to_dataset`].

        All other columns become metadata, where they have a value. Of images the index keeps the bytes. Files that the
        metadata names are read only below `image_root`, as for an index that was opened: anyone may have written them.

        Args:
            embedding_column, id_column, image_column (`str`): Names of columns; that of images may be missing.
            dtype (`torch.dtype`, *optional*): Of the stored embeddings; the dataset's by default.
            model_fingerprint (`str`, *optional*): Of the model that made the embeddings. A dataset does not carry it.
            backend (`str`): As for the class.

        Raises:
            ImportError: `datasets` is not installed.
            ValueError: A column is missing, or holds what [`add`] refuses.
        """
        store = store_from_dataset(dataset, dtype, embedding_column, id_column, image_column)
        return cls._of(store, ImageAccess(may_read_files=False), model_fingerprint).use_backend(
            backend, **backend_options
        )


__all__ = ["FromageImageIndex", "IndexEntry"]
