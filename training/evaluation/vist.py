"""Contextual image retrieval on Visual Storytelling (VIST): the fifth image of a story from what comes before it.

Section 4.1 of the paper, by the authors' script with its quirks or without them: see [`PROTOCOLS`].
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .dual_encoder import DualEncoder
from .files import find_images, read_json
from .images import EncodedImages, encode_images
from .metrics import rank_metrics, target_ranks
from .prompts import embed_prompts, has_special_token, image_embeds, image_text, is_too_long

LENGTH = 5  # sentences and photos of a story
SETTINGS = {"1 caption": (1, 0), "5 captions": (5, 0), "5 captions + 4 images": (5, 4)}  # captions, images of a prompt
MASKS = {
    "shown": "images of the prompt are no candidates",
    "story": "the story's first four images are no candidates",
    "none": "every image of the gallery is a candidate",
}


@dataclass(frozen=True)
class VistProtocol:
    """How stories become prompts, and photos pixels.

    Attributes:
        url_fields: Fields of the file that name a photo's address, the first that is there.
        sort_sentences: Whether sentences are put in the order of the story; else that of the file.
        allow_empty_sentences: Whether a story with an empty sentence counts.
        bos_before_captions: Whether every caption has a BOS of its own and stands as the file has it; else the prompt
            has one, and captions are stripped and joined by blanks.
        squash_images: Whether photos are first resized to 224 x 224, aspect ratio not kept.
        first_projection_only: Whether the first text projection is put on the last hidden state, whatever layers the
            model has its projections for.
    """

    url_fields: tuple[str, ...]
    sort_sentences: bool
    allow_empty_sentences: bool
    bos_before_captions: bool
    squash_images: bool
    first_projection_only: bool


PROTOCOLS = {
    "paper": VistProtocol(
        url_fields=("url_o",),
        sort_sentences=False,
        allow_empty_sentences=True,
        bos_before_captions=True,
        squash_images=True,
        first_projection_only=True,
    ),
    "corrected": VistProtocol(
        url_fields=("url_o", "url_m"),
        sort_sentences=True,
        allow_empty_sentences=False,
        bos_before_captions=False,
        squash_images=False,
        first_projection_only=False,
    ),
}


@dataclass
class Story:
    """Captions of five photos, in order, and the photos' Flickr ids."""

    id: str
    captions: list[str]
    photos: list[str]


@dataclass
class Stories:
    """Stories of SIS files, each photo's URL (`None` where it has none), and entries that are left out, counted."""

    stories: list[Story] = field(default_factory=list)
    photos: dict[str, str | None] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)


def read_stories(paths: Sequence[Path], protocol: VistProtocol = PROTOCOLS["paper"]) -> Stories:
    """Read `{train,val,test}.story-in-sequence.json` files (SIS).

    Raises:
        ValueError: A file is not of that format, or has no story.
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
    """The URL of each photo, and the sentences of each story, in the order of the files."""
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
    model: Any, processor: Any, stories: Stories, folder: Path, download: bool, protocol: VistProtocol, **kwargs: Any
) -> EncodedImages:
    """The photos that a story names, from `folder` by their ids; with `download`, missing ones are fetched into it.

    Without, a missing photo is left out, and so are the stories that need it.
    """
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    files = find_images(folder)
    sources = {photo: files.get(photo) or (url if download else None) for photo, url in stories.photos.items()}
    return encode_images(model, processor, sources, protocol.squash_images, keep_in=folder, **kwargs)


def prompt(processor: Any, story: Story, captions: int, images: int, protocol: VistProtocol) -> str:
    """The last `captions` captions of a story, each of the first `images` followed by its image, then `[RET]`."""
    texts = story.captions[-captions:]
    if protocol.bos_before_captions:
        bos = processor.bos_text
        parts = [bos + text + (image_text(processor) if i < images else "") for i, text in enumerate(texts)]
        return "".join(parts) + processor.ret_token
    parts = [text.strip() + (image_text(processor) if i < images else "") for i, text in enumerate(texts)]
    return processor.retrieval_text(" ".join(parts))


def score(
    model: Any,
    processor: Any,
    stories: list[Story],
    photos: EncodedImages,
    setting: str,
    protocol: VistProtocol,
    **kwargs: Any,
) -> torch.Tensor:
    """The cosine (stories, photos) of each story's prompt and each photo of the gallery."""
    captions, images = SETTINGS[setting]
    prompts = [prompt(processor, story, captions, images, protocol) for story in stories]
    features = [photos.features[photos.rows_of(story.photos[:images])] for story in stories]
    texts = embed_prompts(
        model, processor, prompts, features, first_projection_only=protocol.first_projection_only, **kwargs
    )
    return texts @ image_embeds(model, photos.features).t()


