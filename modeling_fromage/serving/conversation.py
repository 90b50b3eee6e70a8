"""Conversations of several people with one model.

Nothing here knows how an answer is shown: a page in the browser and a server take it from here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..image_search_fromage import ImageIndex, ImageSearch, Segment
from ..messages_fromage import as_part, shown_ids
from ..pipeline_fromage import FromageChat
from .engine import Answer, Engine
from .retrieval import embed

_PATIENCE = 0.5  # seconds


@dataclass
class Turn:
    """What a person sent, as parts of a message, and the answer to it, which is empty where there was none."""

    content: list[dict[str, Any]]
    answer: list[Segment] = field(default_factory=list)


class Conversation:
    """One person's conversation with a model that others talk with, too.

    Args:
        engine ([`Engine`]): The model.
        index ([`ImageIndex`], *optional*): Defaults to the pipeline's.
    """

    def __init__(self, engine: Engine, index: ImageIndex | None = None):
        self.engine = engine
        self.index = engine.pipe.index if index is None else index
        self.turns: list[Turn] = []

    def stream(self, *content: Any, remember: bool = True, **options: Any) -> Iterator[list[Segment]]:
        """Send texts and images, in order; the answer so far, each time that there is more of it, and every half second
        so that who waits can give up.

        The last one is the whole answer. Those before it may hold a part `{"type": "ret"}` for each image that is being
        looked for. Closing the iterator ends the answer, which is remembered as far as it was written; one that fails
        is not.

        Args:
            content: Texts, images and parts of a message.
            remember (`bool`, defaults to `True`): Whether the model reads the conversation, in its chat template;
                else it continues this message alone. In either case no image is shown twice.
            options: As in [`Engine.submit`].

        Raises:
            ValueError: As [`Engine.submit`].
            QueueFullError: As many requests wait as may.
        """
        earlier = [turn for turn in self.turns if turn.answer]
        turn = Turn([as_part(part) for part in content])
        self.turns.append(turn)
        if self.index is not None:
            options["index"] = self.index
        if remember:
            chat = FromageChat(self.engine.reader)
            for each in earlier:
                chat.messages += [{"role": "user", "content": each.content}]
                chat.messages += [{"role": "assistant", "content": each.answer}]
            prompt, options = chat.prepare(*turn.content, **options)
        else:
            prompt = turn.content
            options["exclude_ids"] = [image_id for each in earlier for image_id in shown_ids(each.answer)]
        answer = self.engine.submit(prompt, **options)
        written: list[Segment] = []
        try:
            for written in _snapshots(answer):
                yield written
        except GeneratorExit:
            turn.answer = [part for part in written if part["type"] != "ret"]
            raise
        finally:
            answer.cancel()
        turn.answer = written

    def rewind(self, turns: int) -> None:
        """Forget all but the first `turns`."""
        del self.turns[turns:]


def similar(engine: Engine, image: Image.Image, top_k: int, index: ImageIndex | None = None) -> list[Segment]:
    """The images of the index that look most like `image`, best first, by the embeddings of both. The language model
    has no part in it."""
    index = engine.pipe.index if index is None else index
    if index is None:
        return []

    def look() -> list[Segment]:
        embeds = embed(engine.pipe, [[as_part(image)]])
        return ImageSearch(index, engine.pipe.model).retrieve(torch.stack(embeds), top_k, [[]])[0]

    return engine.run(look)


def _snapshots(answer: Answer) -> Iterator[list[Segment]]:
    """The answer so far, each time that there is more of it, and every half second; images are in the last one alone:
    a page would write their files anew each time, while a browser reads them."""
    written: list[Segment] = []
    events = iter(answer)
    while True:
        if not answer.wait(_PATIENCE):
            yield written
            continue
        event = next(events, None)
        if event is None or event["type"] == "image":  # all that is left is there by now
            break
        written = _extended(written, event)
        yield written
    yield answer.result()


def _extended(written: Sequence[Segment], event: Segment) -> list[Segment]:
    """The parts of an answer with one more piece of text, or an image that is being looked for."""
    if event["type"] == "ret":
        return [*written, event]
    written = [part for part in written if part["type"] != "ret"]
    if event["type"] == "text" and written and written[-1]["type"] == "text":
        return [*written[:-1], {"type": "text", "text": written[-1]["text"] + event["text"]}]
    return [*written, event]


__all__ = ["Conversation", "Turn", "similar"]
