"""Contextual image retrieval on Visual Storytelling (VIST): find a story's fifth image from what precedes it.

Section 4.1 of the paper. [`PROTOCOLS`] follow the authors' script, or correct its quirks.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.late_interaction_fromage import similarities

from .dual_encoder import DualEncoder
from .evaluator import Evaluation, Evaluator
from .files import find_images, read_json
from .images import EncodedImages, encode_images
from .metrics import rank_metrics, target_ranks
from .prompts import embed_prompts, has_special_token, image_embeds, is_too_long

LENGTH = 5  # sentences and photos of a story
SETTINGS = {"1 caption": (1, 0), "5 captions": (5, 0), "5 captions + 4 images": (5, 4)}  # captions, images of a prompt
MASKS = {
    "shown": "images of the prompt are no candidates",
    "story": "the story's first four images are no candidates",
    "none": "every image of the gallery is a candidate",
}


@dataclass(frozen=True)
class VistProtocol:
    """How stories become prompts and photos become pixels.

    Attributes:
        name: Value of `--protocol`, and its name in results files.
        url_fields: Fields of the file that may hold a photo's URL; the first one present is used.
        sort_sentences: Sort sentences in story order. Otherwise they keep the order of the file.
        allow_empty_sentences: Keep stories with an empty sentence.
        bos_before_captions: Put BOS before every caption and leave captions as they are. Otherwise the prompt has one
            BOS, and captions are stripped and joined with spaces.
        squash_images: Resize photos to 224 x 224 first, without keeping the aspect ratio.
        first_projection_only: Apply the first text projection to the last hidden state, whatever layers the model's
            projections are for.
    """

    name: str
    url_fields: tuple[str, ...]
    sort_sentences: bool
    allow_empty_sentences: bool
    bos_before_captions: bool
    squash_images: bool
    first_projection_only: bool


PAPER = VistProtocol(
    name="paper",
    url_fields=("url_o",),
    sort_sentences=False,
    allow_empty_sentences=True,
    bos_before_captions=True,
    squash_images=True,
    first_projection_only=True,
)
CORRECTED = VistProtocol(
    name="corrected",
    url_fields=("url_o", "url_m"),
    sort_sentences=True,
    allow_empty_sentences=False,
    bos_before_captions=False,
    squash_images=False,
    first_projection_only=False,
)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, CORRECTED)}


@dataclass
class Story:
    """The captions of five photos, in order, and the photos' Flickr ids."""

    id: str
    captions: list[str]
    photos: list[str]


@dataclass
class Stories:
    """Stories of SIS files, the URL of each photo (`None` if it has none), and counts of skipped entries by reason."""

    stories: list[Story] = field(default_factory=list)
    photos: dict[str, str | None] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)


def read_stories(paths: Sequence[Path], protocol: VistProtocol = PAPER) -> Stories:
    """Read `{train,val,test}.story-in-sequence.json` files (SIS).

    Raises:
        ValueError: A file does not have that format, or contains no story.
    """
    found = Stories()
    urls, sentences = _read_files(paths, protocol.url_fields)
    named: dict[str, None] = {}
    for story_id, rows in sentences.items():
        try:
            if protocol.sort_sentences:
                rows = sorted(rows, key=lambda row: int(row["worker_arranged_photo_order"]))
            story = Story(story_id, [row["text"] for row in rows], [str(row["photo_flickr_id"]) for row in rows])
            is_whole = all(isinstance(text, str) for text in story.captions)
        except (KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            found.left_out["a sentence without its text, photo or place"] += 1
            continue
        named.update(dict.fromkeys(story.photos))
        if len(rows) != LENGTH:
            found.left_out[f"not of {LENGTH} sentences"] += 1
        elif not protocol.allow_empty_sentences and not all(text.strip() for text in story.captions):
            found.left_out["a sentence is empty"] += 1
        else:
            found.stories.append(story)
    found.photos = {photo: url for photo, url in urls.items() if photo in named}  # in the order of the files
    found.photos.update({photo: None for photo in named if photo not in urls})
    if not found.stories:
        raise ValueError(f"{', '.join(map(str, paths))} have no story of {LENGTH} sentences: {dict(found.left_out)}.")
    return found


def _read_files(
    paths: Sequence[Path], url_fields: Sequence[str]
) -> tuple[dict[str, str | None], dict[str, list[dict[str, Any]]]]:
    """The URL of each photo and the sentences of each story, in file order."""
    urls: dict[str, str | None] = {}
    sentences: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        content = read_json(path)
        try:
            for photo in content["images"]:
                urls[str(photo["id"])] = next((photo[name] for name in url_fields if photo.get(name)), None)
            for (annotation,) in content["annotations"]:
                sentences[str(annotation["story_id"])].append(annotation)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not of VIST's SIS format ({type(error).__name__}: {error}): expected images with an id, "
                "and annotations, each a list of one with story_id, text and photo_flickr_id."
            ) from error
    return urls, sentences


def encode_photos(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    stories: Stories,
    folder: Path,
    download: bool,
    protocol: VistProtocol,
    **kwargs: Any,
) -> EncodedImages:
    """Encode the photos of all stories, found in `folder` by their ids.

    With `download`, missing photos are fetched into `folder`. Otherwise they are skipped, with the stories that need
    them.
    """
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    files = find_images(folder)
    sources = {photo: files.get(photo) or (url if download else None) for photo, url in stories.photos.items()}
    return encode_images(model, processor, sources, protocol.squash_images, keep_in=folder, **kwargs)