def score_dual(dual_encoder: DualEncoder, stories: list[Story], photos: EncodedImages, setting: str) -> torch.Tensor:
    """The baseline's cosines (stories, photos): of the captions, joined; with images, of the mean of all embeddings."""
    captions, images = SETTINGS[setting]
    texts = dual_encoder.text_embeds([" ".join(story.captions[-captions:]) for story in stories])
    shown = [photos.dual_embeds[photos.rows_of(story.photos[:images])].sum(0) for story in stories]
    return F.normalize(texts + torch.stack(shown), dim=-1) @ photos.dual_embeds.t()


def ranks(scores: torch.Tensor, stories: list[Story], photos: EncodedImages, setting: str, mask: str) -> torch.Tensor:
    """The rank (stories,) of each story's last photo."""
    masked = {"shown": SETTINGS[setting][1], "story": LENGTH - 1, "none": 0}[mask]
    scores = scores.clone()
    for row, story in enumerate(stories):
        scores[row, photos.rows_of(story.photos[:masked])] = -torch.inf
    return target_ranks(scores, torch.tensor(photos.rows_of([story.photos[-1] for story in stories])))


def usable(
    model: Any, processor: Any, read: Stories, photos: EncodedImages, protocol: VistProtocol
) -> tuple[list[Story], Counter]:
    """The stories all of whose photos can be used, as in the authors' script; and why others are left out."""
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


def evaluate(
    model: Any,
    processor: Any,
    data: Sequence[Path],
    folder: Path,
    protocol: str = "paper",
    mask: str = "shown",
    download: bool = False,
    batch_size: int = 32,
    dual_encoder: DualEncoder | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recall of the fifth image in three settings; results, and the manifest of what was really used.

    Args:
        protocol: A key of [`PROTOCOLS`].
    """
    rules = PROTOCOLS[protocol]
    read = read_stories(data, rules)
    photos = encode_photos(
        model, processor, read, folder, download, rules, batch_size=batch_size, dual_encoder=dual_encoder
    )
    stories, left_out = usable(model, processor, read, photos, rules)
    settings = {}
    for name in SETTINGS:
        scores = score(model, processor, stories, photos, name, rules, batch_size=batch_size)
        settings[name] = {"ours": rank_metrics(ranks(scores, stories, photos, name, mask))}
        if dual_encoder is not None:
            scores = score_dual(dual_encoder, stories, photos, name)
            settings[name]["dual encoder"] = rank_metrics(ranks(scores, stories, photos, name, mask))
    results = {
        "settings": settings,
        "gallery": {"rule": "every usable image that a story of the files names", "N": len(photos.ids)},
        "masking": MASKS[mask],
        "denominator": {"rule": "usable stories of which all images are usable", "N": len(stories)},
        "images": photos.report(),
        "stories": {"read": len(read.stories) + sum(read.left_out.values()), "left_out": dict(left_out)},
    }
    manifest = {"gallery": photos.ids, "stories": [story.id for story in stories], "not_usable": photos.skipped}
    return results, manifest
