"""Answers of the model as OpenAI's API has them: whole, or as a stream of server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..image_search_fromage import Segment
from .pictures import Links, outgoing


class ChatAnswer:
    """One answer on its way to a client.

    Args:
        model (`str`): The name that the client gave.
        events: The answer's events, as [`Answer`] has them.
        answer ([`Answer`]): For its counts of tokens, once the events are over.
        links ([`Links`]): Of the images.
        inline (`bool`): Whether images stand in the text as `data:` URLs.
        encode: Calls a function in a thread that encodes images.
    """

    def __init__(
        self,
        model: str,
        events: AsyncIterator[Segment],
        answer: Any,
        links: Links,
        inline: bool,
        encode: Callable[..., Any],
    ):
        self._events, self._answer, self._links, self._inline, self._encode = events, answer, links, inline, encode
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def _deltas(self) -> AsyncIterator[dict[str, Any]]:
        """Pieces of the message: "content" to append to its text, and the "images" that it stands for."""
        ret, count, last = -1, 0, None  # the last: the [RET] of the image that was before
        async for event in self._events:
            if event["type"] == "text":
                yield {"content": event["text"]}
            elif event["type"] == "ret":
                ret += 1
            else:
                image = {"ret_index": max(ret, 0), "metadata": {}, "image": None, **event}
                delta = await self._encode(self._image_delta, image, count)
                yield {**delta, "content": " " * (last == image["ret_index"]) + delta["content"]}
                count += 1
            last = image["ret_index"] if event["type"] == "image" else None

    def _image_delta(self, image: Segment, index: int) -> dict[str, Any]:
        content = self._links.markdown(image, self._inline)
        return {"content": content, "images": [outgoing(image, self._links.make(image["id"]), index)]}

    @property
    def _usage(self) -> dict[str, int]:
        read, written = self._answer.prompt_tokens, self._answer.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def whole(self) -> dict[str, Any]:
        """A `chat.completion`."""
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None, "images": []}
        async for delta in self._deltas():
            message["content"] += delta["content"]
            message["images"] += delta.get("images", [])
        choice = {"index": 0, "message": message, "finish_reason": self._answer.finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage}

    async def stream(self, include_usage: bool, explain: Callable[[Exception], dict[str, Any]]) -> AsyncIterator[str]:
        """Server-sent events of `chat.completion.chunk`s.

        Args:
            include_usage: Whether the last chunk counts tokens.
            explain: The body of the event that an error becomes, after which the stream ends.
        """
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            async for delta in self._deltas():
                yield self._chunk(delta)
            yield self._chunk({}, self._answer.finish_reason)
            if include_usage:
                yield _event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage})
        except Exception as error:  # its status can no longer say so
            yield _event(explain(error))
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


__all__ = ["ChatAnswer"]
