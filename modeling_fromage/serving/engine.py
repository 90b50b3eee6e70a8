"""One model and many who ask it at once: requests that arrive together are answered in one batch."""

import contextlib
import copy
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

import torch

from ..answer_rows_fromage import Row
from ..backbones_fromage import check_fits
from ..image_search_fromage import Segment
from ..interleaved_generation_fromage import MAX_NEW_TOKENS, InterleavedGeneration, trimmed
from ..pipeline_fromage import FromagePipeline
from .text_stream import TextStream

logger = logging.getLogger(__name__)
T = TypeVar("T")
_GRACE = 5.0  # seconds for what was cancelled to end
_SAMPLING = ("temperature", "top_k", "top_p", "seed")


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class EngineClosedError(RuntimeError):
    """The engine takes no more requests."""


class Answer:
    """What becomes of a request. [`Engine.submit`] makes it.

    Attributes:
        prompt_tokens (`int`): Tokens of the prompt, those of images included, once the answer has begun.
        completion_tokens (`int`): Tokens written so far, `[RET]`s and the end included.
        finish_reason (`str`): `"stop"`, `"length"` or `"cancelled"`, at the end.
    """

    def __init__(
        self, engine: "Engine", inputs: dict[str, Any], generation: InterleavedGeneration, own: dict[str, Any]
    ):
        self.inputs, self.generation, self.options = inputs, generation, generation.options(**own)
        self.is_alone = generation.is_beam_search or generation.generate_kwargs != {"do_sample": False}
        self.prompt_tokens = self.completion_tokens = 0
        self.finish_reason = ""
        self._text = TextStream(engine.pipe.processor.tokenizer, engine.ret_ids, self.options)
        self._events: queue.SimpleQueue[Segment | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._next: Any = ()
        self.row: Row | None = None

    def __iter__(self) -> Iterator[Segment]:
        """The answer as it is written: `{"type": "text", "text": ...}` with what is new, and images, once their
        `[RET]` is looked up at the end; in order they are the answer. `{"type": "ret"}` among them tells that an image
        is being looked for, and is no part of it. May be read once.

        Raises:
            Exception: What kept it from being answered: a `ValueError` is the request's own fault.
        """
        while True:
            event, self._next = (self._next or (self._events.get(),))[0], ()
            if event is None or isinstance(event, BaseException):
                self._events.put(event)  # the end can be read again
                if event is not None:
                    raise event
                return
            yield event

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to read, at most `timeout` seconds; whether there is."""
        if not self._next:
            try:
                self._next = (self._events.get(timeout=timeout),)
            except queue.Empty:
                return False
        return True

    def result(self) -> list[Segment]:
        """The whole answer, as the pipeline gives it; raises as reading does."""
        for _ in self:
            pass
        return [] if self.row is None else trimmed(self.row.segments)

    def cancel(self) -> None:
        """The answer is no longer wanted: it ends at its next token, or never begins."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def begin(self, row: Row) -> None:
        self.row = row
        row.on_token, row.is_cancelled, row.is_isolated = self._take, self._cancelled.is_set, True
        row.is_kept = self.inputs["is_chat"]
        self.prompt_tokens = row.prompt_length

    def _take(self, token: int) -> None:
        self.completion_tokens += 1
        for event in self._text.put(token):
            self._events.put(event)

    def end(self, error: BaseException | None = None) -> None:
        """Hand on what is left of the answer, or why there is none."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self.row is not None and error is None:
            error = self.row.error
            is_whole = self.row.is_stopped or self.row.tokens_left > 0 or not self.options.max_new_tokens
            self.finish_reason = "cancelled" if self.is_cancelled else "stop" if is_whole else "length"
        if error is None and self.row is not None:
            for event in self._text.rest(trimmed(self.row.segments)):
                self._events.put(event)
        self.finish_reason = self.finish_reason or "cancelled"
        self._events.put(error)


class Engine:
    """Answers many requests with one model, in batches of those that have arrived, in a thread of its own.

    Each request has its own options and its own answer: of the likeliest tokens, or samples of its own seed, it is what
    it would be alone, but for rounding where two tokens are as good as equally likely. Beams, and what else changes
    how a whole batch is generated, run by themselves.

    Args:
        pipe ([`FromagePipeline`]): The model. Nobody else may use it meanwhile, but by [`run`]; `reader` is it with a
            tokenizer of its own, which any thread may read and count prompts with.
        max_batch_size (`int`, defaults to 16): Requests answered together.
        max_queue (`int`, defaults to 64): Requests that may wait.
        wait_seconds (`float`, defaults to 0.01): How long the first of a batch waits for others.
    """

    def __init__(
        self, pipe: FromagePipeline, max_batch_size: int = 16, max_queue: int = 64, wait_seconds: float = 0.01
    ):
        if max_batch_size < 1 or max_queue < 1:
            raise ValueError(f"`max_batch_size` and `max_queue` must be 1 or more, got {max_batch_size}, {max_queue}.")
        self.pipe, self.max_batch_size, self.max_queue, self.wait_seconds = (
            pipe,
            max_batch_size,
            max_queue,
            wait_seconds,
        )
        config: Any = pipe.model.config
        self.ret_ids = range(config.ret_token_id, config.ret_token_id + config.num_ret_tokens)
        self._waiting: list[Answer] = []
        self._running: list[Answer] = []
        self._errands: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._begun: list[Future[Any]] = []  # errands
        self._changed = threading.Condition()
        # The pipeline for callers: the tokenizer of `pipe` is the engine's thread's, and pads while it reads a batch.
        self.reader = copy.copy(pipe)
        self.reader.processor = copy.deepcopy(pipe.processor)
        self.reader.processor.count_tokens("")  # takes off padding that a tokenizer was saved with
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fromage-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered: nothing but [`close`] should end that."""
        return self._thread.is_alive()

    def submit(self, prompt: Any, **options: Any) -> Answer:
        """Ask for an answer; returns at once. May be called from any thread.

        Args:
            prompt: As in [`FromagePipeline.__call__`].
            options: Of [`FromagePipeline.__call__`] and [`InterleavedGeneration.options`], for this request. With a
                `temperature` the answer is sampled, from its `seed` or else a random one.

        Raises:
            QueueFullError: As many requests wait as may.
            EngineClosedError: The engine was closed.
            ValueError: The prompt or an option is wrong, or the prompt too long for the language model's context.
        """
        with self._changed:
            self._check_room()  # before work is spent on it
        answer = self._prepare(prompt, options)
        with self._changed:
            self._check_room()
            self._waiting.append(answer)
            self._changed.notify_all()
        return answer

    def _check_room(self) -> None:
        if self._closed:
            raise EngineClosedError("The engine is closed, and takes no more requests.")
        for answer in [answer for answer in self._waiting if answer.is_cancelled]:
            self._waiting.remove(answer)
            answer.end()
        if len(self._waiting) >= self.max_queue:
            raise QueueFullError(f"{len(self._waiting)} requests wait already. Try again later.")

    def _prepare(self, prompt: Any, options: dict[str, Any]) -> Answer:
        pipe, counter = self.pipe, self.reader.processor
        own = {name: value for name in _SAMPLING if (value := options.pop(name, None)) is not None}
        own.setdefault("seed", secrets.randbits(63))
        pre, forward, _ = pipe._sanitize_parameters(**options)
        pre, forward = {**pipe._preprocess_params, **pre}, {**pipe._forward_params, **forward}
        inputs = pipe.preprocess(prompt, **pre)
        used = counter.count_tokens(inputs["text"]) if inputs["text"] else 0
        if not used:
            raise ValueError("The prompt is empty. Give it a text or an image.")
        cached = forward.get("use_cache", pipe.model.generation_config.use_cache) is not False
        check_fits(used, forward.get("max_new_tokens", MAX_NEW_TOKENS), pipe.model.config.text_config, cached)
        forward.setdefault("stop_strings", inputs["stops"])
        forward.setdefault("do_sample", False)  # whatever the model's own generation config says
        generation = InterleavedGeneration(
            pipe.model, pipe.processor, logged=pipe._logged, prefix_cache=pipe.prefix_cache, **forward
        )
        return Answer(self, inputs, generation, own)

    def run(self, function: Callable[[], T]) -> T:
        """Run something else with the model, between two batches, and return what it returns."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise EngineClosedError("The engine is closed.")
            self._errands.append((future, function))
            self._changed.notify_all()
        return future.result()

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, and finish those that were taken; cancel what takes more than `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        for answer in [*self._waiting, *self._running]:
            answer.cancel()
        self._thread.join(timeout and _GRACE)
        if self._thread.is_alive():
            logger.error("What the engine runs does not end. Its requests are given up.")
            self._give_up(EngineClosedError("The engine was closed."))

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            self._closed = True
            answers, self._waiting = [*self._running, *self._waiting], []
            errands, self._errands = [*self._begun, *(future for future, _ in self._errands)], []
        for answer in answers:
            answer.end(error)
        for future in errands:
            with contextlib.suppress(InvalidStateError):  # it has just been done
                future.set_exception(error)

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._work_once():
                pass
        except BaseException as error:  # a mistake of ours: nobody must wait for what does not come
            logger.exception("The engine fails.")
            self._give_up(error)

    def _work_once(self) -> bool:
        """Wait for something to do, and do it; whether there may be more."""
        with self._changed:
            while not (self._waiting or self._errands or self._closed):
                self._changed.wait()
            errands, self._errands = self._errands, []
            self._begun = [future for future, _ in errands]
            if not (self._waiting or errands):
                return False
        for future, function in errands:
            result, failure = None, None
            try:
                result = function()
            except BaseException as error:  # it is raised where it is waited for
                failure = error
            with contextlib.suppress(InvalidStateError):  # the engine was closed meanwhile
                future.set_result(result) if failure is None else future.set_exception(failure)
        self._choose()
        wanted = [answer for answer in self._running if not answer.is_cancelled]
        try:
            self._answer(wanted)
        except Exception as error:
            if not isinstance(error, ValueError):
                logger.exception("A batch of %d requests failed.", len(wanted))
            for answer in wanted:
                answer.end(error)
        for answer in self._running:
            answer.end()
        self._running = []
        return True

    def _choose(self) -> None:
        """Take the first that waits, and others that may run with it."""
        start = time.monotonic()
        with self._changed:
            while 0 < len(self._waiting) < self.max_batch_size and not self._closed:
                left = start + self.wait_seconds - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if not self._waiting:  # who waited has given up
                return
            first, *others = self._waiting
            together = [] if first.is_alone else [answer for answer in others if not answer.is_alone]
            self._running = [first, *together[: self.max_batch_size - 1]]
            self._waiting = [answer for answer in self._waiting if answer not in self._running]

    @torch.no_grad()
    def _answer(self, answers: Sequence[Answer]) -> None:
        if not answers:
            return
        generation, rows = answers[0].generation, list[Row]()
        generation.contexts.begin()
        for answer in answers:
            inputs = answer.inputs
            with _failing_alone(answer):
                prompt = ([inputs["text"]], [inputs["images"]], [inputs["shown"]])
                [row] = generation.contexts.rows(*prompt, [answer.options])
                answer.begin(row)
                rows.append(row)
        if rows:
            generation.run(rows)


@contextlib.contextmanager
def _failing_alone(answer: Answer) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of one request, whose batch goes on
        answer.end(error)


__all__ = ["Answer", "Engine", "EngineClosedError", "QueueFullError"]
