"""What the images of documents are found by: the last texts before them, or all."""

from collections.abc import Sequence
from typing import Any

from ..messages_fromage import Part, as_parts
from ..processing_fromage import FromageProcessor
from ..prompts_fromage import token_id
from .document_sequences import DocumentIds

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
    """A prompt that is longer than `count` tokens: BOS, and its last tokens, without the rest of an image that is
    cut."""
    if len(ids) <= count:
        return ids
    bos = [token_id(processor.tokenizer, processor.bos_text)] if processor.bos_text else []
    kept = ids[len(ids) - count + len(bos) :]
    while kept.count(processor.image_token_id) % processor.num_image_tokens:
        kept = kept[1:]
    return kept if bos and bos[0] in kept else bos + kept


def text_contexts(
    processor: FromageProcessor, document: dict[str, Any], ids: DocumentIds, max_length: int
) -> dict[int, list[Prompt]]:
    """Of each image of a document that is to be found and has a text before it, by its number: the prompts that find
    it by texts alone, token ids that end in `[RET]`, different ones. Of a list of texts and images these are the last
    texts, as many as `CONTEXT_TEXTS`; of a chat all that stands before the image.

    Args:
        document: As of [`document_of`].
        ids ([`DocumentIds`]): Its sequence, which may end before some of its images.
        max_length (`int`): Tokens of a prompt. A longer one loses its beginning.
    """
    if "messages" in document:
        prompts = {image: [prompt] for image, prompt in _before_images(processor, ids).items()}
    else:
        found = {image for image in ids.finds if image != -100}
        parts = as_parts(document["document"])
        places = [place for place, part in enumerate(parts) if part["type"] == "image"]
        prompts = {
            image: [
                processor.token_ids(processor.join_parts([*last_parts(parts[:place], texts, False), {"type": "ret"}]))
                for texts in CONTEXT_TEXTS
            ]
            for image, place in enumerate(places)
            if image in found and any(part["type"] == "text" for part in parts[:place])
        }
    return {
        image: list(dict.fromkeys(tuple(last_tokens(processor, prompt, max_length)) for prompt in own))
        for image, own in prompts.items()
    }


def _before_images(processor: FromageProcessor, ids: DocumentIds) -> dict[int, list[int]]:
    """The tokens before each image that is to be found, without images and their `[RET]`s, and `[RET]`."""
    rets, texts = processor.ret_token_ids, {}
    text: list[int] = []
    for token, image in zip(ids.input_ids, ids.finds, strict=True):
        if image != -100 and text:
            texts[image] = [*text, *rets]
        if token != processor.image_token_id and token not in rets:
            text.append(token)
    return texts


__all__ = ["CONTEXT_TEXTS", "Prompt", "last_parts", "last_tokens", "text_contexts"]
