"""OpenAI's API over a model: chats with images in and out, embeddings, and searches for images."""

import asyncio
import base64
import contextlib
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jinja2
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response, StreamingResponse

from ..image_search_fromage import Segment
from .answers import ChatAnswer
from .engine import Answer, Engine, EngineClosedError, QueueFullError
from .errors import ApiError, Json, busy
from .guard import ApiKeys, Ending, Gate, Guard
from .metrics import CONTENT_TYPE, Metrics
from .pictures import Links, data_url, png_of
from .prompts import PromptReader, load_indexed
from .requests import ChatRequest, EmbeddingsRequest, ImageSearchRequest
from .retrieval import (
    add_likelihoods,
    caption_of,
    count_tokens,
    embed,
    refuse_several_queries,
    reranked,
    search,
)
from .settings import ServerSettings

logger = logging.getLogger(__name__)
T = TypeVar("T")
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Service:
    """A model behind the API: everything that the routes need.

    Args:
        engine ([`Engine`]): Answers requests.
        settings ([`ServerSettings`]): Limits, and how the server is reached.
        name (`str`): The model's, as clients give it.
        api_keys (`list[str]`): Keys of which a request must have one; none lets everybody ask.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, name: str, api_keys: list[str] | None = None):
        self.engine, self.settings, self.name = engine, settings, name
        self.pipe = engine.pipe
        self.keys, self.metrics, self.created = ApiKeys(api_keys or []), Metrics(), int(time.time())
        self.gate = Gate(settings.request_timeout, settings.shutdown_timeout)
        self.reader = PromptReader(settings, self.pipe)
        self._beginners = ThreadPoolExecutor(4, "beginners")  # a long prompt takes memory while it is tokenised
        self._readers = ThreadPoolExecutor(settings.max_batch_size + settings.max_queue + 8, "readers")
        self._jobs = ThreadPoolExecutor(8, "jobs")
        self._jobs_taken = 0
        self.metrics.running.set_function(lambda: self.gate.running)

    def close(self) -> None:
        self.engine.close(timeout=2)
        self.reader.close()
        for executor in (self._beginners, self._readers, self._jobs):
            executor.shutdown(wait=False, cancel_futures=True)

    def links(self, request: Request) -> Links:
        return Links(self.keys, self.settings.public_url or str(request.base_url), self.pipe.index)

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(
                404, f"There is no model {name[:200]!r}. This server has {self.name!r}.", param="model",
                code="model_not_found",
            )  # fmt: skip

    def explain(self, error: Exception) -> ApiError:
        """An error as clients are told of it; one that is ours is logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFullError):
            return busy(str(error))
        if isinstance(error, EngineClosedError):
            return ApiError(503, "The server is shutting down. Try again later.", code="shutting_down", retry_after=5)
        if isinstance(error, (ValueError, jinja2.TemplateError)):  # of the request, whose author can mend it
            is_long = "the language model's context" in str(error)
            return ApiError(400, str(error), code="context_length_exceeded" if is_long else None)
        logger.error("A request failed.", exc_info=error)
        return ApiError(500, "The server failed. Its log says why.")

    async def answer(self, messages: list[dict[str, Any]], options: dict[str, Any], ending: Ending) -> Answer:
        """Begin an answer, in a thread: tokenising a long prompt holds nobody else up. It ends with the request."""

        def submit() -> Answer:
            answer = self.engine.submit(messages, **options)
            ending.add(answer.cancel)
            return answer

        return await self._call(self._beginners, submit)

    async def events(self, answer: Answer) -> AsyncIterator[Segment]:
        """What an answer writes, as it comes."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        def read() -> None:
            try:
                for event in answer:
                    put(event)
                put(None)
            except BaseException as error:  # it is raised where the answer is waited for
                put(error)

        began = time.monotonic()
        self._readers.submit(read)
        try:
            event = await events.get()
            if isinstance(event, dict):  # neither an error nor an answer of nothing
                self.metrics.first_seconds.observe(time.monotonic() - began)
            while isinstance(event, dict):
                self.metrics.images.inc(event["type"] == "image")
                yield event
                event = await events.get()
            if event is not None:
                raise event
        finally:
            self.metrics.tokens.labels("read").inc(answer.prompt_tokens)
            self.metrics.tokens.labels("written").inc(answer.completion_tokens)

    async def embed(self, inputs: list[list[dict[str, Any]]]) -> list[torch.Tensor]:
        """Embeddings of inputs, as [`embed`] gives them, a batch at a time, between batches of answers."""
        size, rows = self.settings.max_batch_size, list[torch.Tensor]()
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            rows += await self.job(partial(self.engine.run, partial(embed, self.pipe, batch)))
        return rows

    async def rerank(self, caption: str, hits: list[Segment], count: int, weight: float | None) -> list[Segment]:
        """The first `count` hits by how likely the model finds the caption given each, a batch at a time; those that
        cannot be read come behind them, and then the others."""
        first, size = hits[:count], self.settings.max_batch_size
        images = [await self.reader.decode(_image_of, self, hit["id"]) for hit in first]
        read = [(hit, image) for hit, image in zip(first, images, strict=True) if image is not None]
        for start in range(0, len(read), size):
            batch = read[start : start + size]
            await self.job(partial(self.engine.run, partial(add_likelihoods, self.pipe, caption, batch)))
        best = reranked(self.pipe, [hit for hit, _ in read], weight)
        return [*best, *(hit for hit in first if "log_likelihood" not in hit), *hits[count:]]

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Of a request for embeddings or a search: as many are let in as may wait for answers, before work is spent on
        them."""
        if self._jobs_taken >= self.settings.max_queue:
            raise busy(f"{self.settings.max_queue} requests wait already. Try again later.")
        self._jobs_taken += 1
        try:
            yield
        finally:
            self._jobs_taken -= 1

    async def job(self, function: Callable[[], T]) -> T:
        """Call a function that waits for the model or the index, in a thread."""
        return await self._call(self._jobs, function)

    @staticmethod
    async def _call(executor: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        held = [function]
        del function
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, lambda: held.pop()())
        finally:
            held.clear()  # who gives up leaves no images in the executor's queue


