"""Messages and inputs as OpenAI's clients send them, as prompts of the pipeline."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from ..pipeline_fromage import FromagePipeline
from .errors import ApiError
from .pictures import Links, is_data_url, read_picture, shrunk, text_length
from .settings import ServerSettings

T = TypeVar("T")
Part = dict[str, Any]
_DOWNLOADS, _DECODERS = 32, 4  # threads: slow hosts hold up none but each other


class PromptReader:
    """Reads the texts and images of requests, within the server's limits.

    Args:
        settings ([`ServerSettings`]): The limits.
        pipe ([`FromagePipeline`]): Its index is where images that were shown are read from.
    """

    def __init__(self, settings: ServerSettings, pipe: FromagePipeline):
        self.settings, self.pipe = settings, pipe
        blank = Image.new("RGB", (1024, 1024))
        pixels = pipe.processor.image_processor(blank, return_tensors="pt")["pixel_values"]
        self._shortest_side = 2 * max(pixels.shape[-2:])  # kept of an image: what the vision encoder sees, and detail
        most = max(settings.max_inputs, settings.max_images)
        # Of chats, which hold them until they are in the queue, and of others, which hold them to the end; each of
        # those with images of other hosts and of those without, which wait for no host.
        self._rooms: dict[tuple[bool, bool], _Room] = defaultdict(lambda: _Room(most))
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, "downloads")
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoders")

    def close(self) -> None:
        for executor in (self._downloads, self._decoders):
            executor.shutdown(wait=False, cancel_futures=True)

    async def decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that reads or writes an image, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    @contextlib.asynccontextmanager
    async def messages(
        self, messages: list[dict[str, Any]], links: Links, feed_images_back: bool
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """A chat, with its images read; they count as being in memory until the block ends.

        Raises:
            ApiError: A message or a part is of a kind that the model cannot read, or a limit is passed.
        """
        if not messages:
            raise ApiError(400, "`messages` is empty. Send at least one.", param="messages")
        texts = (text for message in messages for text in _texts(message.get("content")))
        self._check_length(sum(map(text_length, texts)), "messages")  # before links are looked for in them
        read = [_message(message, f"messages[{i}]", links) for i, message in enumerate(messages)]
        parts = [part for message in read for part in message["content"]]
        async with self._load(parts, "messages", links, feed_images_back):
            yield read

    @contextlib.asynccontextmanager
    async def parts(self, value: Any, param: str, links: Links) -> AsyncIterator[list[Part]]:
        """A text, an image or a list of both, with its images read. As [`messages`]."""
        parts = _filled(value, param)
        async with self._load(parts, param, links):
            yield parts

    @contextlib.asynccontextmanager
    async def inputs(self, value: Any, links: Links) -> AsyncIterator[list[list[Part]]]:
        """The inputs of a request for embeddings, each as [`parts`]."""
        values = value if isinstance(value, list) else [value]
        if len(values) > self.settings.max_inputs:
            limit = self.settings.max_inputs
            raise ApiError(400, f"`input` has {len(values)} items; {limit} are allowed at once.", param="input")
        if not values:
            raise ApiError(400, "`input` is empty. Give a text or an image.", param="input")
        inputs = [_filled(item, f"input[{i}]") for i, item in enumerate(values)]
        async with self._load([part for parts in inputs for part in parts], "input", links):
            yield inputs

    def _check_length(self, chars: int, param: str) -> None:
        if chars > self.settings.max_prompt_chars:
            raise ApiError(
                400, f"The request has {chars:,} characters of text; {self.settings.max_prompt_chars:,} are allowed.",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _load(
        self, parts: list[Part], param: str, links: Links, feed_images_back: bool = False
    ) -> AsyncIterator[None]:
        """Check the limits, and read the images of `parts` into them once there is room, which the block holds."""
        self._check_length(sum(len(part.get("text", "")) for part in parts), param)
        shown = [part for part in parts if "ret_index" in part]
        waiting = [part for part in parts if "url" in part] + (shown if feed_images_back else [])
        limit = self.settings.max_inputs if param == "input" else self.settings.max_images
        if len(waiting) > limit:
            raise ApiError(400, f"The request has {len(waiting)} images; {limit} are allowed.", param=param)
        sources: dict[tuple[str, str], list[Part]] = defaultdict(list)  # each is read once
        for part in waiting:
            sources[_source(part, links)].append(part)
        is_remote = any(kind == "url" and not is_data_url(name) for kind, name in sources)
        async with self._rooms[param == "messages", is_remote].of(len(sources)):
            tasks = [asyncio.create_task(self._read(*source, parts)) for source, parts in sources.items()]
            try:
                await asyncio.gather(*tasks)
            except ValueError as error:
                raise ApiError(400, str(error), param=param, code="invalid_image") from error
            finally:
                for task in tasks:
                    task.cancel()  # the rest, where one failed
            yield

    async def _read(self, kind: str, name: str, parts: Sequence[Part]) -> None:
        """Read an image by its URL or its id into `parts`."""
        loop, limits = asyncio.get_running_loop(), self.settings.image_limits
        if kind == "id":
            image = await self.decode(load_indexed, self.pipe.index, name, self.settings, self._shortest_side)
        else:
            executor = self._decoders if is_data_url(name) else self._downloads
            image = await loop.run_in_executor(executor, read_picture, name, limits, self._shortest_side)
        for part in parts:
            part["image"] = image


class _Room:
    """Room for images of requests, in the order of their arrival.

    Args:
        most (`int`): Images in memory at once; no request may have more.
    """

    def __init__(self, most: int):
        self._free, self._turn = asyncio.Semaphore(most), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def of(self, count: int) -> AsyncIterator[None]:
        taken = 0
        try:
            if count:
                async with self._turn:  # who waits keeps its turn, so that small requests never starve it
                    while taken < count:
                        await self._free.acquire()
                        taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()


def _source(part: Part, links: Links) -> tuple[str, str]:
    """Where an image is read from: `("id", ...)` of the index, or `("url", ...)`, which leaves the part."""
    if "url" not in part:
        return "id", part["id"]
    url = part.pop("url")
    own = None if is_data_url(url) else links.parse(url)
    return ("url", url) if own is None else ("id", own["id"])


def load_indexed(index: Any, image_id: str, settings: ServerSettings, shortest_side: int | None = None) -> Image.Image:
    """An image of the index, [`shrunk`]; a `ValueError` where there is none or it cannot be read."""
    if not hasattr(index, "load_image"):
        raise ValueError("There is no index with images here.")
    try:
        return shrunk(index.load_image(image_id, settings.image_limits), shortest_side)
    except KeyError as error:
        raise ValueError(f"The index has no image {image_id[:200]!r}.") from error


def _message(message: dict[str, Any], where: str, links: Links) -> dict[str, Any]:
    """A message of the pipeline, its content as parts, those of images still with their URLs."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(
            400,
            f"`{where}.role` must be system, developer, user or assistant, got {str(role)[:100]!r}.",
            param="messages",
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, f"`{where}` calls tools, which are not supported.", param="messages")
    if role == "assistant":
        return {"role": role, "content": _answer(content, message.get("images") or [], where, links)}
    parts = _parts([] if content is None else content, f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": parts}


def _texts(content: Any) -> Iterator[str]:
    """The texts of a message's content."""
    for item in content if isinstance(content, list) else [content]:
        text = item.get("text") if isinstance(item, dict) else item
        if isinstance(text, str):
            yield text


def _answer(content: Any, images: Any, where: str, links: Links) -> list[Part]:
    """An earlier answer: its text with our links, or parts; images that are only in `images` stand at its end."""
    items = content if isinstance(content, list) else [] if content is None else [content]
    parts: list[Part] = []
    for item in items:
        text = next(_texts(item), None) if not isinstance(item, list) else None
        parts += _parts([item], f"{where}.content", links) if text is None else links.split(text)
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
        part = _part(item, shown is not None)
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


def _part(item: Any, was_shown: bool) -> Part | None:
    """A text, an image that is to be read (with "url"), one of an answer that was shown (with "id"), or a `[RET]`."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind == "ret":
        return {"type": "ret"}
    if was_shown and kind in ("image", "image_url") and isinstance(item.get("id"), str):
        return _shown(item)
    url = item.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    return {"type": "image", "url": url} if isinstance(url, str) else None


def _shown(item: dict[str, Any]) -> Part:
    ret = item.get("ret_index")
    return {"type": "image", "id": item["id"], "ret_index": ret if isinstance(ret, int) and 0 <= ret < 100_000 else 0}


__all__ = ["PromptReader", "load_indexed"]
