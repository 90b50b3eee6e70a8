"""Documents of texts and images to the token sequences that a model is trained on."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..messages_fromage import Part, as_parts, image_source, with_parts
from ..processing_fromage import FromageProcessor
from ..prompts_fromage import CaptionIds
from .bad_examples import BadExampleError
from .captions import check_text


class DocumentIds(NamedTuple):
    """A document as a sequence: BOS, texts, an image's placeholders where it stands, `[RET]` before those that may be
    retrieved.

    Args:
        input_ids: Token ids.
        labels: Targets of the texts and of `[RET]`, all its tokens, -100 at placeholders.
        finds: At a `[RET]`, the last of its tokens, the number, within the document, of the image that it is to find,
            -100 elsewhere.
    """

    input_ids: list[int]
    labels: list[int]
    finds: list[int]

    def without_rets(self, images: set[int], num_ret_tokens: int = 1) -> "DocumentIds":
        """The sequence without the `[RET]`s, of `num_ret_tokens` each, that are to find these images."""
        ends = [place for place, image in enumerate(self.finds) if image in images]
        gone = {end - back for end in ends for back in range(num_ret_tokens)}
        kept = [place for place in range(len(self.finds)) if place not in gone]
        return DocumentIds(*([values[place] for place in kept] for values in self))


class DocumentLayout:
    """Lays documents out as the pipeline lays out prompts: texts as they are, or by the chat template; and answers of
    the model as it generates them, with `[RET]` and then the image, if images are fed back.

    Args:
        processor ([`FromageProcessor`]): Tokenizer, chat template and token ids.
        max_length (`int`): Tokens of a document. What is beyond is left out; no image is cut.
    """

    def __init__(self, processor: FromageProcessor, max_length: int):
        self.processor, self.max_length = processor, max_length

    def encode(self, document: dict[str, Any]) -> tuple[DocumentIds, list[Any]]:
        """The sequence of a document, and its images as they were given.

        Args:
            document: `{"document": [...]}`, texts and images, or parts of messages; every image is to be found from
                what stands before it, if anything does. Or `{"messages": [...]}`, as in transformers' chat format,
                where those of the assistant are to be found.

        Raises:
            BadExampleError: It is malformed, a text contains a special token, or there is no image in `max_length`.
        """
        try:
            text, images = self.text_of(document)
        except BadExampleError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise BadExampleError("malformed document", str(error)[:200]) from error
        whole = self.processor.token_ids(text)
        self._check_images(whole, len(images))
        ids = self._sequence(whole)
        count = ids.input_ids.count(self.processor.image_token_id) // self.processor.num_image_tokens
        if not count:
            found = "none" if not images else f"the first of {len(images)} is beyond {self.max_length} tokens"
            raise BadExampleError("document without an image", found)
        if all(label == -100 for label in ids.labels):
            raise BadExampleError("document without a text", "and none of its images has anything before it")
        return ids, images[:count]

    def text_of(self, document: dict[str, Any]) -> tuple[str, list[Any]]:
        """A document as a text, not cut, with `<|image|>` and `[RET]`; and its images."""
        if "messages" in document:
            return self._of_messages(document["messages"])
        parts = with_rets(as_parts(_listed(document["document"])))
        return self.processor.join_parts(_checked(parts, self.processor)), _images(parts)

    def _check_images(self, ids: list[int], count: int) -> None:
        """Raise a `BadExampleError` where a chat template leaves images out, repeats them, or parts them from their
        `[RET]`."""
        image_id, last_ret = self.processor.image_token_id, self.processor.ret_token_ids[-1]
        shown = ids.count(image_id) // self.processor.num_image_tokens
        alone = sum(now == last_ret and after != image_id for now, after in itertools.pairwise([*ids, None]))
        if shown != count or alone:
            told = f"the chat template shows {shown} of {count} images, and {alone} apart from their [RET]"
            raise BadExampleError("malformed document", told)

    def _of_messages(self, messages: Any) -> tuple[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        for message in _listed(messages):
            message = with_parts(message)
            parts = message["content"]
            if message.get("role") == "assistant":
                parts = with_rets(parts, is_first=not rows)
            rows.append({**message, "content": _checked(parts, self.processor)})
        images = [image for message in rows for image in _images(message["content"])]
        return self.processor.apply_chat_template(rows, tokenize=False), images  # type: ignore[return-value]  # a text

    def _sequence(self, ids: list[int]) -> DocumentIds:
        """The first tokens of a document, with their targets."""
        image_id, k = self.processor.image_token_id, self.processor.num_image_tokens
        *_, last_ret = ret_ids = self.processor.ret_token_ids
        end = min(len(ids), self.max_length)
        if end < len(ids):  # not within an image or a [RET], nor between them
            while end and (
                ids[end] in ret_ids[1:]
                or (ids[end] == image_id and (ids[:end].count(image_id) % k or ids[end - 1] == last_ret))
            ):
                end -= 1
        ids = ids[:end]
        finds, images = [], 0
        for token in ids:
            finds.append(images // k if token == last_ret else -100)
            images += token == image_id
        labels = [-100 if token == image_id else token for token in ids]
        return DocumentIds(ids, labels, finds)


def sequences_of(
    examples: Sequence[dict[str, Any]], captions: Sequence[CaptionIds]
) -> tuple[list[DocumentIds], list[int]]:
    """The sequences of a batch's examples, `[RET]`s with the number of their image in the batch; and the numbers of the
    images of the pairs among them, of which `captions` are the captions."""
    rows, of_pairs, pairs, images = [], [], iter(captions), 0
    for example in examples:
        if "document_ids" in example:
            ids = example["document_ids"]
            rows.append(ids._replace(finds=[image if image == -100 else images + image for image in ids.finds]))
            images += example["num_images"]
        else:
            caption = next(pairs)
            rows.append(DocumentIds(caption.input_ids, caption.labels, [-100] * len(caption.input_ids)))
            of_pairs.append(images)
            images += 1
    return rows, of_pairs


def _listed(parts: Any) -> Sequence[Any]:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"Expected a list of texts and images, or of messages, got {str(parts)[:100]!r}.")
    return parts


def _checked(parts: Sequence[Part], processor: FromageProcessor) -> list[Part]:
    for part in parts:
        if part["type"] == "text":
            check_text(part["text"], processor, "text")
    return list(parts)


def with_rets(parts: Sequence[Part], is_first: bool = True) -> list[Part]:
    """Parts with a `[RET]` before each image but one that nothing precedes, or blank texts: the first, where
    `is_first`."""
    found: list[Part] = []
    for part in parts:
        if part["type"] == "ret":
            raise ValueError("A document has its [RET]s from its images. Leave parts of type 'ret' out.")
        if part["type"] == "image" and not is_first:
            found.append({"type": "ret"})
        is_first = is_first and part["type"] == "text" and not has_words(part)
        found.append({name: value for name, value in part.items() if name != "ret_index"})
    return found


def has_words(part: Part) -> bool:
    """Whether it is a text that is not blank: an image is found from no other."""
    return part["type"] == "text" and bool(part["text"].strip())


def _images(parts: Sequence[Part]) -> list[Any]:
    return [image_source(part) for part in parts if part["type"] == "image"]


__all__ = ["DocumentIds", "DocumentLayout", "has_words", "sequences_of", "with_rets"]
