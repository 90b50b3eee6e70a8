"""A server from a pipeline: in this process until it is told to end, or in a thread."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..pipeline_fromage import FromagePipeline
from .app import Service, make_app
from .connections import Server
from .engine import Engine
from .settings import ServerSettings

logger = logging.getLogger(__name__)


def make_server(
    pipe: FromagePipeline,
    settings: ServerSettings,
    name: str,
    api_keys: Sequence[str] = (),
    mount: Callable[[Any, Service], None] | None = None,
) -> Server:
    """A server that has not started yet.

    Args:
        pipe ([`FromagePipeline`]): The model, and the index of the images that it may show.
        settings ([`ServerSettings`]): Address and limits.
        name (`str`): The model's, as clients give it.
        api_keys (`list[str]`): Keys of which a request must have one; none lets everybody ask.
        mount: Called with the FastAPI application and the service, to put a page beside the API.
    """
    service = Service(Engine(pipe, settings.max_batch_size, settings.max_queue), settings, name, list(api_keys))
    app = make_app(service, None if mount is None else lambda api: mount(api, service))
    server = Server(app, service.gate, settings)
    service.metrics.connections.set_function(lambda: len(server.server_state.connections))
    return server


def listen(host: str, ports: Iterable[int]) -> socket.socket:
    """A socket that listens at the first of `ports` that is free.

    Raises:
        ValueError: None is, or the host is none of this machine's.
    """
    reason = ""
    for port in ports:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, port), family=family)
        except OSError as error:
            reason = f"{host}:{port} cannot be served ({os.strerror(error.errno or 0)}). Give another host or port."
    raise ValueError(reason)


def serve(
    pipe: FromagePipeline, settings: ServerSettings, name: str, api_keys: Sequence[str], listener: socket.socket
) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = make_server(pipe, settings, name, api_keys)
    if not api_keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("Everybody who reaches %s may ask: there are no API keys.", settings.host)
    logger.info("Serving %s at http://%s:%s/v1", name, *listener.getsockname()[:2])
    server.run([listener])


@contextlib.contextmanager
def running(server: Server, patience: float = 60.0) -> Iterator[str]:
    """Run a server in a thread; gives its address. It ends as after SIGTERM.

    Raises:
        RuntimeError: It did not start, or did not end within `patience` seconds.
    """
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + patience
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError(f"The server did not start at {server.config.host}:{server.config.port}. Is it in use?")
        time.sleep(0.01)
    try:
        yield server.address
    finally:
        server.end()
        thread.join(patience)
        if thread.is_alive():
            raise RuntimeError(f"The server did not end within {patience:g} seconds.")


__all__ = ["listen", "make_server", "running", "serve"]
