"""Searching an image index for the embeddings of `[RET]`: any object with `search` is one."""

import logging
import os
from collections.abc import Container, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .images_fromage import DEFAULT_LIMITS, ImageLimits
from .late_interaction_fromage import search_by_queries

if TYPE_CHECKING:
    from .modeling_fromage import FromageForConditionalGeneration

logger = logging.getLogger(__name__)
_SPARE_IMAGES = 3  # searched for beyond those wanted, in case some cannot be read (as in the authors' code)
Segment = dict[str, Any]  # of an answer: {"type": "text", "text": ...} or {"type": "image", "id": ..., ...}


class ImageIndex(Protocol):
    """What the pipeline asks of an index.

    An index may also have a method `load_image(image_id, limits)`, which returns a PIL image or raises a `ValueError`
    for one that cannot be read; `check_model(model)`, which raises a `ValueError` for a model that did not make its
    embeddings; and `len(index)` and `image_id in index`, without which `search` must cope with a `top_k` that is larger
    than the number of images.
    """

    def search(
        self, embeds: torch.Tensor, top_k: int = 1, exclude_ids: Any = None, *, where: dict[str, Any] | None = None
    ) -> tuple[list[list[str]], torch.Tensor, list[list[dict[str, Any]]]]:
        """Nearest images.

        Args:
            embeds (`torch.FloatTensor` of shape `(num_queries, projection_dim)`): Unit-norm queries.
            top_k (`int`): Images per query.
            exclude_ids (`list[list[str]]`): For each query, the ids that must not be found.
            where (`dict`, *optional*): Only images whose metadata has these values; passed only where it is set.

        Returns:
            Ids, cosines of shape `(num_queries, top_k)`, and metadata. A query with fewer images has shorter lists of
            ids and metadata.
        """


