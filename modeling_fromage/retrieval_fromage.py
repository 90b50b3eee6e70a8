"""An index of image embeddings, searched with `[RET]` embeddings: one matrix, exact, saved as safetensors."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F


class FromageImageIndex:
    """Images by their unit-norm embeddings (N, q), with a string id and a metadata dict each.

    Args:
        embeds (`torch.Tensor`): (N, q); normalised here.
        ids (`list[str]`): One unique id an image.
        metadata (`list[dict]`, *optional*): JSON-serialisable facts, such as the file's path.
        backend (`str`): `"flat"`, exact search.

    Raises:
        ValueError: Counts differ, an id occurs twice, or an embedding is not finite.
    """

    def __init__(
        self,
        embeds: torch.Tensor,
        ids: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        backend: str = "flat",
    ):
        if backend != "flat":
            raise ValueError(f"Unknown backend {backend!r}; this version has 'flat'.")
        self.embeds = torch.empty(0, embeds.shape[-1])
        self.ids: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.add(embeds, ids, metadata)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, embeds: torch.Tensor, ids: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None):
        """Append images; arguments and errors as for the class."""
        metadata = [{} for _ in ids] if metadata is None else list(metadata)
        if not len(embeds) == len(ids) == len(metadata):
            raise ValueError(f"Got {len(embeds)} embeddings, {len(ids)} ids and {len(metadata)} metadata entries.")
        if embeds.dim() != 2 or embeds.shape[-1] != self.embeds.shape[-1]:
            raise ValueError(f"Expected embeddings (N, {self.embeds.shape[-1]}), got {tuple(embeds.shape)}.")
        if len(set(self.ids).union(ids)) != len(self.ids) + len(ids):
            raise ValueError("Image ids must be unique; at least one occurs twice.")
        _check_finite(embeds)
        self.embeds = torch.cat([self.embeds, F.normalize(embeds.detach().float().cpu(), dim=-1)])
        self.ids += [str(image_id) for image_id in ids]
        self.metadata += metadata

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: Any,
        processor: Any,
        images: Iterable[Any],
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 32,
    ) -> "FromageImageIndex":
        """Embed `images` (PIL images or paths) with `model.get_image_embeds`; ids default to their numbers."""
        images = list(images)
        if not images:
            raise ValueError("An index needs at least one image.")
        chunks = []
        for start in range(0, len(images), batch_size):
            inputs = processor(images=images[start : start + batch_size], return_tensors="pt")
            chunks.append(model.get_image_embeds(inputs["pixel_values"].to(model.device)).float().cpu())
        ids = [str(i) for i in range(len(images))] if ids is None else ids
        return cls(torch.cat(chunks), ids, metadata)

    def search(
        self, embeds: torch.Tensor, top_k: int = 1, exclude_ids: Sequence[str] | Sequence[Sequence[str]] | None = None
    ) -> tuple[list[list[str]], torch.Tensor, list[list[dict[str, Any]]]]:
        """Exact nearest images of `embeds` (Q, q) by cosine.

        Args:
            exclude_ids: Ids never returned: one list for all queries, or one list a query.

        Returns:
            Ids, one list of k a query; cosines (Q, k); metadata likewise. Ties rank by position in the index.

        Raises:
            ValueError: `top_k` is not between 1 and the number of images left, or a query is not finite.
        """
        _check_finite(embeds)
        queries = F.normalize(embeds.detach().float().cpu(), dim=-1)
        scores = queries @ self.embeds.t()  # (Q, N)
        excluded = list(exclude_ids or [])
        if not excluded or isinstance(excluded[0], str):
            excluded = [excluded] * len(queries)
        position = {image_id: i for i, image_id in enumerate(self.ids)}
        for row, names in enumerate(excluded):
            known = [position[name] for name in names if name in position]
            scores[row, known] = float("-inf")
        available = int((scores > float("-inf")).sum(-1).min()) if len(queries) else len(self)
        if not 1 <= top_k <= available:
            raise ValueError(
                f"`top_k` is {top_k}, but the index has {available} images to choose from (of {len(self)})."
            )
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        ids = [[self.ids[i] for i in row] for row in best.tolist()]
        return ids, scores.gather(-1, best), [[self.metadata[i] for i in row] for row in best.tolist()]

    def save_pretrained(self, save_directory: str | os.PathLike):
        """Write `index.safetensors` and `index.json`; each appears whole or not at all."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            save_file({"embeds": self.embeds.contiguous()}, Path(temporary) / "index.safetensors")
            text = json.dumps({"ids": self.ids, "metadata": self.metadata}, ensure_ascii=False)
            (Path(temporary) / "index.json").write_text(text, encoding="utf-8")
            for name in ("index.safetensors", "index.json"):
                shutil.move(Path(temporary) / name, directory / name)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "FromageImageIndex":
        """Read what [`save_pretrained`] wrote."""
        directory = Path(directory)
        if not (directory / "index.safetensors").is_file():
            raise FileNotFoundError(f"{directory} holds no image index: it has no index.safetensors.")
        entries = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        return cls(load_file(directory / "index.safetensors")["embeds"], entries["ids"], entries["metadata"])


def recall_at_k(logits: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Fraction of rows of `logits` (N, N) whose diagonal entry is among the k largest; ties count against it."""
    target = logits.diagonal()[:, None]
    rank = (logits >= target).sum(-1)  # 1 is best
    return {f"R@{k}": (rank <= k).float().mean().item() for k in ks}


def _check_finite(embeds: torch.Tensor):
    if not torch.isfinite(embeds).all():
        raise ValueError("The embeddings contain NaN or infinite values.")


__all__ = ["FromageImageIndex", "recall_at_k"]
