"""Prompts as their users give them: chats, and interleaved texts and images; what each part is, shows and may read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils.chat_template_utils import Chat

from .images_fromage import ImageLimits, UnreadableImageError, is_url, load_rgb_image

Part = dict[str, Any]  # of a message: {"type": "text", "text": ...}, {"type": "image", ...} or {"type": "ret"}
SINGLE_PARTS = (str, Image.Image, Path, dict)  # a prompt of one part need not be a list


@dataclass
class InterleavedPrompt:
    """Texts and images in order. As a plain list, transformers would take them for a batch."""

    parts: list[Any]


def as_prompt(prompt: Any) -> Chat | InterleavedPrompt:
    """A chat, or an interleaved prompt; a single text, image or message is a prompt too.

    Raises:
        ValueError: The prompt is empty, or of an unknown kind.
    """
    if isinstance(prompt, (Chat, InterleavedPrompt)):
        return prompt
    if isinstance(prompt, SINGLE_PARTS):
        prompt = [prompt]
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(
            f"Expected a text, a list of texts and images, or a list of messages, got {type(prompt)}. Give the prompts "
            'of a dataset as a generator: `pipe(row["text"] for row in dataset)`.'
        )
    prompt = list(prompt)
    if not prompt:
        raise ValueError("The prompt is empty. Give it a text or an image.")
    is_chat = all(isinstance(part, dict) and "role" in part for part in prompt)
    return Chat(prompt) if is_chat else InterleavedPrompt(prompt)


def with_parts(message: dict[str, Any], feed_images_back: bool = False) -> dict[str, Any]:
    """A message whose content is a list of parts."""
    content = message.get("content") or []
    content = content if isinstance(content, (list, tuple)) else [content]
    return {**message, "content": as_parts(content, feed_images_back)}


def as_parts(content: Sequence[Any], feed_images_back: bool = False) -> list[Part]:
    """Texts, images and parts as parts.

    Args:
        feed_images_back: Whether the images retrieved for a `[RET]` are shown to the model, after it.
    """
    parts = [as_part(part) for part in content]
    if not feed_images_back:
        return parts
    shown: list[Part] = []
    for ret, group in itertools.groupby(parts, key=lambda part: part.get("ret_index")):
        retrieved = list(group)
        shown += retrieved
        if ret is not None:
            shown += [{"type": "image", "image": part["image"]} for part in retrieved if part.get("image") is not None]
    return shown


def as_part(part: Any) -> Part:
    """A text, an image or a part of a message as a part.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, (Image.Image, Path)):
        return {"type": "image", "image": part}
    if isinstance(part, dict):
        part = {name: value for name, value in part.items() if value is not None}  # tables fill in absent keys
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part
        if part.get("type") in ("image", "ret"):
            return part
        if part.get("type") == "image_url" and "image_url" in part:  # as in OpenAI's messages
            url = part["image_url"]
            return {"type": "image", "url": url.get("url") if isinstance(url, dict) else url}
    raise ValueError(
        "Expected a text, a PIL image, a Path or a message's part of type 'text', 'image' or 'ret', got "
        f"{str(part)[:200]!r}."
    )


def shown_images(parts: Sequence[Part]) -> list[Part]:
    """The images among a message's parts that are shown to the model, in order: those that it did not retrieve."""
    return [part for part in parts if part["type"] == "image" and part.get("ret_index") is None]


def image_source(part: Part) -> Any:
    """The image that a part of type "image" names: the first of its "image", "url" and "path", or `None`."""
    return next((part[key] for key in ("image", "url", "path") if part.get(key) is not None), None)


def shown_ids(parts: Sequence[Part]) -> list[str]:
    """Ids of the images of an index among a message's parts."""
    return [part["id"] for part in parts if part["type"] == "image" and isinstance(part.get("id"), str)]


def images_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The images that messages show to the model, in order."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    sources = [image_source(part) for content in contents for part in shown_images(content)]
    return [source for source in sources if source is not None]


def read_image(part: Part, limits: ImageLimits, allow_local_files: bool) -> Image.Image:
    """Read the image of a message's part.

    Raises:
        ValueError: The part names no image.
        UnreadableImageError: The image cannot be read, or is a local file and these are not allowed.
    """
    source = image_source(part)
    if source is None:
        raise ValueError(f"An image of a prompt needs one of 'image', 'url' and 'path', got {sorted(part)}.")
    harmless = _harmless(source)
    if harmless is None and not allow_local_files:
        raise UnreadableImageError(
            str(source)[:200],
            "local files are refused",
            "an image is a URL, bytes, a PIL image or a Path; `allow_local_files=True` allows files' names",
        )
    return load_rgb_image(source if harmless is None else harmless, limits)


def _harmless(source: Any) -> Any:
    """`source`, if it cannot be a local file that a message's text chose; else `None`."""
    if isinstance(source, (bytes, bytearray)):
        return {"bytes": bytes(source)}
    if isinstance(source, dict) and isinstance(source.get("bytes"), (bytes, bytearray)) and source["bytes"]:
        return source  # its path is only a name
    if isinstance(source, dict) and not source.get("bytes"):
        source = source.get("path")
        return _harmless(source) if isinstance(source, str) else None
    if isinstance(source, str):
        source = str.__str__(source)  # a subclass may claim to be a URL and be read as a path
        return source if is_url(source) else None
    return source if isinstance(source, (Image.Image, Path)) else None


__all__ = [
    "InterleavedPrompt",
    "Part",
    "as_part",
    "as_parts",
    "as_prompt",
    "image_source",
    "images_of",
    "read_image",
    "shown_ids",
    "shown_images",
    "with_parts",
]
