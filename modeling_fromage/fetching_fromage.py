"""Fetching image files from the web, where an address may be hostile: limits on time, bytes, pixels and hosts."""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import threading
import time
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

_REDIRECTS = 5
_CHUNK = 1 << 16
_HEADERS = {"User-Agent": "modeling-fromage", "Accept": "image/*,*/*;q=0.5", "Connection": "close"}


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost at most.

    Attributes:
        timeout: Seconds for a whole download, redirects included.
        max_bytes: Size of a downloaded file.
        max_pixels: Width times height.
        allow_private_addresses: Whether a host may be this machine or one of its network (loopback, 10.0.0.0/8, the
            cloud's metadata service, ...).
    """

    timeout: float = 10.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    allow_private_addresses: bool = False


DEFAULT_LIMITS = ImageLimits()


class UnreadableImageError(ValueError):
    """An image that cannot be had; `reason` says why in few words, alike for alike causes."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        self.name, self.reason = name, reason
        detail = f" ({detail})" if detail else ""
        super().__init__(f"Cannot read the image {name}: {reason}{detail}. Replace it or leave it out.")


def is_url(source: object) -> bool:
    """Whether `source` is a web address or a `data:` URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "data:"))


def fetch(url: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes behind a `http(s)://` or `data:` URL.

    Every redirect's host is checked before it is connected to, by the very address that is connected to.

    Raises:
        UnreadableImageError: A limit is passed, a host is private, or the server answers with an error.
    """
    name = url if len(url) < 200 else f"{url[:100]}..."
    if url.lower().startswith("data:"):
        return _decode_data_url(url, name, limits)
    deadline, here = time.monotonic() + limits.timeout, url
    try:
        for _ in range(_REDIRECTS + 1):
            answer = _get(here, name, limits, deadline)
            if isinstance(answer, bytes):
                return answer
            here = urljoin(here, answer)
        raise UnreadableImageError(name, "too many redirects")
    except UnreadableImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= deadline or isinstance(error, TimeoutError):
            raise UnreadableImageError(name, "timed out", f"{limits.timeout:g} s") from error
        raise UnreadableImageError(name, "connection failed", f"{type(error).__name__}: {error}") from error


def _get(url: str, name: str, limits: ImageLimits, deadline: float) -> bytes | str:
    """The body behind `url`, or where it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UnreadableImageError(name, "redirects to something else than http(s)", url[:100])
    seconds = max(deadline - time.monotonic(), 0.001)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    # http.client's own hook: what it returns is used for http, and wrapped, with the host's name checked, for https.
    connection._create_connection = lambda address, *_: _connect(address, seconds, name, limits)
    connection.connect()
    opened = connection.sock
    # The socket's timeout is for one read; a server that drips bytes passes it, but not this.
    timer = threading.Timer(seconds, _shut, [opened])
    timer.daemon = True
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers=_HEADERS)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            return response.headers["Location"]
        if response.status != 200:
            raise UnreadableImageError(name, f"HTTP {response.status}")
        if int(response.headers.get("Content-Length") or 0) > limits.max_bytes:
            raise UnreadableImageError(name, "too large", f"more than {limits.max_bytes:,} bytes")
        body = _read(response, name, limits)
        if time.monotonic() >= deadline:  # the end may be the timer's, which looks like the server's
            raise TimeoutError
        return body
    finally:
        timer.cancel()
        connection.close()


def _read(response: http.client.HTTPResponse, name: str, limits: ImageLimits) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > limits.max_bytes:
            raise UnreadableImageError(name, "too large", f"more than {limits.max_bytes:,} bytes")
    return bytes(body)


def _connect(address: tuple[str, int], seconds: float, name: str, limits: ImageLimits) -> socket.socket:
    infos = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    if not limits.allow_private_addresses:
        for info in infos:
            found = ipaddress.ip_address(info[4][0].partition("%")[0])
            found = getattr(found, "ipv4_mapped", None) or found
            if not found.is_global or found.is_multicast:
                raise UnreadableImageError(
                    name, "private address", f"{address[0]} is {found}; `allow_private_addresses=True` lets it through"
                )
    for info in infos[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection(info[4][:2], seconds)
    return socket.create_connection(infos[-1][4][:2], seconds)


def _shut(opened: socket.socket):
    with contextlib.suppress(OSError):  # it is closed already
        opened.shutdown(socket.SHUT_RDWR)


def _decode_data_url(url: str, name: str, limits: ImageLimits) -> bytes:
    header, comma, data = url.partition(",")
    if len(data) > limits.max_bytes * 3:
        raise UnreadableImageError(name, "too large", f"more than {limits.max_bytes:,} bytes")
    try:
        raw = unquote_to_bytes(data)
        raw = base64.b64decode(raw, validate=True) if header.endswith(";base64") else raw
    except binascii.Error as error:
        raise UnreadableImageError(name, "broken data: URL") from error
    if not comma or len(raw) > limits.max_bytes:
        raise UnreadableImageError(name, "too large" if comma else "broken data: URL")
    return raw


__all__ = ["DEFAULT_LIMITS", "ImageLimits", "UnreadableImageError", "fetch", "is_url"]
