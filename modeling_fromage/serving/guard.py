"""What stands before the API: keys, limits on bodies and time, clients that go away, and the end of the server."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from .errors import ApiError
from .metrics import Metrics
from .settings import ServerSettings

logger = logging.getLogger(__name__)
_PREFIX = "/v1/"
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
_BODIES_AT_ONCE = 16  # of the largest size, in memory
_EVENT_STREAM = b"text/event-stream"


class ApiKeys:
    """The keys of which a request must have one, if there are any.

    Args:
        keys (`list[str]`): The keys themselves; only their digests are kept.
    """

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        # Links to images are signed with it: every server with these keys knows them again.
        self._secret = hashlib.sha256(b"image links" + b"".join(sorted(self._digests))).digest()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: dict[bytes, bytes]) -> None:
        """Raise a 401 for a request without a key.

        Args:
            headers: Of the request, by lower-case names.
        """
        if not self:
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All are compared, each in constant time.
        known = [hmac.compare_digest(digest, each) for each in self._digests]
        if kind.lower() != b"bearer" or not any(known):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`; OpenAI's clients take it as "
                "`api_key`.",
                code="invalid_api_key",
            )

    def sign(self, text: str) -> str:
        """A signature of `text` that needs no key to be checked by those who have the link, but one to be made."""
        return hmac.new(self._secret, text.encode("utf-8", "surrogatepass"), "sha256").hexdigest()[:24]

    def is_signed(self, text: str, signature: str) -> bool:
        return hmac.compare_digest(self.sign(text).encode(), signature.encode())


class Gate:
    """Requests that run, each within its time; none enters once the server ends.

    Args:
        request_timeout (`float`): Seconds for a request.
        shutdown_timeout (`float`): Seconds that requests have left when [`drain`] is called.
    """

    def __init__(self, request_timeout: float, shutdown_timeout: float):
        self.request_timeout, self.shutdown_timeout = request_timeout, shutdown_timeout
        self.draining = False
        self._running: set[asyncio.Timeout] = set()

    @property
    def running(self) -> int:
        return len(self._running)

    @contextlib.asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Raises a 503 once the server ends, and a 503 or 504 where the time is over."""
        self.check()
        try:
            async with asyncio.timeout(self.request_timeout) as timeout:
                self._running.add(timeout)
                try:
                    yield
                finally:
                    self._running.discard(timeout)
        except TimeoutError as error:
            self.check()
            raise ApiError(
                504,
                f"The request took longer than {self.request_timeout:g} seconds. Ask for fewer tokens or images, or "
                "later.",
                code="timeout",
            ) from error

    def check(self) -> None:
        """Raise a 503 once the server ends."""
        if self.draining:
            raise ApiError(503, "The server is shutting down. Try again later.", code="shutting_down", retry_after=5)

    def drain(self) -> None:
        """Let nothing more in, and give what runs `shutdown_timeout` seconds."""
        self.draining = True
        latest = asyncio.get_running_loop().time() + self.shutdown_timeout
        for timeout in self._running:
            when = timeout.when()
            if not timeout.expired():  # what is over may still be ending
                timeout.reschedule(latest if when is None else min(when, latest))


class Ending:
    """What is called once a request is over, however it ended; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []

    def add(self, callback: Callable[[], None]) -> None:
        """Call `callback` at the end; at once where that has been."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return
        callback()

    def end(self) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            callback()


