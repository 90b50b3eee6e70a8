"""Hard negatives of captions, mined from an index: near images that are not their own."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageImageIndex,
    FromageProcessor,
    UnreadableImageError,
)
from modeling_fromage.images_fromage import is_url, load_rgb_image
from modeling_fromage.io.columns import NEGATIVES, as_image, find_columns
from modeling_fromage.io.tables import read_rows
from modeling_fromage.late_interaction_fromage import search_by_queries

_DEPTH, _DEEPER = 32, 8  # images beyond those wanted that are searched for at first, and the factor of each next search
_IN_ROWS = 256  # rows of the table whose captions are searched for at once


class Row(NamedTuple):
    """A row of the table.

    Args:
        values: Its columns, paths of images made absolute.
        image: What stands for its image: an absolute path or a URL.
        captions: Its texts.
    """

    values: dict[str, Any]
    image: str
    captions: list[str]


class Place(NamedTuple):
    """An image of the index that is one of the table's: its id, and its embedding (q,)."""

    id: str
    embedding: torch.Tensor


@dataclass
class NegativeMining:
    """For each row of a table, the images of an index that are nearest to its captions, without its own.

    An image whose cosine with a caption comes near that of the caption's own image (or is above it) probably shows what
    the caption says. So those above `skip_above` of it are left out, as in NV-Retriever (Moreira et al. 2024); copies
    of the own image are among them. Images of other rows with the same caption are left out too.

    Args:
        model, processor: The model that made the index.
        index ([`FromageImageIndex`]): Its metadata name its images by "path" or "url".
        table (`Path`): Any table of images (paths or URLs) and captions.
        image_root (`Path`, *optional*): The folder that paths in the index start from; by default the table's.
        per_example (`int`): Negatives of a row, nearest first; fewer where there are no more.
        skip_above (`float`): The share of the own image's cosine.
        batch_size (`int`): Captions, and images that the index lacks, that are embedded at once.
        image_column, caption_column (`str`, *optional*): Found by their names by default.

    Raises:
        ValueError: The index is of another model, or names none of its images; the table cannot be read, or holds
            images rather than naming them.
    """

    model: FromageForConditionalGeneration
    processor: FromageProcessor
    index: FromageImageIndex
    table: Path
    image_root: Path | None = None
    per_example: int = 8
    skip_above: float = 0.95
    batch_size: int = 32
    image_column: str | None = None
    caption_column: str | None = None
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.index.check_model(self.model)
        self.root = (self.table.parent if self.image_root is None else self.image_root).absolute()
        self._collator = FromageDataCollator(self.processor, training=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the table, each with a column `negative_images` of absolute paths and URLs."""
        owners: dict[str, set[str]] = {}  # of each caption: the images of its rows
        for row in self._read():
            for caption in row.captions:
                owners.setdefault(caption, set()).add(row.image)
        places = self._places({image for images in owners.values() for image in images})
        rows = self._read()
        while chunk := list(islice(rows, _IN_ROWS)):
            yield from self._mined(chunk, owners, places)

    def _read(self) -> Iterator[Row]:
        columns = None
        for line, values in read_rows(self.table):
            columns = columns or find_columns(str(self.table), list(values), self.image_column, self.caption_column)
            image, caption = as_image(values.get(columns[0]), self.table.parent.absolute()), values.get(columns[1])
            image = image["path"] if isinstance(image, dict) and not image.get("bytes") else image
            captions = [text for text in (caption if isinstance(caption, list) else [caption]) if text]
            if not isinstance(image, str) or not captions:
                raise ValueError(
                    f"{self.table}, line {line}: expected a path or URL of an image and a caption, got "
                    f"{str(values)[:200]}. Complete the row; images within a table are to be made files first."
                )
            yield Row({**values, columns[0]: image}, image, captions)

    def _places(self, wanted: set[str]) -> dict[str, Place]:
        """Those of the images `wanted` that the index has."""
        found: dict[str, Place] = {}
        named = False
        for entry in tqdm(self.index, desc="Images of the index"):
            name = self._name_of(entry.id, entry.metadata)
            named = named or name is not None
            if name in wanted:
                found[str(name)] = Place(entry.id, entry.embedding)
        if not named:
            raise ValueError(
                "No image of the index has a path or a URL in its metadata, by which a table could name it. Build the "
                "index from files or URLs."
            )
        self.counts["own images in the index"] = len(found)
        return found

    def _name_of(self, image_id: str, metadata: dict[str, Any]) -> str | None:
        """The URL or the absolute path of an image of the index."""
        url, path = metadata.get("url"), metadata.get("path")
        if is_url(url):
            return url
        if isinstance(path, str):
            return os.path.normpath(self.root / path)
        return image_id if is_url(image_id) else None

    def _mined(
        self, rows: Sequence[Row], owners: dict[str, set[str]], places: dict[str, Place]
    ) -> Iterator[dict[str, Any]]:
        queries = [(number, caption) for number, row in enumerate(rows) for caption in row.captions]
        texts = self._embed_texts([caption for _, caption in queries])
        images = self._own_embeds(rows, places)
        own = torch.tensor([(text @ images[number]).max().item() if number in images else -torch.inf
                            for (number, _), text in zip(queries, texts, strict=True)])  # fmt: skip
        limits = own - (1 - self.skip_above) * own.abs()
        excluded = [
            [places[image].id for image in owners[caption] | {rows[number].image} if image in places]
            for number, caption in queries
        ]
        hits = self._nearest(texts, limits, excluded)
        for number, row in enumerate(rows):
            mine = [i for i, (owner, _) in enumerate(queries) if owner == number]
            yield {**row.values, NEGATIVES: self._joined([hits[i] for i in mine], own[mine])}

    def _joined(self, hits: list[dict[str, tuple[float, str]]], own: torch.Tensor) -> list[str]:
        """The negatives of a row with several captions: nearest first to any of them."""
        best: dict[str, float] = {}
        for found in hits:
            for score, name in found.values():
                best[name] = max(score, best.get(name, -torch.inf))
        names = sorted(best, key=lambda name: -best[name])[: self.per_example]
        self.counts["rows"] += 1
        self.counts["rows with fewer"] += len(names) < self.per_example
        self.counts["negatives"] += len(names)
        self.counts["sum of cosines"] += sum(best[name] for name in names)
        if own.isfinite().all():
            self.counts["rows with an own image"] += 1
            self.counts["sum of own cosines"] += own.mean().item()
        return names

    def _nearest(
        self, queries: torch.Tensor, limits: torch.Tensor, excluded: list[list[str]]
    ) -> list[dict[str, tuple[float, str]]]:
        """For each query (Q, q), or the best of a text's (Q, r, q), by id, the cosines and names of the nearest images
        that are not above its limit."""
        found: list[dict[str, tuple[float, str]]] = [{} for _ in excluded]
        by_left: dict[int, list[int]] = {}  # queries by the number of images that may be found
        for row, limit in enumerate(limits.tolist()):
            if limit > -torch.inf:
                by_left.setdefault(len(self.index) - len(excluded[row]), []).append(row)
        for left, rows in by_left.items():
            count = min(self.per_example + _DEPTH, left)
            while rows and count:
                some = queries[rows], count, [excluded[row] for row in rows]
                ids, scores, metadata = search_by_queries(self.index.search, *some)
                for row, *hits in zip(rows, ids, scores.tolist(), metadata, strict=True):
                    named = ((i, score, self._name_of(i, facts)) for i, score, facts in zip(*hits, strict=False))
                    near = ((i, (score, name)) for i, score, name in named if name and score <= limits[row])
                    found[row] = dict(islice(near, self.per_example))
                rows = [row for row in rows if len(found[row]) < self.per_example and count < left]
                count = min(count * _DEEPER, left)
        return found

    @torch.no_grad()
    def _embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Unit-norm embeddings (Q, q) of captions, as in training."""
        embeds = []
        for start in range(0, len(captions), self.batch_size):
            inputs = self._collator.retrieval_inputs(captions[start : start + self.batch_size])
            ids, mask = (tensor.to(self.model.device) for tensor in inputs.values())
            embeds.append(self.model.get_text_embeds(ids, mask).float().cpu())
        return torch.cat(embeds)

    @torch.no_grad()
    def _own_embeds(self, rows: Sequence[Row], places: dict[str, Place]) -> dict[int, torch.Tensor]:
        """Embeddings of the rows' own images, from the index where it has them; none of one that cannot be read."""
        found = {n: places[row.image].embedding.float() for n, row in enumerate(rows) if row.image in places}
        missing = [number for number in range(len(rows)) if number not in found]
        for start in range(0, len(missing), self.batch_size):
            numbers, pictures = [], []
            for number in missing[start : start + self.batch_size]:
                try:
                    pictures.append(load_rgb_image(rows[number].image))
                    numbers.append(number)
                except UnreadableImageError:
                    self.counts["own images that cannot be read"] += 1
            if pictures:
                pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
                found |= zip(
                    numbers, self.model.get_image_embeds(pixels.to(self.model.device)).float().cpu(), strict=True
                )
        return found

    def report(self) -> str:
        """What was found, in words."""
        counts = self.counts
        mean, own = (
            counts[total] / max(1, counts[number])
            for total, number in (("sum of cosines", "negatives"), ("sum of own cosines", "rows with an own image"))
        )
        lines = [
            f"{counts['rows']:,} rows, {counts['rows with fewer']:,} with fewer than {self.per_example} negatives",
            f"mean cosine of a caption with its negatives {mean:.3f}, with its own image {own:.3f}",
        ]
        if unreadable := counts["own images that cannot be read"]:
            lines.append(f"{unreadable:,} rows without negatives, for their own image cannot be read")
        return "\n".join(lines)


def relative_to(row: dict[str, Any], columns: Iterable[str], folder: Path) -> dict[str, Any]:
    """A row whose absolute paths, in these columns, start from `folder`."""

    def relative(name: Any) -> Any:
        if isinstance(name, list):
            return [relative(each) for each in name]
        return name if is_url(name) or not os.path.isabs(name) else os.path.relpath(name, folder)

    return row | {column: relative(row[column]) for column in columns}


__all__ = ["NegativeMining", "relative_to"]
