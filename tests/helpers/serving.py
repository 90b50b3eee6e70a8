"""Servers in a thread of the tests, and clients that behave badly."""

import base64
import contextlib
import io
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from modeling_fromage import FromagePipeline
from modeling_fromage.serving.server import make_server, running
from modeling_fromage.serving.settings import ServerSettings

NAME = "tiny"


@contextlib.contextmanager
def serving(
    pipe: FromagePipeline, api_keys: tuple[str, ...] = (), mount: Callable | None = None, **settings: Any
) -> Iterator[str]:
    """The address of a server at a free port."""
    with running(make_server(pipe, ServerSettings(port=0, **settings), NAME, api_keys, mount)) as address:
        yield address


def as_data_url(image: Image.Image) -> str:
    image.save(buffer := io.BytesIO(), "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": as_data_url(image)}}


def from_data_url(url: str) -> Image.Image:
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2].partition("#")[0])))


def ask(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, body (JSON where it is) and headers of a request."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            status, content, told = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            status, content, told = error.code, error.read(), error.headers
    return status, json.loads(content) if "json" in told["Content-Type"] else content, told


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def head(path: str, **headers: Any) -> bytes:
    """The head of a POST with JSON."""
    lines = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes it."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)
