"""The quickstart's backbones and data, its images encoded once, and an index of them."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from modeling_fromage import (
    FromageForConditionalGeneration,
    FromageImageIndex,
    FromageProcessor,
    UnreadableImageError,
)
from modeling_fromage.images_fromage import is_url, load_rgb_image

from ..data.captioned_images import load_captioned_images

logger = logging.getLogger(__name__)


class Sources(NamedTuple):
    """Backbones, each a Hub id or a folder, and datasets of captioned images."""

    language_model: str
    vision_model: str
    train: Dataset
    held_out: Dataset


def prepare(output: Path, language_model: str | None, vision_model: str | None, data: str | None) -> Sources:
    """The given backbones and data; those that are not given come from packages and are written below `output`."""
    if not (language_model and vision_model and data):
        from . import emoji

        language_model = language_model or str(emoji.convert_language_model(output / "backbones/language_model"))
        vision_model = vision_model or str(emoji.convert_vision_model(output / "backbones/vision_model"))
    if data:
        parts = load_captioned_images(data).train_test_split(test_size=0.1, seed=0)
        return Sources(language_model, vision_model, parts["train"], parts["test"])
    train, held_out = (load_captioned_images(str(table)) for table in emoji.render_emoji(output / "data"))
    return Sources(language_model, vision_model, train, held_out)


@dataclass
class Split:
    """Captions, image files and the encoder's pooled features `(N, vision_width)` of one side of the data."""

    captions: list[str]
    images: list[str]
    features: torch.Tensor

    def dataset(self) -> Dataset:
        """Rows for the collator."""
        columns = {"pooled_image_features": self.features.numpy(), "caption": self.captions}
        return Dataset.from_dict(columns).with_format("torch")


@torch.no_grad()
def encode(
    dataset: Dataset,
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    folder: Path,
    batch_size: int = 8,
) -> Split:
    """Run the frozen vision encoder once over a dataset.

    Images from URLs or inside the dataset are saved in `folder`, because the report shows them later. Unreadable images
    are skipped.

    Raises:
        ValueError: No image can be read.
    """
    captions, files, features = [], [], []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Encoding images"):
        rows, images = dataset[start : start + batch_size], []
        for number, (source, caption) in enumerate(zip(rows["image"], rows["caption"], strict=True), start):
            try:
                images.append(load_rgb_image(source))
            except UnreadableImageError as error:
                logger.warning("%s", error)
                continue
            captions.append(caption)
            files.append(_as_file(source, images[-1], folder / f"{number:06d}.png"))
        if images:
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            features.append(model.get_pooled_image_features(pixels).float())
    if not files:
        raise ValueError(f"None of the {len(dataset)} images can be read. Check the paths or URLs in your data.")
    return Split(captions, files, torch.cat(features))


def _as_file(source: Any, image: Image.Image, path: Path) -> str:
    """The file that an image was read from; an image that came from elsewhere is saved to `path`."""
    where = source if not isinstance(source, dict) else None if source.get("bytes") else source.get("path")
    if where is not None and not is_url(where):
        return str(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def make_index(model: FromageForConditionalGeneration, splits: Sequence[Split]) -> tuple[FromageImageIndex, Path]:
    """An index of all images with their captions and paths, and the folder that contains them.

    An image that occurs several times keeps its first caption.
    """
    files = [file for split in splits for file in split.images]
    captions = [caption for split in splits for caption in split.captions]
    first: dict[str, int] = {}
    for row, file in enumerate(files):
        first.setdefault(file, row)
    rows = list(first.values())
    paths = [str(Path(files[row]).resolve()) for row in rows]
    index = FromageImageIndex(
        model.get_image_embeds(pooled_image_features=torch.cat([split.features for split in splits])[rows]),
        list(first),
        [{"caption": captions[row], "path": path} for row, path in zip(rows, paths, strict=True)],
        model_fingerprint=model.retrieval_fingerprint(),
    )
    return index, Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
