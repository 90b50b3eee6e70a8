"""Answers that arrive while they are written, and conversations of several people with one model.

Nothing here knows how an answer is shown: a page in the browser and a server take it from here.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextStreamer

from ..image_search_fromage import ImageIndex, ImageSearch, Segment
from ..messages_fromage import as_part, shown_ids
from ..pipeline_fromage import FromageChat, FromagePipeline

_PATIENCE = 0.5  # seconds


class SharedPipeline:
    """A [`FromagePipeline`] that several threads ask at once: it answers one of them after the other.

    Args:
        pipe ([`FromagePipeline`]): The pipeline that answers. Nobody else may use it meanwhile.
    """

    def __init__(self, pipe: FromagePipeline):
        self.pipe, self.lock = pipe, threading.Lock()

    def stream(self, answer: Callable[..., list[Segment]]) -> Iterator[list[Segment]]:
        """The answer so far, each time that there is more of it, and every half second so that who waits can give up.

        The last one is the whole answer, with the images that were found for its `[RET]`s. Those before it hold text,
        a part `{"type": "ret"}` for each `[RET]`, and perhaps the string that ends the answer and is no part of it.
        Closing the iterator ends the generation at its next token.

        Args:
            answer: Called with options for the pipeline, which it must pass on; it returns what the pipeline does.
                `lambda **options: pipe(messages, **options)` and [`FromageChat.send`] do.

        Raises:
            ValueError: As [`FromagePipeline.__call__`].
        """
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopped = threading.Event()
        options = {
            "streamer": _Streamer(self.pipe, events.put),
            "stopping_criteria": StoppingCriteriaList([_stops_when(stopped)]),
        }

        def run() -> None:
            try:
                with self.lock:
                    events.put([] if stopped.is_set() else answer(**options))
            except BaseException as error:  # it is raised where the answer is waited for
                events.put(error)

        threading.Thread(target=run, daemon=True).start()
        written: list[Segment] = []
        try:
            while True:
                try:
                    event = events.get(timeout=_PATIENCE)
                except queue.Empty:
                    yield written
                    continue
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, list):
                    yield event
                    return
                written = _extended(written, event)
                yield written
        finally:
            stopped.set()

    @torch.no_grad()
    def similar(self, image: Image.Image, top_k: int, index: ImageIndex | None = None) -> list[Segment]:
        """The images of the index that look most like `image`, best first, by the embeddings of both. The language
        model has no part in it."""
        index = self.pipe.index if index is None else index
        with self.lock:
            model = self.pipe.model
            pixels = self.pipe.processor.image_processor(image, return_tensors="pt")["pixel_values"]
            embeds = model.get_image_embeds(pixels.to(model.device, model.vision_model.dtype))
            return ImageSearch(index, model).retrieve(embeds, top_k, [[]])[0] if index is not None else []


@dataclass
class Turn:
    """What a person sent, as parts of a message, and the answer to it, which is empty where there was none."""

    content: list[dict[str, Any]]
    answer: list[Segment] = field(default_factory=list)


class Conversation:
    """One person's conversation with a model that others talk with, too.

    Args:
        shared ([`SharedPipeline`]): The model.
        index ([`ImageIndex`], *optional*): Defaults to the pipeline's.
    """

    def __init__(self, shared: SharedPipeline, index: ImageIndex | None = None):
        self.shared = shared
        self.index = shared.pipe.index if index is None else index
        self.turns: list[Turn] = []

    def stream(self, *content: Any, remember: bool = True, **options: Any) -> Iterator[list[Segment]]:
        """Send texts and images, in order; the answer so far, as [`SharedPipeline.stream`] gives it.

        An answer that is broken off is remembered as far as it was written, one that fails is not.

        Args:
            content: Texts, images and parts of a message.
            remember (`bool`, defaults to `True`): Whether the model reads the conversation, in its chat template;
                else it continues this message alone. In either case no image is shown twice.
            options: For this call of the pipeline.

        Raises:
            ValueError: As [`FromagePipeline.__call__`].
        """
        earlier = [turn for turn in self.turns if turn.answer]
        turn = Turn([as_part(part) for part in content])
        self.turns.append(turn)
        pipe = self.shared.pipe
        if self.index is not None:
            options["index"] = self.index

        def answer(**streaming: Any) -> list[Segment]:
            if remember:
                chat = FromageChat(pipe)
                for each in earlier:
                    chat.messages += [{"role": "user", "content": each.content}]
                    chat.messages += [{"role": "assistant", "content": each.answer}]
                return chat.send(*turn.content, **options, **streaming)
            shown = [image_id for each in earlier for image_id in shown_ids(each.answer)]
            said: Any = pipe(turn.content, exclude_ids=shown, **options, **streaming)
            return said

        written: list[Segment] = []
        try:
            for written in self.shared.stream(answer):
                yield written
        except GeneratorExit:
            turn.answer = [part for part in written if part["type"] != "ret"]
            raise
        turn.answer = written

    def rewind(self, turns: int) -> None:
        """Forget all but the first `turns`."""
        del self.turns[turns:]


class _Streamer(TextStreamer):
    """Hands on what is generated: texts, word by word, and `None` for each `[RET]`."""

    def __init__(self, pipe: FromagePipeline, put: Callable[[str | None], None]):
        super().__init__(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        config = pipe.model.config
        self._rets = range(config.ret_token_id, config.ret_token_id + config.num_ret_tokens)
        self._put = put

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value.flatten()[0]) not in self._rets:
            super().put(value)
            return
        super().end()  # hands on the words before it
        self.next_tokens_are_prompt = False
        self._put(None)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._put(text)


def _stops_when(stopped: threading.Event) -> Callable[..., torch.Tensor]:
    """A stopping criterion of `generate`."""

    def criterion(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    return criterion


def _extended(written: Sequence[Segment], event: str | None) -> list[Segment]:
    """The parts of an answer with one more piece of text, or `None`: a `[RET]`."""
    if event is None:
        return [*written, {"type": "ret"}]
    if written and written[-1]["type"] == "text":
        return [*written[:-1], {"type": "text", "text": written[-1]["text"] + event}]
    return [*written, {"type": "text", "text": event}] if event.strip() else [*written]


__all__ = ["Conversation", "SharedPipeline", "Turn"]
