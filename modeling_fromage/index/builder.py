"""Building an image index into a folder: read ahead, embed in batches, checkpoint, go on after a kill."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch.nn import functional as F

from ..images_fromage import ImageLimits, load_rgb_image
from .files import INDEX_FILE, UNFINISHED_FILE, IndexWriter, read_index_file
from .sources import ImageSource, SourceDigest, read_ahead

logger = logging.getLogger(__name__)
CHECKPOINT_EVERY = 1024  # images


class ImageEmbedder:
    """From image to pixels, in threads; from pixels to unit-norm embeddings, in batches."""

    def __init__(self, model: Any, processor: Any, limits: ImageLimits):
        self.model, self.processor, self.limits = model, processor, limits

    def load(self, image: Any) -> torch.Tensor:
        """(channels, height, width)."""
        rgb = load_rgb_image(image, self.limits)
        return self.processor.image_processor(rgb, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def __call__(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        """(n, q)."""
        embeds = self.model.get_image_embeds(torch.stack(pixels).to(self.model.device)).float().cpu()
        if not torch.isfinite(embeds).all():
            raise ValueError(
                "The model's image embeddings contain NaN or infinite values; check its weights and dtype."
            )
        return F.normalize(embeds, dim=-1)


def build_folder(
    directory: Path,
    facts: dict[str, Any],
    sources: Iterator[ImageSource],
    total: int | None,
    embed: ImageEmbedder,
    batch_size: int,
    num_workers: int,
    show_progress: bool,
    keep_images: bool,
):
    """Write an index of `sources` into `directory`, or go on with one that was interrupted; `keep_images`: with those
    that are in memory.

    Raises:
        ValueError: There is no image, or none can be read, or the interrupted index was of other images.
    """
    writer = IndexWriter(directory, facts, resume=True)
    digest = SourceDigest()
    consumed = _pass_over(writer.progress, sources, digest)
    checkpointed = consumed
    stream = read_ahead(sources, embed.load, num_workers, ahead=2 * batch_size)
    with tqdm(total=total, initial=consumed, desc="Indexing images", disable=not show_progress) as bar:
        while batch := list(islice(stream, batch_size)):
            _add_batch(writer, digest, embed, batch, keep_images)
            consumed += len(batch)
            bar.update(len(batch))
            if consumed - checkpointed >= CHECKPOINT_EVERY:
                writer.checkpoint({"consumed": consumed, "digest": digest.hexdigest()})
                checkpointed = consumed
    skipped = writer.reasons()
    causes = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    summary = f"Indexed {writer.count:,} of {consumed:,} images; skipped {sum(skipped.values()):,}"
    if not writer.count:
        writer.discard()  # there is nothing to go on with; by the next call the images may be there
        raise ValueError(f"An index needs at least one image. {summary}{': ' + causes if causes else ''}.")
    writer.checkpoint({"consumed": consumed, "digest": digest.hexdigest()})
    writer.finish()
    if skipped:
        logger.warning("%s: %s. The index's `skipped` lists them.", summary, causes)


def is_built(directory: Path, sources: Iterator[ImageSource], facts: dict[str, Any]) -> bool:
    """Whether `directory` holds the whole index of these very images; `sources` is used up if it holds a whole one.

    Raises:
        ValueError: It holds the whole index of other images, or by another model.
    """
    if not (directory / INDEX_FILE).is_file() or (directory / UNFINISHED_FILE).is_file():
        return False
    state, *_ = read_index_file(directory)
    digest = SourceDigest()
    for source in sources:
        digest.update(source)
    if digest.hexdigest() != state["progress"].get("digest") or any(state[name] != facts[name] for name in facts):
        raise ValueError(
            f"{directory} holds an index of other images, or by another model. Remove it, or build elsewhere."
        )
    return True


def _add_batch(writer: IndexWriter, digest: SourceDigest, embed: ImageEmbedder, batch: list[tuple], keep_images: bool):
    taken = set(writer.entries.positions([source.id for source, _, _ in batch]))
    good, skipped = [], []
    for source, pixels, error in batch:
        digest.update(source)
        if error is None and source.id not in taken:
            taken.add(source.id)
            good.append((source, pixels))
        else:
            skipped.append((source.id, source.name, error.reason if error else "id occurs twice"))
    if good:
        rows = embed([pixels for _, pixels in good]).to(getattr(torch, writer.state["dtype"]))
        for position, (source, _) in enumerate(good, writer.count):
            if keep_images and isinstance(source.image, Image.Image):
                writer.keep_image(position, source.image)
        writer.add(rows, [source.id for source, _ in good], [source.metadata for source, _ in good])
    writer.entries.skip(skipped)


def _pass_over(progress: dict[str, Any], sources: Iterator[ImageSource], digest: SourceDigest) -> int:
    """Go past the images that an interrupted build has dealt with; returns how many those are."""
    consumed = progress.get("consumed", 0)
    for source in islice(sources, consumed):
        digest.update(source)
    if consumed and digest.hexdigest() != progress["digest"]:
        raise ValueError("The images differ from those of the interrupted build. Build into another directory.")
    return consumed
