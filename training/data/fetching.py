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
from modeling_fromage.io.fetching import BusyHostError, fetch

_FIRST_WAIT = 1.0  # seconds; doubled with every retry


@dataclass
class _Host:
    """What is left to fetch from a host, as `(number, url, attempt)`, and when it may be asked next."""

    waiting: deque = field(default_factory=deque)
    active: int = 0
    not_before: float = 0.0


@dataclass
class _Busy:
    """A host that is busy: its last answer, until when it is left alone, and the seconds of all waits up to then."""

    reason: str
    until: float
    waits: float = 0.0


@dataclass
class Fetcher:
    """Fetches images in threads.

    Args:
        limits: What fetching and decoding an image may cost.
        threads: Requests at a time.
        per_host: Requests at a time to one host.
        pause: Seconds between the beginnings of two requests to one host.
        retries: How often an image is asked for again whose host is busy or fails (HTTP 429 and 5xx); the whole host
            is left alone for a second before the first retry, twice as long before each other, and at least for as long
            as it asks for (`Retry-After`).
        max_wait: Seconds that a host is waited for, in all until it is no longer busy. While it is to be left alone for
            longer, its images fail without being asked for.
        size: Pixels that the shorter side of a larger image is reduced to.
    """

    limits: ImageLimits
    threads: int = 32
    per_host: int = 2
    pause: float = 0.0
    retries: int = 3
    max_wait: float = 300.0
    size: int | None = None
    busy: dict[str, _Busy] = field(default_factory=dict, init=False, repr=False)  # from one call to the next

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
                    image = self._ask(queue, host, url, attempt)
                    if image is None:
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

    def _ask(self, queue: "_Queue", host: str, url: str, attempt: int) -> bytes | UnreadableImageError | None:
        """An image, or why there is none; `None` if it is to be asked for again."""
        if (refusal := queue.refusal(host, url)) is not None:
            return refusal
        image = self._image(url)
        queue.note(host, image, attempt)
        if not isinstance(image, BusyHostError):
            return image
        if (refusal := queue.refusal(host, url)) is not None:
            return refusal
        return None if attempt < self.retries else image

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
                    ready = self._ready(name)
                    if ready > now:
                        wake = min(wake or ready, ready)
                        continue
                    host.active += 1
                    host.not_before = max(host.not_before, now + self.fetcher.pause)
                    return name, *host.waiting.popleft()
                self.changed.wait(None if wake is None else min(max(wake - now, 0.001), threading.TIMEOUT_MAX))
        return None

    def put_back(self, name: str, number: int, url: str, attempt: int) -> None:
        with self.changed:
            host = self.hosts[name]
            if name not in self._turns:
                self._turns.append(name)
            host.waiting.append((number, url, attempt + 1))
            host.active -= 1
            self.changed.notify_all()

    def note(self, name: str, answer: bytes | UnreadableImageError, attempt: int) -> None:
        """Keep for how long a host is to be left alone after what it has answered."""
        with self.changed:
            now, known = time.monotonic(), self.fetcher.busy
            if not isinstance(answer, BusyHostError):
                if name in known and known[name].until > now:
                    known[name].waits = known[name].until - now  # it was asked before it said so
                else:
                    known.pop(name, None)
                return
            busy = known.setdefault(name, _Busy(answer.reason, now))
            backoff = _FIRST_WAIT * 2**attempt if attempt < self.fetcher.retries else 0.0
            begin, end = max(busy.until, now), now + max(backoff, answer.retry_after or 0.0)
            if end > begin:
                busy.waits, busy.until = busy.waits + end - begin, end
            busy.reason = answer.reason
            self.changed.notify_all()

    def refusal(self, name: str, url: str) -> UnreadableImageError | None:
        """Why a host is not asked for `url`, if it is busy for too long."""
        with self.changed:
            busy = self.fetcher.busy.get(name)
            if busy is None or not self._is_given_up(busy):
                return None
            wait, most = max(busy.until - time.monotonic(), 0.0), self.fetcher.max_wait
            detail = f"its host is to be left alone for {wait:,.0f} s, and is not waited for beyond {most:g} s"
            return UnreadableImageError(url[:200], busy.reason, detail)

    def _ready(self, name: str) -> float:
        """When the next URL of a host is to be taken."""
        busy, not_before = self.fetcher.busy.get(name), self.hosts[name].not_before
        if busy is None:
            return not_before
        return 0.0 if self._is_given_up(busy) else max(not_before, busy.until)

    def _is_given_up(self, busy: _Busy) -> bool:
        return busy.until > time.monotonic() and busy.waits > self.fetcher.max_wait

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