def open_index(name: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None) -> ImageIndex:
    """Open the index in a folder or repository, by the installed package: checkpoints do not carry its code.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        from modeling_fromage.index import FromageImageIndex
    except ImportError as error:
        raise ImportError(
            f"Install the `modeling-fromage` package to open the index {name} by its name, or pass an object with "
            "`search` and `load_image`."
        ) from error
    return FromageImageIndex.from_pretrained(name, image_root=image_root)


class ImageSearch:
    """Finds images of an index and reads them; a problem is logged once.

    Args:
        index ([`ImageIndex`], *optional*): The index; without one nothing can be searched for.
        model ([`FromageForConditionalGeneration`]): The model that embeds the queries.
        load_images (`bool`, defaults to `True`): Whether images will be read.
        where (`dict`, *optional*): Only images whose metadata has these values.
        limits ([`ImageLimits`]): What reading an image may cost.
        logged (`set`, *optional*): What was logged already; share it between objects that log things once together.

    Raises:
        ValueError: `index` cannot be searched, cannot read images although they are wanted, or is another model's.
    """

    def __init__(
        self,
        index: ImageIndex | None,
        model: "FromageForConditionalGeneration",
        load_images: bool = True,
        where: dict[str, Any] | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        logged: set[Any] | None = None,
    ):
        self.index, self.load_images, self.where, self.limits = index, load_images, where or None, limits
        self._logged: set[Any] = set() if logged is None else logged
        self._load_image: Any = getattr(index, "load_image", None)
        if index is None:
            return
        if not callable(getattr(index, "search", None)):
            raise ValueError(f"`index` must have a method `search`, got {type(index)}. See `FromageImageIndex`.")
        if load_images and self._load_image is None:
            raise ValueError(
                f"The index ({type(index)}) has no method `load_image`. Add one, or set `load_images=False`."
            )
        check_model = getattr(index, "check_model", None)
        if check_model is not None:
            check_model(model)

    def find(self, embeds: torch.Tensor, top_k: int, exclude_ids: Sequence[Sequence[str]]) -> list[list[Segment]]:
        """The nearest images for each query, best first, fewer than `top_k` where the index has no more.

        Args:
            embeds (`torch.FloatTensor` of shape `(num_queries, projection_dim)`): Unit-norm queries; those of a text
                with several, `(num_texts, num_ret_tokens, projection_dim)`, together find what is nearest to any.
            top_k (`int`): Images per query.
            exclude_ids: For each query, the ids of images that must not be found.

        Returns:
            For each query a list of `{"type": "image", "id": ..., "score": ..., "image": None, "metadata": {...}}`.
        """
        if self.index is None:
            raise ValueError("There is no image index to search. Give `index=`: an index, its folder or repository.")
        found: list[list[Segment]] = [[] for _ in exclude_ids]
        filters: dict[str, Any] = {} if self.where is None else {"where": self.where}
        for count, rows in self._rows_by_count(top_k, exclude_ids).items():
            excluded = [exclude_ids[row] for row in rows]
            ids, scores, metadata = search_by_queries(self.index.search, embeds[rows], count, excluded, **filters)
            # A row may have fewer than `count` images, and scores of -inf behind them.
            for row, own_ids, own_scores, own_metadata in zip(rows, ids, scores.tolist(), metadata, strict=True):
                found[row] = [
                    {"type": "image", "id": image_id, "score": score, "image": None, "metadata": values}
                    for image_id, score, values in zip(own_ids, own_scores[: len(own_ids)], own_metadata, strict=True)
                ]
        return found

    def _rows_by_count(self, top_k: int, exclude_ids: Sequence[Sequence[str]]) -> dict[int, list[int]]:
        """How many images to search for, and for which queries: no more than are left, where that is known."""
        if self.where is not None or not isinstance(self.index, Sized) or not isinstance(self.index, Container):
            return {top_k: list(range(len(exclude_ids)))}
        counts: dict[int, list[int]] = {}
        for row, ids in enumerate(exclude_ids):
            left = len(self.index) - sum(image_id in self.index for image_id in set(ids))
            if left:
                counts.setdefault(min(top_k, left), []).append(row)
        return counts

    def retrieve(
        self, embeds: torch.Tensor, num_images: int, exclude_ids: Sequence[Sequence[str]]
    ) -> list[list[Segment]]:
        """The images to show for each query: as [`find`], but read, and those that cannot be read give way to others.

        Logs once where there are fewer than `num_images`, or no index at all.
        """
        if self.index is None:
            self.log_once(
                "no index",
                "The model wrote [RET], but there is no image index, so the text has a marker in its place. Give "
                "`index=`: a FromageImageIndex, its folder, or its repository.",
            )
            return [[] for _ in exclude_ids]
        if self.load_images:
            hits = self.find(embeds, num_images + _SPARE_IMAGES, exclude_ids)
            found = [self._readable_first(segments, num_images) for segments in hits]
        else:
            found = self.find(embeds, num_images, exclude_ids)
        fewest = min(map(len, found))
        if fewest < num_images:
            self.log_once(
                ("few", num_images),
                "The index has %d images to show that were not shown yet, fewer than `images_per_ret=%d`.",
                fewest,
                num_images,
            )
        return found

    def _readable_first(self, hits: list[Segment], num_images: int) -> list[Segment]:
        readable: list[Segment] = []
        unreadable: list[Segment] = []
        for segment in hits:
            if len(readable) < num_images:
                (readable if self.load(segment) else unreadable).append(segment)
        return [*readable, *unreadable][:num_images]

    def load(self, segment: Segment) -> bool:
        """Read the image of a segment into it; whether it could be read. If not, the reason is logged once."""
        try:
            segment["image"] = self._load_image(segment["id"], self.limits)
        except ValueError as error:  # an index need not raise this code's own UnreadableImageError
            self.log_once(segment["id"], "%s", error)
            return False
        return True

    def log_once(self, reason: Any, message: str, *values: Any) -> None:
        """Log a warning, unless one for the same `reason` was logged."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning(message, *values)


__all__ = ["ImageIndex", "ImageSearch", "Segment", "open_index"]