def prompt(processor: FromageProcessor, story: Story, captions: int, images: int, protocol: VistProtocol) -> str:
    """The last `captions` captions of a story, each of the first `images` followed by its image, then `[RET]`."""
    texts = story.captions[-captions:]
    shown = [processor.image_placeholders if i < images else "" for i in range(len(texts))]
    if protocol.bos_before_captions:
        parts = [processor.bos_text + text + image for text, image in zip(texts, shown, strict=True)]
        return processor.retrieval_text("".join(parts))
    parts = [text.strip() + image for text, image in zip(texts, shown, strict=True)]
    return processor.retrieval_text(" ".join(parts))


def score(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    stories: list[Story],
    photos: EncodedImages,
    setting: str,
    protocol: VistProtocol,
    **kwargs: Any,
) -> torch.Tensor:
    """Cosine similarities (stories, photos) of each story's prompt with each photo in the gallery."""
    captions, images = SETTINGS[setting]
    prompts = [prompt(processor, story, captions, images, protocol) for story in stories]
    features = [photos.features[photos.rows_of(story.photos[:images])] for story in stories]
    texts = embed_prompts(
        model, processor, prompts, features, first_projection_only=protocol.first_projection_only, **kwargs
    )
    return similarities(texts, image_embeds(model, photos.features))


def score_dual(dual_encoder: DualEncoder, stories: list[Story], photos: EncodedImages, setting: str) -> torch.Tensor:
    """The baseline's cosine similarities (stories, photos).

    Captions are joined into one text. With images, the query is the mean of the text and image embeddings.
    """
    captions, images = SETTINGS[setting]
    texts = dual_encoder.text_embeds([" ".join(story.captions[-captions:]) for story in stories])
    shown = [photos.dual_embeds[photos.rows_of(story.photos[:images])].sum(0) for story in stories]
    return F.normalize(texts + torch.stack(shown), dim=-1) @ photos.dual_embeds.t()


def ranks(scores: torch.Tensor, stories: list[Story], photos: EncodedImages, setting: str, mask: str) -> torch.Tensor:
    """Rank (stories,) of each story's last photo."""
    masked = {"shown": SETTINGS[setting][1], "story": LENGTH - 1, "none": 0}[mask]
    scores = scores.clone()
    for row, story in enumerate(stories):
        scores[row, photos.rows_of(story.photos[:masked])] = -torch.inf
    return target_ranks(scores, torch.tensor(photos.rows_of([story.photos[-1] for story in stories])))


def usable(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    read: Stories,
    photos: EncodedImages,
    protocol: VistProtocol,
) -> tuple[list[Story], Counter]:
    """Stories whose photos are all usable, as in the authors' script, and why the others are skipped."""
    stories, left_out = [], Counter(read.left_out)
    for story in read.stories:
        if not all(photo in photos for photo in story.photos):
            left_out["an image is not usable"] += 1
        elif has_special_token(processor, story.captions):
            left_out["a special token in a text"] += 1
        elif is_too_long(model, processor, prompt(processor, story, LENGTH, LENGTH - 1, protocol)):
            left_out["longer than the language model's context"] += 1
        else:
            stories.append(story)
    if not stories:
        raise ValueError(f"No story can be used: {dict(left_out)}; images: {photos.report()}.")
    return stories, left_out


@dataclass(kw_only=True)
class VistEvaluator(Evaluator):
    """Recall of a story's fifth image in three settings.

    Args:
        data: SIS files.
        images: Folder of photos named by their Flickr ids.
        protocol: One of [`PROTOCOLS`].
        mask: A key of [`MASKS`].
        download: Fetch missing photos into the folder.
    """

    name: ClassVar[str] = "vist"
    sections: ClassVar[Mapping[str, str]] = {"settings": "story_to_image"}
    protocols: ClassVar[Mapping[str, Any]] = PROTOCOLS

    data: Sequence[Path]
    images: Path
    protocol: VistProtocol = PAPER
    mask: str = "shown"
    download: bool = False

    @property
    def primary_metric(self) -> str:
        return "story_to_image_5_captions_4_images_R@1"

    @property
    def data_files(self) -> list[Path]:
        return list(self.data)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, nargs="+", required=True, help="val.story-in-sequence.json, ...")
        parser.add_argument("--images", type=Path, required=True, help="folder of photos named by their Flickr ids")
        parser.add_argument("--download", action="store_true", help="fetch missing photos into that folder")
        parser.add_argument(
            "--mask", choices=sorted(MASKS), default="shown", help="images excluded from the candidates"
        )

    def run(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> Evaluation:
        options = {"batch_size": self.batch_size, "dual_encoder": self.dual_encoder}
        read = read_stories(self.data, self.protocol)
        photos = encode_photos(model, processor, read, self.images, self.download, self.protocol, **options)
        stories, left_out = usable(model, processor, read, photos, self.protocol)
        settings: dict[str, dict[str, Any]] = {}
        for name in SETTINGS:
            scores = score(model, processor, stories, photos, name, self.protocol, batch_size=self.batch_size)
            settings[name] = {"ours": rank_metrics(ranks(scores, stories, photos, name, self.mask))}
            if self.dual_encoder is not None:
                scores = score_dual(self.dual_encoder, stories, photos, name)
                settings[name]["dual encoder"] = rank_metrics(ranks(scores, stories, photos, name, self.mask))
        results = {
            "settings": settings,
            "gallery": {"rule": "every usable image that a story of the files names", "N": len(photos.ids)},
            "masking": MASKS[self.mask],
            "denominator": {"rule": "usable stories of which all images are usable", "N": len(stories)},
            "images": photos.report(),
            "stories": {"read": len(read.stories) + sum(read.left_out.values()), "left_out": dict(left_out)},
        }
        manifest = {"gallery": photos.ids, "stories": [story.id for story in stories], "not_usable": photos.skipped}
        return Evaluation(results, manifest)