def make_app(service: Service, before: Callable[[FastAPI], None] | None = None) -> Any:
    """The ASGI application of a service.

    Args:
        before: Called with the application once it has the API's routes, to mount something beside them.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="FROMAGe", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app, service)
    _add_chat(app, service)
    _add_embeddings(app, service)
    _add_search(app, service)
    _add_status(app, service)
    if before is not None:
        before(app)
    guarded: Any = Guard(app, service.gate, service.settings, service.keys, service.metrics)
    if service.settings.cors_origins:
        guarded = CORSMiddleware(
            guarded, service.settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(step) for step in first["loc"][1:]]
        where = f"`{'.'.join(place)}`: " if place else "The body must be a JSON object: "
        return ApiError(400, f"{where}{first['msg']}.", param=place[0] if place else None).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{error.detail} ({request.method} {request.url.path}).").response()

    for kind in (ApiError, ValueError, jinja2.TemplateError, QueueFullError, EngineClosedError, Exception):

        @app.exception_handler(kind)
        async def failed(request: Request, error: Exception) -> Response:
            return service.explain(error).response()


def _add_chat(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        stops = service.pipe.processor.chat_stop_strings
        options = body.options(settings.default_max_tokens, settings.max_tokens, stops)
        links = service.links(request)
        async with service.reader.messages(body.messages, links, body.feed_images_back) as messages:
            answer = await service.answer(messages, options, request.scope["ending"])
        inline = settings.inline_images if body.inline_images is None else body.inline_images
        said = ChatAnswer(body.model, service.events(answer), answer, links, inline, service.reader.decode)
        if not body.stream:
            return Json(await said.whole())
        stream = said.stream(body.stream_options.include_usage, lambda error: service.explain(error).body)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM_HEADERS)


def _add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
        service.check_model(body.model)
        width = service.pipe.model.config.projection_dim
        if body.dimensions not in (None, width):
            raise ApiError(400, f"Embeddings have {width} dimensions here. Leave `dimensions` out.", param="dimensions")
        with service.place():
            async with service.reader.inputs(body.input, service.links(request)) as inputs:
                refuse_several_queries(service.pipe, inputs)
                rows: list[Any] = [row.tolist() for row in await service.embed(inputs)]
        if body.encoding_format == "base64":
            rows = [base64.b64encode(struct.pack(f"<{width}f", *row)).decode() for row in rows]
        tokens = await service.job(lambda: sum(count_tokens(service.engine.reader, parts) for parts in inputs))
        service.metrics.tokens.labels("read").inc(tokens)
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Json({"object": "list", "data": data, "model": body.model, "usage": usage})


def _add_search(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/search")
    async def search_images(request: Request, body: ImageSearchRequest) -> Response:
        service.check_model(body.model)
        limit = service.settings.max_results
        top_k = min(10, limit) if body.top_k is None else body.top_k
        if top_k > limit:
            raise ApiError(400, f"`top_k` is {top_k}; {limit} images are found at most here.", param="top_k")
        if body.rerank > limit:
            raise ApiError(400, f"`rerank` is {body.rerank}; {limit} images are reranked at most here.", param="rerank")
        links, count = service.links(request), max(top_k, body.rerank)
        with service.place():
            async with service.reader.parts(body.query, "query", links) as parts:
                caption = caption_of(parts) if body.rerank else ""
                (row,) = await service.embed([parts])
            hits = await service.job(lambda: search(service.pipe, row[None], count, body.where, body.exclude_ids))
            if body.rerank:
                hits = await service.rerank(caption, hits, body.rerank, body.rerank_weight)
        found = []
        for hit in hits[:top_k]:
            entry = {"object": "image", "id": hit["id"], "score": hit["score"], "metadata": hit["metadata"],
                     "link": links.make(hit["id"])}  # fmt: skip
            if "log_likelihood" in hit:
                entry["log_likelihood"] = hit["log_likelihood"]
            if body.load_images:
                entry["image_url"] = {"url": await service.reader.decode(_data_url_of, service, hit["id"])}
            found.append(entry)
        return Json({"object": "list", "data": found, "model": service.name})

    @app.get("/v1/images/{image_id:path}")
    async def image(request: Request, image_id: str) -> Response:
        service.links(request).check(image_id, request.url.query)
        try:
            found = await service.reader.decode(load_indexed, service.pipe.index, image_id, service.settings)
        except ValueError as error:
            raise ApiError(404, str(error), code="image_not_found") from error
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(await service.reader.decode(png_of, found), media_type="image/png", headers=headers)


def _image_of(service: Service, image_id: str) -> Any:
    """A search's image; `None` where it cannot be read."""
    try:
        return load_indexed(service.pipe.index, image_id, service.settings)
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _data_url_of(service: Service, image_id: str) -> str | None:
    image = _image_of(service, image_id)
    return None if image is None else data_url(image)


def _add_status(app: FastAPI, service: Service) -> None:
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "modeling-fromage"}

    @app.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return Json(model)

    @app.get("/health")
    async def health() -> Response:
        service.gate.check()
        if not service.engine.is_alive:
            message = "The model no longer answers. Restart the server; its log says why."
            raise ApiError(503, message, code="engine_dead")
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.keys.check(dict(request.scope["headers"]))
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


__all__ = ["Service", "make_app"]
