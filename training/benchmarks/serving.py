"""A server under load and under attack, measured from outside."""

import base64
import contextlib
import http.client
import io
import json
import logging
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import psutil

from modeling_fromage import FromageImageIndex

from ..publishing.provenance import provenance
from .serving_clients import HOSTILE, Client, Record, ask_until, attack, in_threads, open_connections

logger = logging.getLogger(__name__)
_ROOT = __package__.removesuffix("training.benchmarks")  # what this code is called: installed, a part of the package
_PATIENCE = 300  # seconds for a server to load its model
_GOOD = 4  # clients beside hostile ones
_LIMITS = {"header-timeout": 5, "body-timeout": 5, "request-timeout": 300, "max-queue": 64}
_TEXTS = ["Show me {}.", "What goes well with {}?", "{}", "I like {}. What else is there?"]


@dataclass
class Plan:
    """What is served, clients, seconds of load and of attacks, connections that are opened, different prompts, tokens
    of an answer, and the seed."""

    model: str
    index: str
    image_root: str | None
    clients: int
    seconds: float
    hostile_seconds: float
    connections: int
    prompts: int
    max_tokens: int
    seed: int


@dataclass
class Server:
    """`fromage serve` in a process of its own."""

    process: subprocess.Popen
    port: int

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextlib.contextmanager
def started(plan: Plan) -> Iterator[Server]:
    """
    Raises:
        RuntimeError: The server did not start. The message holds its log.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Links have the same address on every port, so that answers can be compared.
    command = [sys.executable, "-m", f"{_ROOT}hub_scripts.serve", plan.model, "--index", plan.index, "--port",
               str(port), "--served-model-name", "served", "--public-url", "http://served"]  # fmt: skip
    command += ["--image-root", plan.image_root] if plan.image_root else []
    command += [word for name, value in _LIMITS.items() for word in (f"--{name}", str(value))]
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path})
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _is_up(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"The server did not start: {log.read()[-3000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield Server(process, port)
        finally:
            process.kill()
            process.wait()


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def make_prompts(plan: Plan) -> list[dict[str, Any]]:
    """Requests about images of the index, every other with one of them, greedy, of different lengths."""
    index = FromageImageIndex.from_pretrained(plan.index, image_root=plan.image_root)
    generator = random.Random(plan.seed)
    chosen = generator.choices(index.ids, k=plan.prompts)
    prompts = []
    for number, image_id in enumerate(chosen):
        name = str(index.get(image_id).get("caption", image_id))
        content: list[dict[str, Any]] = [{"type": "text", "text": _TEXTS[number % len(_TEXTS)].format(name)}]
        if number % 2:
            index.load_image(image_id).save(picture := io.BytesIO(), "png")
            url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        prompts.append({
            "model": "served", "messages": [{"role": "user", "content": content}], "ret_bias": float(number % 4),
            "max_tokens": generator.randint(max(1, plan.max_tokens // 2), plan.max_tokens), "max_num_rets": 1,
        })  # fmt: skip
    return prompts


def ask_alone(server: Server, prompts: list[dict[str, Any]]) -> tuple[list[Any], float]:
    """What each prompt is answered by itself, and tokens per second of one client."""
    client, says, tokens, seconds = Client(server.port), [], 0, 0.0
    for warm_up in (True, False):
        for prompt in prompts[:2] if warm_up else prompts:
            reply = client.ask(prompt)
            if reply.status != 200:
                raise RuntimeError(f"A prompt was answered with {reply.status}: {reply.message}.")
            if not warm_up:
                says.append(reply.says)
                tokens, seconds = tokens + reply.usage["completion_tokens"], seconds + reply.seconds
    client.close()
    return says, tokens / seconds


@contextlib.contextmanager
def watched(server: Server, samples: list[tuple[float, int]]) -> Iterator[None]:
    """Note the server's memory over time, as (seconds, bytes)."""
    ended, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while True:
            samples.append((round(time.monotonic() - began, 1), server.memory))
            if ended.wait(min(5.0, 0.5 + (time.monotonic() - began) / 20)):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def load(server: Server, plan: Plan, prompts: list[dict[str, Any]], expected: list[Any]) -> dict[str, Any]:
    """Many good clients at once."""
    records, samples = [Record() for _ in range(plan.clients)], list[tuple[float, int]]()
    began = time.monotonic()
    jobs = [partial(ask_until, server.port, prompts, expected, began + plan.seconds, record, plan.seed + i)
            for i, record in enumerate(records)]  # fmt: skip
    with watched(server, samples):
        in_threads(jobs)
    return {**_joined(records).summary(time.monotonic() - began), "memory": samples}