class Guard:
    """ASGI middleware before everything below `/v1/`, and before every body that is sent elsewhere.

    A request's body is read before the request is looked at, within limits on its size and time. A client that goes
    away cancels what runs for it. `scope["ending"]` is the request's [`Ending`].

    Args:
        app: The ASGI application behind it.
        gate ([`Gate`]), settings ([`ServerSettings`]), keys ([`ApiKeys`]), metrics ([`Metrics`]): The server's own.
    """

    def __init__(self, app: Any, gate: Gate, settings: ServerSettings, keys: ApiKeys, metrics: Metrics):
        self.app, self.gate, self.settings, self.keys, self.metrics = app, gate, settings, keys, metrics
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_api = scope["type"] == "http" and scope["path"].startswith(_PREFIX)
        if not is_api and (scope["type"] != "http" or scope["method"] in _WITHOUT_BODY):  # of a page beside the API
            await self.app(scope, receive, send)
            return
        began, exchange = time.monotonic(), _Exchange(scope, receive, send)
        scope["ending"] = ending = Ending()
        try:
            async with self.gate.enter():
                if is_api and not _is_public(scope):
                    self.keys.check(exchange.headers)
                try:
                    body = await self._read(exchange)
                    await self._run(scope, exchange, body)
                finally:
                    self._held -= exchange.held
        except ApiError as error:
            await exchange.refuse(error, self.settings.body_timeout)
        except ConnectionError:
            exchange.status = 499  # the client is gone
        finally:
            ending.end()
            self.metrics.count_request(scope["path"], exchange.status, time.monotonic() - began)

    async def _read(self, exchange: "_Exchange") -> bytes:
        """The body of a request; 400, 408, 413 or 503 where it cannot be had."""
        limit = self.settings.max_body_bytes
        length = exchange.headers.get(b"content-length", b"0")
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    if max(len(body), int(length)) > limit:
                        raise ApiError(
                            413, f"The request's body is larger than {limit:,} bytes. Send fewer or smaller images."
                        )
                    if exchange.is_read:
                        return bytes(body)
                    chunk = await exchange.read()
                    body += chunk
                    exchange.held += len(chunk)
                    self._held += len(chunk)
                    if self._held > _BODIES_AT_ONCE * limit:
                        raise ApiError(503, "Too many large requests at once. Try again later.", retry_after=1)
        except TimeoutError as error:
            raise ApiError(
                408, f"The request's body did not arrive within {self.settings.body_timeout:g} seconds. Send it again."
            ) from error

    async def _run(self, scope: Any, exchange: "_Exchange", body: bytes) -> None:
        """Call the application; it is cancelled where the client goes away or the time is over."""
        gone = asyncio.Event()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await exchange.receive())["type"] != "http.disconnect":
                pass
            gone.set()

        tasks = [asyncio.create_task(self.app(scope, receive, exchange.send)), asyncio.create_task(watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ConnectionError
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _is_public(scope: Any) -> bool:
    """Links to images have signatures in the place of keys, which the route checks."""
    return scope["method"] in ("GET", "HEAD") and scope["path"].startswith(f"{_PREFIX}images/")


class _Exchange:
    """A request and what was answered so far."""

    def __init__(self, scope: Any, receive: Any, send: Any):
        self.headers = dict(scope["headers"])
        self.receive, self._send = receive, send
        self.is_read = False  # the whole body
        self.held = 0  # bytes of it
        self.status = 0  # 0 before there is an answer
        self._is_stream = self._is_complete = False

    async def read(self) -> bytes:
        """The next piece of the body."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        self.is_read = not message.get("more_body", False)
        return message.get("body", b"")

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(_EVENT_STREAM)
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, error: ApiError, patience: float) -> None:
        """Answer with an error, or end a stream that has begun with one.

        Args:
            patience (`float`): Seconds for the rest of a body, which is read and forgotten: many clients read no answer
                before they have sent it.
        """
        if self._is_complete:
            return
        if self.status and not self._is_stream:
            raise error  # the server breaks the connection, so that nobody takes the answer for whole
        if self.status:
            event = f"data: {json.dumps(error.body)}\n\n".encode()
            await self.send({"type": "http.response.body", "body": event, "more_body": True})
        else:
            response = error.response()
            headers = [*response.raw_headers, *([] if self.is_read else [(b"connection", b"close")])]
            await self.send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
        if not self.is_read and error.status != 408 and b"expect" not in self.headers:
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(patience):
                    while not self.is_read:
                        await self.read()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


__all__ = ["ApiKeys", "Ending", "Gate", "Guard"]
