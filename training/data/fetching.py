"""Fetch many images at once without asking too much of any host."""

import io
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from modeling_fromage.images_fromage import ImageLimits, UnreadableImageError, is_url, load_rgb_image
from modeling_fromage.io.fetching import fetch

_BUSY = ("HTTP 429", "HTTP 500", "HTTP 502", "HTTP 503", "HTTP 504")
_FIRST_WAIT = 1.0  # seconds; doubled with every retry


@dataclass
class _Host:
    """What is left to fetch from a host, as `(number, url, attempt)`, and when it may be asked next."""

    waiting: deque = field(default_factory=deque)
    active: int = 0
    not_before: float = 0.0


@dataclass
class Fetcher:
    """Fetches images in threads.

    Args:
        limits: What fetching and decoding an image may cost.
        threads: Requests at a time.
        per_host: Requests at a time to one host.
        pause: Seconds between the beginnings of two requests to one host.
        retries: How often an image is asked for again whose host is busy or fails (HTTP 429 and 5xx); the whole host
            is left alone for a second before the first retry, and twice as long before each other.
        size: Pixels that the shorter side of a larger image is reduced to.
    """

    limits: ImageLimits
    threads: int = 32
    per_host: int = 2
    pause: float = 0.0
    retries: int = 3
    size: int | None = None

    def fetch_all(
        self, urls: Sequence[tuple[int, str]], receive: Callable[[int, bytes | UnreadableImageError], None]
    ) -> None:
        """Call `receive` with the number of each URL and its image, or why there is none; in one thread at a time."""
        queue = _Queue(urls, self)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while (task := queue.take()) is not None:
                    host, number, url, attempt = task
                    image = self._image(url)
                    again = isinstance(image, UnreadableImageError) and image.reason in _BUSY
                    if again and attempt < self.retries:
                        queue.put_back(host, number, url, attempt)
                        continue
                    with queue.changed:
                        receive(number, image)
                    queue.done(host)
            except BaseException as error:  # a full disk, say: it is raised where the threads were started
                failures.append(error)
                queue.stop()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.threads, len(urls)))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            queue.stop()
            raise
        if failures:
            raise failures[0]

    def _image(self, url: str) -> bytes | UnreadableImageError:
        try:
            return self._bytes_of(url)
        except UnreadableImageError as error:
            return error
        except Exception as error:  # whatever a hostile URL, path or image leads to is about this row alone
            return UnreadableImageError(url[:200], "broken", f"{type(error).__name__}: {error}"[:500])

    def _bytes_of(self, url: str) -> bytes:
        data = fetch(url, self.limits) if is_url(url) else _read(url, self.limits)
        image = load_rgb_image({"bytes": data, "path": url[:200]} if data else {"path": None}, self.limits)
        if self.size is None or min(image.size) <= self.size:
            return data
        scale = self.size / min(image.size)
        smaller = image.resize([max(1, round(side * scale)) for side in image.size], reducing_gap=2.0)
        contents = io.BytesIO()
        smaller.save(contents, "JPEG", quality=95)
        return contents.getvalue()


def _read(path: str, limits: ImageLimits) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO would block
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableImageError(path, "not a regular file")
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else "not readable"
        raise UnreadableImageError(path, reason, error.strerror or "") from error
    if len(data) > limits.max_bytes:
        raise UnreadableImageError(path, "too large", f"more than {limits.max_bytes:,} bytes")
    return data


class _Queue:
    """The URLs that are left, by host."""

    def __init__(self, urls: Sequence[tuple[int, str]], fetcher: Fetcher):
        self.fetcher, self.changed = fetcher, threading.Condition()
        self.hosts: dict[str, _Host] = {}
        self._left, self._stopped = len(urls), False
        for number, url in urls:
            self.hosts.setdefault(_host_of(url), _Host()).waiting.append((number, url, 0))
        self._turns = deque(self.hosts)  # the hosts with URLs, in the order in which they are asked

    def take(self) -> tuple[str, int, str, int] | None:
        """The next URL whose host may be asked, waited for; `None` when there are no more."""
        with self.changed:
            while self._left and not self._stopped:
                now, wake = time.monotonic(), None
                for _ in range(len(self._turns)):
                    name = self._turns.popleft()
                    host = self.hosts[name]
                    if not host.waiting:
                        continue
                    self._turns.append(name)
                    if host.active >= self.fetcher.per_host:
                        continue
                    if host.not_before > now:
                        wake = min(wake or host.not_before, host.not_before)
                        continue
                    host.active += 1
                    host.not_before = max(host.not_before, now + self.fetcher.pause)
                    return name, *host.waiting.popleft()
                self.changed.wait(None if wake is None else max(wake - now, 0.001))
        return None

    def put_back(self, name: str, number: int, url: str, attempt: int) -> None:
        with self.changed:
            host = self.hosts[name]
            if name not in self._turns:
                self._turns.append(name)
            host.waiting.append((number, url, attempt + 1))
            host.active -= 1
            host.not_before = max(host.not_before, time.monotonic() + _FIRST_WAIT * 2**attempt)
            self.changed.notify_all()

    def done(self, name: str) -> None:
        with self.changed:
            self.hosts[name].active -= 1
            self._left -= 1
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self._stopped = True
            self.changed.notify_all()


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


__all__ = ["Fetcher"]
