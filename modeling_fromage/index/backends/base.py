"""The protocol of what searches an index.

Axes: N images, Q queries, k results a query, q the width of the shared image-text space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..folder import ListedFile
from ..shards import Shard

if TYPE_CHECKING:
    from ..metadata_store import MetadataStore
    from ..snapshot import Snapshot


class Hits(NamedTuple):
    """What a search found: a list of k ids for each query, cosines (Q, k), and a list of k metadata dicts for each."""

    ids: list[list[str]]
    scores: torch.Tensor
    metadata: list[list[dict[str, Any]]]


@dataclass(frozen=True)
class SearchRequest:
    """What to search for, in both terms that a backend may know.

    Attributes:
        queries (`torch.Tensor` of shape `(Q, q)`): Of unit norm.
        top_k: Number of results a query.
        where: The metadata filter as the caller gave it, for a database with filters of its own.
        exclude_ids: A list of excluded ids for each query.
        excluded_positions: The same as positions in the snapshot.
        snapshot: The images to search.
        entries: Their ids and metadata.
    """

    queries: torch.Tensor
    top_k: int
    where: dict[str, Any] | None
    exclude_ids: list[list[str]]
    excluded_positions: list[torch.Tensor]
    snapshot: "Snapshot"
    entries: "MetadataStore"

    def allowed(self) -> torch.Tensor | None:
        """Mask (N,) of the positions that are kept and pass the filter; `None` for all."""
        kept = self.snapshot.kept
        if not self.where:
            return kept
        mask = self.entries.mask(self.where, self.snapshot.count)
        return mask if kept is None else mask & kept


class SearchBackend(Protocol):
    """What finds the nearest images. To add one, write a class like this in a file of this folder, and name it in
    `BACKENDS` of `__init__.py`. Its constructor's arguments are the options of [`FromageImageIndex.use_backend`].

    Several threads search at once, also while one adds or deletes.
    """

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments that make another one like this; saved with the index."""

    def set_options(self, **options: Any) -> None:
        """Change options of the search. Raises a `ValueError` that names the allowed ones for any other."""

    def build(self, snapshot: "Snapshot", dim: int, entries: "MetadataStore") -> None:
        """Take all images of `snapshot`, whose embeddings have width `dim`."""

    def add(self, rows: torch.Tensor, entries: Sequence[tuple[str, str]]) -> None:
        """Append embeddings (n, q) with their (id, metadata as JSON)."""

    def delete(self, ids: Sequence[str]) -> None:
        """Forget images. Those that search by position may ignore it: `SearchRequest.allowed` masks them."""

    def restore(self, shards: Sequence[Shard]) -> None:
        """Go back to `shards` after an addition that failed."""

    def search(self, request: SearchRequest) -> Hits:
        """The nearest images; equal cosines rank by position."""

    def copy(self) -> "SearchBackend":
        """Another one, which changes by itself."""

    def save(self, path: Path, snapshot: "Snapshot", dim: int) -> bool:
        """Write the kept images of `snapshot` into a file for [`load`]. Returns whether there is one."""

    def load(self, file: ListedFile, count: int, dim: int) -> None:
        """Use a saved file of `count` embeddings, to be read and checked at its first use."""
