"""Loads and encodes the images of an evaluation once, and records which are unusable."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor, UnreadableImageError
from modeling_fromage.file_writing_fromage import replace_file
from modeling_fromage.images_fromage import DEFAULT_LIMITS, is_url, load_rgb_image
from modeling_fromage.index.sources import ImageSource, read_ahead
from modeling_fromage.io.fetching import fetch

from .dual_encoder import DualEncoder

SQUASHED_SIZE = (224, 224)  # the authors' evaluations resize to it before CLIP's own preprocessing


@dataclass
class EncodedImages:
    """Encoded images, on the CPU in fp32.

    Attributes:
        ids: Ids of N images.
        features: Pooled features (N, vision_width).
        dual_embeds: Embeddings (N, d) of a dual encoder.
        skipped: Why other images are unusable, by id.
    """

    ids: list[str]
    features: torch.Tensor
    dual_embeds: torch.Tensor | None
    skipped: dict[str, str]

    def __post_init__(self) -> None:
        self.rows = {image_id: row for row, image_id in enumerate(self.ids)}

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.rows

    def rows_of(self, ids: list[str]) -> list[int]:
        return [self.rows[image_id] for image_id in ids]

    def report(self) -> dict[str, Any]:
        return {"used": len(self.ids), "not_usable": dict(Counter(self.skipped.values()))}


@dataclass
class _Loader:
    """Loads an image, given its id and source, as pixels for the vision tower and the dual encoder. Runs in threads."""

    processor: FromageProcessor
    squash: bool
    dual_encoder: DualEncoder | None
    keep_in: Path | None

    def __call__(self, source: tuple[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        image_id, where = source
        if where is None:
            raise UnreadableImageError(image_id, "missing")
        if not is_url(where):
            image = load_rgb_image(where)
        else:
            if self.keep_in is not None and not re.fullmatch(r"[\w-]{1,100}", image_id):
                raise UnreadableImageError(image_id, "id that is no file name")
            try:
                image = load_rgb_image(where) if self.keep_in is None else _download(where, self.keep_in / image_id)
            except UnreadableImageError as error:
                raise UnreadableImageError(where, f"URL: {error.reason}") from error
        image = image.resize(SQUASHED_SIZE) if self.squash else image
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels, None if self.dual_encoder is None else self.dual_encoder.pixels(image)


@torch.no_grad()
def encode_images(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    sources: Mapping[str, Any],
    squash: bool = False,
    dual_encoder: DualEncoder | None = None,
    batch_size: int = 32,
    keep_in: Path | None = None,
) -> EncodedImages:
    """Run the frozen vision encoder and the image encoder of `dual_encoder` once over images.

    Args:
        sources: Image sources for [`load_rgb_image`] by id; `None` for a missing image.
        squash: Resize images to 224 x 224 first, without keeping the aspect ratio, as the authors' evaluations do.
        keep_in: Folder in which downloaded images are kept for the next run.

    Raises:
        ValueError: No image can be used.
    """
    ids, features, embeds, skipped = [], [], [], {}

    def readable() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        pairs = (ImageSource((image_id, where), image_id) for image_id, where in sources.items())
        load = _Loader(processor, squash, dual_encoder, keep_in)
        results = read_ahead(pairs, load, workers=8, ahead=2 * batch_size)
        for source, pixels, error in tqdm(results, total=len(sources), desc="Encoding images"):
            if error is None:
                ids.append(source.id)
                yield pixels
            else:
                skipped[source.id] = error.reason

    loaded = readable()
    while batch := list(islice(loaded, batch_size)):
        pixels, dual_pixels = zip(*batch, strict=True)
        features.append(model.get_pooled_image_features(torch.stack(pixels).to(model.device)).float().cpu())
        if dual_encoder is not None:
            embeds.append(dual_encoder.image_embeds(torch.stack(dual_pixels)))
    if not ids:
        raise ValueError(f"None of {len(sources)} images can be used: {dict(Counter(skipped.values()))}.")
    return EncodedImages(ids, torch.cat(features), torch.cat(embeds) if embeds else None, skipped)


def _download(url: str, path: Path) -> Image.Image:
    """The image at a URL, as RGB; the file is kept at `path`, with the suffix of its format."""
    data = fetch(url)
    image = load_rgb_image({"bytes": data, "path": url})
    with Image.open(io.BytesIO(data), formats=DEFAULT_LIMITS.formats) as opened:
        suffix = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(opened.format, opened.format.lower())
    replace_file(path.with_name(f"{path.name}.{suffix}"), data)
    return image
