"""What the images of documents are found by: the last texts before them, or all."""

import re
from collections.abc import Sequence
from typing import Any

from ..messages_fromage import Part, as_parts, with_parts
from ..processing_fromage import FromageProcessor
from ..prompts_fromage import token_id
from .document_sequences import DocumentIds, DocumentLayout, has_words

CONTEXT_TEXTS = (None, 4, 2, 1)  # of a context in the warm start; all, first, is what is evaluated
Prompt = tuple[int, ...]


def last_parts(before: Sequence[Part], texts: int | None, with_images: bool) -> list[Part]:
    """The last `texts` texts of what stands before an image, or all; with the images from the first of these on."""
    found: list[Part] = []
    for part in reversed(before):
        if texts is not None and sum(each["type"] == "text" for each in found) == texts:
            break
        if with_images or part["type"] == "text":
            found.append(part)
    return found[::-1]


def last_tokens(processor: FromageProcessor, ids: list[int], count: int) -> list[int]:
    """A prompt that is longer than `count` tokens: BOS, behind leading images as in any prompt, and its last tokens,
    without the rest of an image or of a `[RET]` that is cut."""
    if len(ids) <= count:
        return ids
    bos = [token_id(processor.tokenizer, processor.bos_text)] if processor.bos_text else []
    kept = ids[len(ids) - count + len(bos) :]
    torn, image = processor.ret_token_ids[1:], processor.image_token_id
    while kept and (kept[0] in torn or kept.count(image) % processor.num_image_tokens):
        kept = kept[1:]
    start = next((place for place, token in enumerate(kept) if token != image), len(kept))
    has_bos = kept[start : start + 1] == bos  # not elsewhere: it may be the token that ends texts, too
    return kept if has_bos else kept[:start] + bos + kept[start:]


def text_contexts(
    processor: FromageProcessor, document: dict[str, Any], ids: DocumentIds, max_length: int
) -> dict[int, list[Prompt]]:
    """Of each image of a document that is to be found and has words before it, by its number: the prompts that find it
    by texts alone, token ids that end in `[RET]`, different ones. Of a list of texts and images these are the last
    texts, as many as `CONTEXT_TEXTS`; of a chat all that stands before the image.

    Args:
        document: As of [`document_of`].
        ids ([`DocumentIds`]): Its sequence, which may end before some of its images.
        max_length (`int`): Tokens of a prompt. A longer one loses its beginning.
    """
    found = {image for image in ids.finds if image != -100}
    if "messages" in document:
        text, _ = DocumentLayout(processor, max_length).text_of(document)
        contexts = _of_chat(processor, document["messages"], text)
    else:
        contexts = _of_parts(processor, as_parts(document["document"]))
    return {
        image: list(dict.fromkeys(tuple(last_tokens(processor, processor.token_ids(t), max_length)) for t in texts))
        for image, texts in contexts.items()
        if image in found and texts
    }


def _of_parts(processor: FromageProcessor, parts: Sequence[Part]) -> dict[int, list[str]]:
    places = [place for place, part in enumerate(parts) if part["type"] == "image"]
    contexts = {
        image: [last_parts(parts[:place], texts, with_images=False) for texts in CONTEXT_TEXTS]
        for image, place in enumerate(places)
    }
    return {
        image: [processor.join_parts([*context, {"type": "ret"}]) for context in own if any(map(has_words, context))]
        for image, own in contexts.items()
    }


def _of_chat(processor: FromageProcessor, messages: Sequence[Any], text: str) -> dict[int, list[str]]:
    """What of a chat, rendered as `text`, stands before each image that has a `[RET]`, without images and theirs. As a
    text again, for a tokenizer may join what an image has parted."""
    run, image_token = "".join(processor.ret_tokens), processor.image_token
    told = _told(messages)
    contexts: dict[int, list[str]] = {}
    before, images = "", 0
    for piece in re.split(f"({re.escape(run)}|{re.escape(image_token)})", text):
        if piece == image_token:
            images += 1
        elif piece != run:
            before += piece
        elif images in told:
            contexts[images] = [before + run]
    return contexts


def _told(messages: Sequence[Any]) -> set[int]:
    """The images of a chat that words of its messages stand before: not those of its template alone."""
    parts = [part for message in messages for part in with_parts(message)["content"]]
    images = [place for place, part in enumerate(parts) if part["type"] == "image"]
    first = next((place for place, part in enumerate(parts) if has_words(part)), len(parts))
    return {image for image, place in enumerate(images) if place > first}


__all__ = ["CONTEXT_TEXTS", "Prompt", "last_parts", "last_tokens", "text_contexts"]
