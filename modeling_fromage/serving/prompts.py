"""Messages and inputs as OpenAI's clients send them, as prompts of the pipeline."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from ..image_search_fromage import ImageIndex
from .errors import ApiError
from .pictures import Links, read_picture
from .settings import ServerSettings

T = TypeVar("T")
Part = dict[str, Any]
_DOWNLOADS, _DECODERS = 32, 4  # threads: slow hosts hold up none but each other


class PromptReader:
    """Reads the texts and images of requests, within the server's limits.

    Args:
        settings ([`ServerSettings`]): The limits.
        index ([`ImageIndex`], *optional*): Where images that were shown are read from.
    """

    def __init__(self, settings: ServerSettings, index: ImageIndex | None):
        self.settings, self.index = settings, index
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, "downloads")
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoders")

    def close(self) -> None:
        for executor in (self._downloads, self._decoders):
            executor.shutdown(wait=False, cancel_futures=True)

    async def decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that reads or writes an image, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    async def messages(
        self, messages: list[dict[str, Any]], links: Links, feed_images_back: bool
    ) -> list[dict[str, Any]]:
        """A chat, with its images read.

        Raises:
            ApiError: A message or a part is of a kind that the model cannot read, or a limit is passed.
        """
        if not messages:
            raise ApiError(400, "`messages` is empty. Send at least one.", param="messages")
        read = [_message(message, f"messages[{i}]", links) for i, message in enumerate(messages)]
        await self._load([part for message in read for part in message["content"]], "messages", links, feed_images_back)
        return read

    async def parts(self, value: Any, param: str, links: Links) -> list[Part]:
        """A text, an image or a list of both, with its images read. Raises as [`messages`]."""
        parts = _filled(value, param)
        await self._load(parts, param, links)
        return parts

    async def inputs(self, value: Any, links: Links) -> list[list[Part]]:
        """The inputs of a request for embeddings, each as [`parts`]."""
        values = value if isinstance(value, list) else [value]
        if len(values) > self.settings.max_inputs:
            limit = self.settings.max_inputs
            raise ApiError(400, f"`input` has {len(values)} items; {limit} are allowed at once.", param="input")
        if not values:
            raise ApiError(400, "`input` is empty. Give a text or an image.", param="input")
        inputs = [_filled(item, f"input[{i}]") for i, item in enumerate(values)]
        await self._load([part for parts in inputs for part in parts], "input", links)
        return inputs

    async def _load(self, parts: list[Part], param: str, links: Links, feed_images_back: bool = False) -> None:
        """Check the limits, and read the images of `parts` into them."""
        chars = sum(len(part.get("text", "")) for part in parts)
        if chars > self.settings.max_prompt_chars:
            raise ApiError(
                400, f"The request has {chars:,} characters of text; {self.settings.max_prompt_chars:,} are allowed.",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        waiting = [part for part in parts if "url" in part]
        limit = self.settings.max_inputs if param == "input" else self.settings.max_images
        if len(waiting) > limit:
            raise ApiError(400, f"The request has {len(waiting)} images; {limit} are allowed.", param=param)
        shown = [part for part in parts if feed_images_back and "ret_index" in part]
        try:
            await asyncio.gather(
                *(self._read(part, links) for part in waiting),
                *(self._read_indexed(part, part["id"]) for part in shown),
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=param, code="invalid_image") from error

    async def _read(self, part: Part, links: Links) -> None:
        url = part.pop("url")
        if own := links.parse(url):
            await self._read_indexed(part, own["id"])
            return
        executor = self._decoders if url.startswith("data:") else self._downloads
        limits = self.settings.image_limits
        part["image"] = await asyncio.get_running_loop().run_in_executor(executor, read_picture, url, limits)

    async def _read_indexed(self, part: Part, image_id: str) -> None:
        part["image"] = await self.decode(load_indexed, self.index, image_id, self.settings)


def load_indexed(index: Any, image_id: str, settings: ServerSettings) -> Image.Image:
    """An image of the index; a `ValueError` where there is none or it cannot be read."""
    if not hasattr(index, "load_image"):
        raise ValueError("There is no index with images here.")
    try:
        return index.load_image(image_id, settings.image_limits)
    except KeyError as error:
        raise ValueError(f"The index has no image {image_id[:200]!r}.") from error


def _message(message: dict[str, Any], where: str, links: Links) -> dict[str, Any]:
    """A message of the pipeline, its content as parts, those of images still with their URLs."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(
            400, f"`{where}.role` must be system, developer, user or assistant, got {role!r}.", param="messages"
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, f"`{where}` calls tools, which are not supported.", param="messages")
    if role == "assistant":
        return {"role": role, "content": _answer(content, message.get("images") or [], where, links)}
    parts = _parts([] if content is None else content, f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": parts}


def _answer(content: Any, images: Any, where: str, links: Links) -> list[Part]:
    """An earlier answer: its text with our links, or parts; images that are only in `images` stand at its end."""
    items = content if isinstance(content, list) else [] if content is None else [content]
    parts: list[Part] = []
    for item in items:
        text = item if isinstance(item, str) else item.get("text") if isinstance(item, dict) else None
        parts += links.split(text) if isinstance(text, str) else _parts([item], f"{where}.content", links)
    placed = {part["id"] for part in parts if "id" in part}
    if not isinstance(images, list):
        raise ApiError(400, f"`{where}.images` must be a list, got {str(images)[:100]!r}.", param="messages")
    rest = _parts(images, f"{where}.images", links)
    return [*parts, *(part for part in rest if part.get("id") not in placed)]


def _filled(value: Any, where: str) -> list[Part]:
    """[`_parts`] of an input, which must not be empty."""
    parts = _parts(value, where)
    if not any(part["type"] == "image" or part.get("text", "").strip() for part in parts):
        raise ApiError(400, f"`{where}` is empty. Give a text or an image.", param=_name(where))
    return parts


def _parts(value: Any, where: str, shown: Links | None = None) -> list[Part]:
    """
    Args:
        where (`str`): The place in the request's body.
        shown ([`Links`], *optional*): Of an answer: images with its links were shown; else they are to be looked at.
    """
    parts = []
    for item in value if isinstance(value, list) else [value]:
        part = _part(item)
        if part is None:
            got = str(item.get("type") if isinstance(item, dict) and "type" in item else item)[:100]
            raise ApiError(
                400, f"`{where}` has a part {got!r}. Parts are texts and {{'type': 'image_url', 'image_url': {{'url': "
                "...}}}.", param=_name(where),
            )  # fmt: skip
        parts.append((shown and "url" in part and shown.parse(part["url"])) or part)
    return parts


def _name(where: str) -> str:
    """The field of the request's body."""
    return where.partition("[")[0]


def _part(item: Any) -> Part | None:
    """A text, an image that is to be read (with "url"), one that was shown (with "id"), or a `[RET]`."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind == "ret":
        return {"type": "ret"}
    if kind in ("image", "image_url") and isinstance(item.get("id"), str):
        return _shown(item)
    url = item.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    return {"type": "image", "url": url} if isinstance(url, str) else None


def _shown(item: dict[str, Any]) -> Part:
    ret = item.get("ret_index")
    return {"type": "image", "id": item["id"], "ret_index": ret if isinstance(ret, int) else 0}


__all__ = ["PromptReader", "load_indexed"]