def _joined(records: list[Record]) -> Record:
    whole = Record()
    for record in records:
        whole.seconds += record.seconds
        whole.first_seconds += record.first_seconds
        whole.tokens += record.tokens
        whole.different += record.different
        whole.errors += record.errors
    return whole


def resist(server: Server, plan: Plan, prompts: list[dict[str, Any]], expected: list[Any]) -> dict[str, Any]:
    """Hostile clients of every kind, and good ones beside them."""
    hostile: dict[str, Counter[str]] = {kind: Counter() for kind in HOSTILE}
    opened: Counter[str] = Counter()
    records, samples = [Record() for _ in range(_GOOD)], list[tuple[float, int]]()
    began = time.monotonic()
    end = began + plan.hostile_seconds
    jobs = [partial(attack, server.port, kind, end, statuses) for kind, statuses in hostile.items()]
    jobs += [partial(ask_until, server.port, prompts, expected, end, record, plan.seed + i)
             for i, record in enumerate(records)]  # fmt: skip
    count = _allow_connections(plan.connections)
    jobs.append(partial(open_connections, server.port, count, end, opened))
    with watched(server, samples):
        in_threads(jobs)
    improper = {kind: sorted(statuses.keys() - HOSTILE[kind][1]) for kind, statuses in hostile.items()}
    return {
        "good": _joined(records).summary(time.monotonic() - began),
        "hostile": {kind: dict(statuses) for kind, statuses in hostile.items()},
        "improper": {kind: statuses for kind, statuses in improper.items() if statuses},
        "connections": dict(opened),
        "memory": samples,
    }


def _allow_connections(count: int) -> int:
    """Raise this process's limit on open files; how many connections it allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 500 if hard == resource.RLIM_INFINITY else min(count + 500, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return min(count, wanted - 500)


def measure(plan: Plan) -> dict[str, Any]:
    """Start a server, load it, attack it, kill it, and start it again.

    Raises:
        RuntimeError: The server did not start, or did not answer the prompts one by one.
    """
    prompts = make_prompts(plan)
    with started(plan) as server:
        expected, alone = ask_alone(server, prompts)
        logger.info("One client: %.1f tokens a second.", alone)
        loaded = load(server, plan, prompts, expected)
        logger.info("%d clients: %s", plan.clients, json.dumps({**loaded, "memory": len(loaded["memory"])}))
        resisted = resist(server, plan, prompts, expected)
        again_alone = ask_alone(server, prompts)[1]
        server.process.kill()
        server.process.wait()
    with started(plan) as server:
        restarted = ask_alone(server, prompts)[0]
    return {
        "plan": asdict(plan), "alone_tokens_per_second": alone, "alone_after": again_alone, "load": loaded,
        "speedup": loaded["tokens_per_second"] / alone, "attack": resisted,
        "same_answers_after_kill": restarted == expected, **provenance("cpu"),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    loaded, attacked = results["load"], results["attack"]
    names = ["", "requests", "errors", "answers that differ", "p50", "p95", "tokens/s", "memory"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row, memory in (
        (f"{results['plan']['clients']} clients", loaded, loaded["memory"]),
        (f"{_GOOD} clients beside hostile ones", attacked["good"], attacked["memory"]),
    ):
        sizes = [size / 2**20 for _, size in memory]
        shown = ["-" if row[key] is None else f"{row[key]:.2f} s" for key in ("p50_seconds", "p95_seconds")]
        sizes_told = f"{sizes[len(sizes) // 4]:.0f} MB after a quarter, {sizes[-1]:.0f} MB at the end"
        cells = [name, row["requests"], sum(row["errors"].values()), row["answers_that_differ"], *shown]
        cells += [f"{row['tokens_per_second']:.0f}", sizes_told]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    told = "; ".join(f"{kind}: {_told(statuses)}" for kind, statuses in attacked["hostile"].items())
    note = (
        f"One client at a time: {results['alone_tokens_per_second']:.0f} tokens/s; with {results['plan']['clients']} "
        f"clients {results['speedup']:.1f} times as many. Hostile clients were answered: {told}; "
        f"{results['plan']['connections']:,} open connections: {_told(attacked['connections'])}. Improper answers: "
        f"{attacked['improper'] or 'none'}. Killed and started again, the server answers "
        f"{'the same' if results['same_answers_after_kill'] else 'DIFFERENTLY'}. {results['hardware']}, torch "
        f"{results['versions']['torch']}."
    )
    return "\n".join([*lines, "", note])


def _told(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
