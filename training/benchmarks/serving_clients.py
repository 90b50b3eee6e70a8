"""Clients of a server: good ones, which ask and check, and hostile ones."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
_HUGE = 50_000_000  # bytes


@dataclass
class Reply:
    """What came of a request for an answer."""

    status: int
    message: dict[str, Any]
    usage: dict[str, int]
    seconds: float
    first_seconds: float  # to the first piece of a stream; else as `seconds`

    @property
    def says(self) -> tuple[str, list[str]]:
        """The text, and the images' ids."""
        return self.message["content"], [image["id"] for image in self.message["images"]]


class Client:
    """A connection that is kept, as OpenAI's client keeps one."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def ask(self, body: dict[str, Any]) -> Reply:
        began = time.monotonic()
        self.connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        if body.get("stream") and response.status == 200:
            return self._read_stream(response, began)
        content = json.loads(response.read())
        seconds = time.monotonic() - began
        message = content["choices"][0]["message"] if response.status == 200 else content
        return Reply(response.status, message, content.get("usage", {}), seconds, seconds)

    @staticmethod
    def _read_stream(response: http.client.HTTPResponse, began: float) -> Reply:
        message: dict[str, Any] = {"content": "", "images": []}
        usage, first, status = {}, 0.0, 200
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                status, message = 500, event
                continue
            usage = event.get("usage") or usage
            for delta in (choice["delta"] for choice in event["choices"]):
                if delta.get("content"):
                    first = first or time.monotonic() - began
                    message["content"] += delta["content"]
                message["images"] += delta.get("images", [])
        seconds = time.monotonic() - began
        return Reply(status, message, usage, seconds, first or seconds)

    def close(self) -> None:
        self.connection.close()


@dataclass
class Record:
    """What good clients met."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    different: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def summary(self, elapsed: float) -> dict[str, Any]:
        seconds, first = sorted(self.seconds), sorted(self.first_seconds)
        return {
            "requests": len(seconds),
            "errors": dict(self.errors),
            "answers_that_differ": self.different,
            "seconds": elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "p50_seconds": _quantile(seconds, 0.5),
            "p95_seconds": _quantile(seconds, 0.95),
            "p50_first_seconds": _quantile(first, 0.5),
            "p95_first_seconds": _quantile(first, 0.95),
        }


def _quantile(values: Sequence[float], share: float) -> float | None:
    return values[min(int(len(values) * share), len(values) - 1)] if values else None


def ask_until(
    port: int, prompts: Sequence[dict[str, Any]], expected: Sequence[Any], end: float, record: Record, seed: int
) -> None:
    """Ask prompts in a random order, whole and streamed, and compare with what they were answered before."""
    generator, client = random.Random(seed), Client(port)
    while time.monotonic() < end:
        number = generator.randrange(len(prompts))
        stream = {"stream": True, "stream_options": {"include_usage": True}} if generator.random() < 0.5 else {}
        try:
            reply = client.ask(prompts[number] | stream)
        except (OSError, http.client.HTTPException, ValueError) as error:
            record.errors[type(error).__name__] += 1
            client.close()
            continue
        if reply.status != 200:
            record.errors[str(reply.status)] += 1
            continue
        record.seconds.append(reply.seconds)
        record.first_seconds.append(reply.first_seconds)
        record.tokens += reply.usage["completion_tokens"]
        record.different += reply.says != expected[number]
    client.close()


def in_threads(jobs: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- hostile clients ------------------------------------------------------------------------------------------------


def head(length: int | None, path: str = CHAT) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{size}\r\n\r\n".encode()


def status_of(connection: socket.socket) -> str:
    """The status that the server answers with, "closed" where it only closes, "silent" after a minute."""
    try:
        connection.settimeout(60)
        answer = connection.recv(4096)
    except TimeoutError:
        return "silent"
    except OSError:
        return "closed"
    return answer.split()[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"


def _sent(port: int, *pieces: bytes, pause: float = 0.0) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(OSError):  # the server had enough
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        return status_of(connection)


def _chat(port: int, content: Any, **options: Any) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": content}], "model": "served", **options}).encode()
    return _sent(port, head(len(body)), body)


def _leaves(port: int, stream: bool) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": "Tell me a long story."}], "model": "served",
                       "max_tokens": 200, "stream": stream}).encode()  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head(len(body)) + body)
        time.sleep(0.3)
    return "left"


def _image(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


# What each does, and the statuses that are proper. A 503 says that there are too many connections, a 429 that too many
# requests wait.
HOSTILE: dict[str, tuple[Callable[[int], str], set[str]]] = {
    "headers that never end": (lambda port: _sent(port, head(5)[:-2], pause=1), {"408", "503"}),
    "a body that never ends": (lambda port: _sent(port, head(100), *[b" "] * 3, pause=1), {"408", "503"}),
    "50 MB with their length": (lambda port: _sent(port, head(_HUGE), b" " * _HUGE), {"408", "413", "503"}),
    "50 MB in chunks": (
        lambda port: _sent(port, head(None), *[b"f4240\r\n" + b" " * 1_000_000 + b"\r\n"] * 50, b"0\r\n\r\n"),
        {"408", "413", "503"},
    ),
    "a broken image": (lambda port: _chat(port, _image("data:image/png;base64,iVBORw0KGgo=")), {"400", "503"}),
    "a private address": (lambda port: _chat(port, _image("http://169.254.169.254/latest")), {"400", "503"}),
    "a local file": (lambda port: _chat(port, _image("file:///etc/passwd")), {"400", "503"}),
    "a prompt beyond the context": (lambda port: _chat(port, "far away " * 10_000), {"400", "429", "503"}),
    "too many tokens": (lambda port: _chat(port, "hello", max_tokens=10**9), {"400", "503"}),
    "no JSON": (lambda port: _sent(port, head(3), b"{{{"), {"400", "503"}),
    "no HTTP": (lambda port: _sent(port, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"), {"400", "503"}),
    "leaves an answer": (lambda port: _leaves(port, False), {"left"}),
    "leaves a stream": (lambda port: _leaves(port, True), {"left"}),
}


def attack(port: int, kind: str, end: float, statuses: Counter[str]) -> None:
    """Do one hostile thing again and again."""
    while time.monotonic() < end:
        try:
            statuses[HOSTILE[kind][0](port)] += 1
        except OSError:  # no connection: the kernel's queue is full
            statuses["closed"] += 1
        time.sleep(0.2)


def open_connections(port: int, count: int, end: float, statuses: Counter[str]) -> None:
    """Open as many connections as `count`, ask for nothing, and see what becomes of them."""
    opened = []
    for _ in range(count):
        try:
            opened.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        except OSError as error:
            statuses[f"not opened ({type(error).__name__})"] += 1
        if time.monotonic() > end:
            break
    for connection in opened:
        statuses[status_of(connection)] += 1
        connection.close()


__all__ = ["Client", "HOSTILE", "Record", "Reply", "ask_until", "attack", "in_threads", "open_connections"]
