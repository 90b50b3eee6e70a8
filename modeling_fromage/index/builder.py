"""Build an index into a folder: read ahead, embed in batches, save checkpoints, resume after a kill."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch.nn import functional as F

from ..images_fromage import ImageLimits, UnreadableImageError, load_rgb_image
from .folder import INDEX_FILE
from .reading import UNFINISHED_FILE, IndexParts, open_index, read_listing
from .saving import save_index
from .sources import ImageSource, ImageSources, SourceDigest, image_sources, read_ahead
from .store import check_dtype
from .stores import check_backend, has_backend, on_this_machine, with_backend
from .writer import IndexWriter, one_at_a_time

logger = logging.getLogger(__name__)
CHECKPOINT_EVERY = 1024  # images


class EmbeddingModel(Protocol):
    """What an index needs of a model: [`FromageForConditionalGeneration`] has it."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> Any: ...

    def get_image_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor: ...

    def retrieval_fingerprint(self) -> str: ...


class ImageProcessorHolder(Protocol):
    """What an index needs of a processor: [`FromageProcessor`] has it."""

    @property
    def image_processor(self) -> Any: ...


class ImageEmbedder:
    """Images to pixels, in threads, and pixels to unit-norm embeddings, in batches."""

    def __init__(self, model: EmbeddingModel, processor: ImageProcessorHolder, limits: ImageLimits):
        self.model, self.processor, self.limits = model, processor, limits

    def load(self, image: Any) -> torch.Tensor:
        """Pixels (channels, height, width) of one image."""
        if isinstance(image, UnreadableImageError):
            raise image
        rgb = load_rgb_image(image, self.limits)
        return self.processor.image_processor(rgb, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def __call__(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings (n, q) of a batch of pixels."""
        embeds = self.model.get_image_embeds(torch.stack(pixels).to(self.model.device)).float().cpu()
        if not torch.isfinite(embeds).all():
            raise ValueError(
                "The model's image embeddings contain NaN or infinite values; check its weights and dtype."
            )
        return F.normalize(embeds, dim=-1)


def build_index(
    model: EmbeddingModel,
    processor: ImageProcessorHolder,
    images: Any,
    ids: Sequence[str] | None,
    metadata: Sequence[dict[str, Any]] | None,
    batch_size: int,
    save_directory: str | os.PathLike[str] | None,
    dtype: torch.dtype,
    num_workers: int,
    limits: ImageLimits,
    show_progress: bool,
    shard: tuple[int, int] | None,
    backend: str,
    backend_options: dict[str, Any],
) -> IndexParts:
    """Build an index of `images`, or open the one that `save_directory` holds. Arguments and errors as for
    [`FromageImageIndex.build`]."""
    check_dtype(dtype)
    check_backend(backend, backend_options)
    sources = image_sources(images, ids, metadata, shard)
    header = {
        "dim": model.config.projection_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "model": model.retrieval_fingerprint(),
        "image_root": sources.root,
        "may_read_files": True,
        **({} if sources.shards is None else {"shards_digest": sources.shards}),
        **({} if shard is None else {"shard": f"{shard[0]}/{shard[1]}"}),
    }
    in_memory = isinstance(images, (list, tuple))  # the caller holds these in any case
    with contextlib.ExitStack() as stack:
        directory = Path(save_directory or stack.enter_context(tempfile.TemporaryDirectory()))
        with one_at_a_time(directory):  # a process that was given up may still be at it
            if not _is_built(directory, sources, header):
                keep, embedder = in_memory and save_directory is not None, ImageEmbedder(model, processor, limits)
                _write_index(directory, header, sources, embedder, batch_size, num_workers, show_progress, keep,
                             may_be_empty=shard is not None)  # fmt: skip
        parts = open_index(directory, sources.root, backend_options.get("token"))
        parts.access.may_read_files = True  # as the caller says
        if save_directory is None:
            held = image_sources(images, ids, metadata)[0] if in_memory else ()
            on_this_machine(parts.store).into_memory(
                (row.id, row.image) for row in held if isinstance(row.image, Image.Image)
            )
            parts.access.folder = None
    if not has_backend(parts.store, backend, backend_options):
        parts = parts._replace(store=with_backend(parts.store, backend, backend_options))
        if save_directory is not None:
            progress = read_listing(directory, INDEX_FILE)[0]["progress"]  # the next call is to open it
            save_index(directory, *parts, progress=progress)
    return parts


def _write_index(
    directory: Path,
    header: dict[str, Any],
    sources: ImageSources,
    embed: ImageEmbedder,
    batch_size: int,
    num_workers: int,
    show_progress: bool,
    keep_images: bool,
    may_be_empty: bool,
) -> None:
    writer = IndexWriter(directory, header, resume=True)
    digest = SourceDigest()
    consumed = _pass_over(writer.progress, sources.images, digest)
    checkpointed = consumed
    stream = read_ahead(sources.images, embed.load, num_workers, ahead=2 * batch_size)
    with tqdm(total=sources.total, initial=consumed, desc="Indexing images", disable=not show_progress) as bar:
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
    if not writer.count and not may_be_empty:  # a shard may be, and then tells what it left out
        writer.discard()  # nothing to resume; by the next call the images may be there
        raise ValueError(f"An index needs at least one image. {summary}{': ' + causes if causes else ''}.")
    writer.checkpoint({"consumed": consumed, "digest": digest.hexdigest()})
    writer.finish()
    if skipped:
        logger.warning("%s: %s. The index's `skipped` lists them.", summary, causes)


def _is_built(directory: Path, sources: ImageSources, header: dict[str, Any]) -> bool:
    """Whether `directory` holds the finished index of these very images. If it holds a finished one, `sources` may be
    used up.

    Raises:
        ValueError: It holds the finished index of other images, or by another model.
    """
    if not (directory / INDEX_FILE).is_file() or (directory / UNFINISHED_FILE).is_file():
        return False
    state, _ = read_listing(directory, INDEX_FILE)
    # Of shards the header tells, and no image need be read again.
    known = state["progress"].get("digest") if sources.shards is None else sources.shards
    if sources.digest() != known or any(state.get(name) != value for name, value in header.items()):
        raise ValueError(
            f"{directory} holds an index of other images, or by another model. Remove it, or build elsewhere."
        )
    return True


def _add_batch(
    writer: IndexWriter, digest: SourceDigest, embed: ImageEmbedder, batch: list[tuple], keep_images: bool
) -> None:
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
    """Skip the images that an interrupted build has dealt with, and return their number."""
    consumed = progress.get("consumed", 0)
    for source in islice(sources, consumed):
        digest.update(source)
    if consumed and digest.hexdigest() != progress["digest"]:
        raise ValueError("The images differ from those of the interrupted build. Build into another directory.")
    return consumed
