"""Fetch image files from the web, where a URL may be hostile: within limits on time, bytes and hosts."""

import base64
import contextlib
import http.client
import ipaddress
import queue
import re
import socket
import string
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from ..images_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError

_REDIRECTS = 5
_BUSY = (429, 500, 502, 503, 504)
_CHUNK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are the IPv4 address
_UNICAST = ipaddress.ip_network("2000::/3")  # the public IPv6 addresses that are allocated
_HEADERS = {"User-Agent": "modeling-fromage", "Accept": "image/*,*/*;q=0.5", "Connection": "close"}


class BusyHostError(UnreadableImageError):
    """A host asks for fewer requests, or is out of order (HTTP 429, 5xx).

    Attributes:
        retry_after (`float`, *optional*): Seconds for which it asks to be left alone (HTTP 429 and 503).
    """

    def __init__(self, name: str, reason: str, retry_after: float | None = None):
        super().__init__(name, reason, "" if retry_after is None else f"to be asked again in {retry_after:,.0f} s")
        self.retry_after = retry_after


def fetch(url: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes behind an `http(s)://` or `data:` URL.

    The host of each redirect is checked before connecting, by the very address that is then connected to.

    Raises:
        UnreadableImageError: A limit is passed, a host is private, or the server answers with an error: a
            [`BusyHostError`] where another try may help.
    """
    name = re.sub("//[^/@]*@", "//", url if len(url) < 200 else f"{url[:100]}...")  # without a password
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
    """The body behind `url`, or the URL that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UnreadableImageError(name, "no http(s) address", url[:100])
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    # Without a port, http.client would take the end of an IPv6 address for one.
    connection = kind(parts.hostname, kind.default_port if parts.port is None else parts.port)
    # http.client's own hook, which type stubs do not know: what it returns is used for http, and wrapped, with the
    # host's name checked, for https.
    setattr(connection, "_create_connection", lambda address, *_: _connect(address, deadline, name, limits))  # noqa: B010
    connection.connect()
    opened, response = connection.sock, None
    # The socket's timeout is for one read; a server that drips bytes passes it, but not this.
    timer = threading.Timer(_left(deadline), _shut, [opened])
    timer.daemon = True
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", quote(path, safe=string.punctuation), headers=_HEADERS)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            return quote(response.headers["Location"], safe=string.punctuation, encoding="latin-1")
        if response.status in _BUSY:
            wait = _retry_after(response.headers.get("Retry-After", "")) if response.status in (429, 503) else None
            raise BusyHostError(name, f"HTTP {response.status}", wait)
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
        if response is not None:  # it holds the socket, and an error's traceback holds it
            response.close()


def _retry_after(header: str) -> float | None:
    """The seconds that a `Retry-After` means, which is a number of them or a date; `None` where it is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        if header.strip().isdecimal():
            return float(header)
        date = parsedate_to_datetime(header)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return None


def _read(response: http.client.HTTPResponse, name: str, limits: ImageLimits) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > limits.max_bytes:
            raise UnreadableImageError(name, "too large", f"more than {limits.max_bytes:,} bytes")
    if response.length:  # what is left of Content-Length; None without one
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


def _connect(address: tuple[str, int], deadline: float, name: str, limits: ImageLimits) -> socket.socket:
    infos = _resolve(address, deadline)
    for found in {info[4][0] for info in infos if not limits.allow_private_addresses}:
        if not _is_public(found):
            raise UnreadableImageError(
                name, "private address", f"{address[0]} is {found}; `allow_private_addresses=True` lets it through"
            )
    for info in infos[:-1]:
        with contextlib.suppress(OSError):
            return _open(info, deadline)
    return _open(infos[-1], deadline)


def _open(info: tuple, deadline: float) -> socket.socket:
    opened = socket.create_connection(info[4][:2], _left(deadline))
    opened.settimeout(_left(deadline))  # for the TLS handshake and every read
    return opened


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _resolve(address: tuple[str, int], deadline: float) -> list[tuple]:
    """`getaddrinfo` in a thread, which is left behind if it is late: it has no timeout of its own."""
    answers: queue.SimpleQueue[list[tuple] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else found.ipv4_mapped
        if inner is None and (found not in _UNICAST or found.sixtofour):
            return False
        found = inner or found
    return found.is_global and not found.is_multicast


def _shut(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        opened.shutdown(socket.SHUT_RDWR)


def _decode_data_url(url: str, name: str, limits: ImageLimits) -> bytes:
    header, comma, data = url.partition(",")
    if len(data) > limits.max_bytes * 3:
        raise UnreadableImageError(name, "too large", f"more than {limits.max_bytes:,} bytes")
    try:
        raw = unquote_to_bytes(data)
        raw = base64.b64decode(raw, validate=True) if header.lower().endswith(";base64") else raw
    except ValueError as error:  # binascii.Error, and UnicodeEncodeError of a lone surrogate
        raise UnreadableImageError(name, "broken data: URL") from error
    if not comma or len(raw) > limits.max_bytes:
        raise UnreadableImageError(name, "too large" if comma else "broken data: URL")
    return raw


__all__ = ["BusyHostError", "fetch"]
