"""Connections of clients that are slow, idle, or far too many; and a server that ends when what runs is done."""

import asyncio
import contextlib
import functools
import logging
import signal
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .guard import Gate
from .settings import ServerSettings

logger = logging.getLogger(__name__)
_BACKLOG = 256  # connections accepted at a time: far fewer than are open, so that all are heard before one is closed
_SPARE_FILES = 512  # open files besides connections


class Waiting:
    """Connections that ask for nothing at the moment, the longest waiting first: those that never did, and those that
    rest between two requests."""

    def __init__(self) -> None:
        self.strangers: dict[Connection, None] = {}
        self.resting: dict[Connection, None] = {}

    def discard(self, connection: "Connection") -> None:
        self.strangers.pop(connection, None)
        self.resting.pop(connection, None)

    def longest(self, other_than: "Connection") -> "Connection | None":
        """One to close in the place of another."""
        candidates = (each for each in (*self.strangers, *self.resting) if each is not other_than)
        return next(candidates, None)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with a time limit on headers and on clients that read nothing, and a limit on connections.

    uvicorn's own `limit_concurrency` would refuse requests on good connections because of idle ones.
    """

    def __init__(self, *args: Any, settings: ServerSettings, waiting: Waiting, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._settings, self._waiting = settings, waiting
        self._timer: asyncio.TimerHandle | None = None  # for headers
        self._write_timer: asyncio.TimerHandle | None = None
        self._abort_timers: set[asyncio.TimerHandle] = set()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting.strangers[self] = None
        self._time_headers()
        if len(self.connections) > self._settings.max_connections:
            (self._waiting.longest(other_than=self) or self).turn_away(
                ApiError(503, "There are too many connections. Try again later.", retry_after=1)
            )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._waiting.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        for timer in self._abort_timers:  # the transport is no longer there
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asks:
            self._waiting.discard(self)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self.timeout_keep_alive_task is None:  # a part of the headers
            self._time_headers()

    @property
    def _asks(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()
        elif not self._asks:
            self._waiting.resting[self] = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._abort_timers.discard(self._write_timer)
            self._write_timer = None

    def _abort_later(self) -> asyncio.TimerHandle:
        """Closing alone would wait for the client to read what is left."""
        timer = self.loop.call_later(self._settings.body_timeout, self.transport.abort)
        self._abort_timers.add(timer)
        return timer

    def _time_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._settings.header_timeout, self._refuse_headers)

    def _refuse_headers(self) -> None:
        seconds = self._settings.header_timeout
        self.turn_away(ApiError(408, f"No whole request arrived within {seconds:g} seconds."))

    def turn_away(self, error: ApiError) -> None:
        """Answer a client that has not asked yet, and close the connection."""
        if self.transport.is_closing():
            return
        self._waiting.discard(self)
        response = error.response()
        headers = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        status = f"HTTP/1.1 {error.status} {'Request Timeout' if error.status == 408 else 'Service Unavailable'}\r\n"
        self.transport.write(status.encode() + headers + b"connection: close\r\n\r\n" + bytes(response.body))
        self.transport.close()
        self._abort_later()


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT refuses new requests and ends when those that run are done.

    A second signal ends it at once.

    Args:
        app: The ASGI application, made by [`make_app`].
        gate ([`Gate`]): What the application lets in.
        settings ([`ServerSettings`]): Address and limits.
    """

    def __init__(self, app: Any, gate: Gate, settings: ServerSettings):
        self.gate, self.waiting = gate, Waiting()
        protocol: Any = functools.partial(Connection, settings=settings, waiting=self.waiting)
        _allow_open_files(settings.max_connections + _BACKLOG + _SPARE_FILES)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol,
                ws="none",
                backlog=_BACKLOG,
                access_log=False,
                log_config=None,
                timeout_graceful_shutdown=2,
                server_header=False,
            )  # fmt: skip
        )
        self._ends = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ends:
            self.should_exit = self.force_exit = True
        self._ends = True
        logger.info("Got %s: finishing what runs.", signal.Signals(sig).name)

    def end(self) -> None:
        """Do from another thread what SIGTERM does."""
        self._ends = True

    async def on_tick(self, counter: int) -> bool:
        if self._ends and not self.gate.draining:
            self.gate.drain()
        return await super().on_tick(counter) or (self.gate.draining and not self.gate.running)

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{port}"


def _allow_open_files(count: int) -> None:
    """Raise this process's limit on open files to `count`, as far as it may."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere, and not always allowed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


__all__ = ["Server"]
