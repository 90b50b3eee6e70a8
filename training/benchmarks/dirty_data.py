"""One epoch over tar shards with errors in them, in two processes, against the same without errors.

What was trained on is read from the token ids that reach the model, not from the code that replaces bad examples.
"""

import functools
import io
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer

from modeling_fromage import FromageForConditionalGeneration
from modeling_fromage.io.tar_shards import add_member
from modeling_fromage.trainer.bad_example_list import NAME

from ..publishing.provenance import provenance
from ..train import main as train

_PICTURES = 200  # different ones
_SECONDS = 1.0  # between two looks at the memory


@dataclass
class Plan:
    """Examples, examples of a shard, the share that is broken, and how they are trained on."""

    count: int
    shard_size: int
    broken: float
    size: int
    batch_size: int
    workers: int
    processes: int


def _picture(size: int, generator: np.random.Generator) -> bytes:
    pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return _file(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), "JPEG")


def _file(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _of_huge_size() -> bytes:
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


Files = tuple[bytes | None, bytes | None]  # of a picture and of a caption
BREAKS: dict[str, Any] = {
    "cut off": lambda picture, caption: (picture[: len(picture) // 2], caption),
    "a page of HTML": lambda picture, caption: (b"<html><body>403 Forbidden</body></html>", caption),
    "an empty file": lambda picture, caption: (b"", caption),
    "no picture": lambda picture, caption: (None, caption),
    "no caption": lambda picture, caption: (picture, None),
    "an empty caption": lambda picture, caption: (picture, b" \n"),
    "a special token": lambda picture, caption: (picture, caption + b" [RET]"),
    "not UTF-8": lambda picture, caption: (picture, b"caf\xe9 " + caption),
    "too thin": lambda picture, caption: (_file(Image.new("RGB", (3000, 2)), "PNG"), caption),
    "too large": lambda picture, caption: (_of_huge_size(), caption),
}


def write_shards(folder: Path, plan: Plan, broken: float) -> dict[int, str]:
    """Write the examples as tar shards; which of them are broken, and how."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pictures = [_picture(plan.size, generator) for _ in range(_PICTURES)]
    is_broken = generator.permutation(plan.count)[: round(plan.count * broken)]
    kinds = dict(zip(is_broken.tolist(), (list(BREAKS)[i % len(BREAKS)] for i in range(plan.count)), strict=False))
    for first in range(0, plan.count, plan.shard_size):
        with tarfile.open(folder / f"{first // plan.shard_size:05d}.tar", "w") as shard:
            for number in range(first, min(plan.count, first + plan.shard_size)):
                files: Files = (pictures[number % _PICTURES], f"number {number} of all".encode())
                if number in kinds:
                    files = BREAKS[kinds[number]](*files)
                for suffix, data in zip(("jpg", "txt"), files, strict=True):
                    if data is not None:
                        add_member(shard, f"{number:09d}.{suffix}", data)
    return kinds


def record_and_train(folder: str, arguments: list[str]) -> None:
    """Train, and write down the token ids of each caption that the model is given. Runs in each process."""
    forward = FromageForConditionalGeneration.forward
    with open(Path(folder, f"trained-{os.environ['RANK']}.jsonl"), "w", encoding="utf-8") as file:

        @functools.wraps(forward)
        def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.training:
                file.writelines(json.dumps(row) + "\n" for row in kwargs["retrieval_input_ids"].tolist())
            return forward(self, *args, **kwargs)

        FromageForConditionalGeneration.forward = recording
        torch.set_num_threads(1)
        train(arguments)


def _descendants(pid: int) -> Iterator[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has just ended
        return
    yield pid
    for child in children:
        yield from _descendants(child)


def resident_memory(pid: int) -> int:
    """Bytes of a process and those it has started, what they share divided among them."""
    total = 0
    for process in _descendants(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def run(folder: Path, shards: Path, backbones: tuple[str, str], plan: Plan) -> list[tuple[float, int]]:
    """Train for one epoch; the memory over time, as seconds and bytes."""
    folder.mkdir()
    config = {
        "language_model": backbones[0], "vision_model": backbones[1], "projection_dim": 16,
        "train_data": f"{shards}/*.tar", "streaming": True, "output_dir": str(folder), "num_train_epochs": 1,
        "per_device_train_batch_size": plan.batch_size, "dataloader_num_workers": plan.workers, "logging_steps": 50,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "ddp_backend": "gloo", "disable_tqdm": True,
        "on_bad_example": "skip", "concat_captions_prob": 0.5,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.processes}"]
    command = [*launcher, "-m", __name__, str(folder), str(folder / "config.yaml")]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    start, samples = time.perf_counter(), []
    while process.poll() is None:
        samples.append((round(time.perf_counter() - start, 1), resident_memory(process.pid)))
        time.sleep(_SECONDS)
    if process.returncode:
        raise RuntimeError(f"The run failed. Its log ends:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return samples


def trained_on(folder: Path, language_model: str) -> Counter[int]:
    """How often each example was trained on, by the texts that the model was given."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    found: Counter[int] = Counter()
    for path in folder.glob("trained-*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts = tokenizer.batch_decode([[token for token in row if token < len(tokenizer)] for row in rows])
        found.update(int(match[1]) for text in texts if (match := re.search(r"number (\d+) of all", text)))
    return found


def account(folder: Path, language_model: str, kinds: dict[int, str], count: int) -> dict[str, Any]:
    """What became of each example."""
    trained = trained_on(folder, language_model)
    path = folder / NAME
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    listed = Counter(int(row["place"].split(", ")[1]) for row in rows)
    reasons = Counter((kinds.get(int(row["place"].split(", ")[1]), "whole"), row["reason"]) for row in rows)
    return {
        "examples": count,
        "broken": len(kinds),
        "trained_on": len(trained),
        "listed": len(listed),
        "trained_on_or_listed": len(trained.keys() | listed.keys()),
        "trained_on_and_listed": len(trained.keys() & listed.keys()),
        "listed_twice": listed.total() - len(listed),
        "broken_but_not_listed": len(kinds.keys() - listed.keys()),
        "visits": trained.total(),
        "reasons": {kind: {reason: n for (k, reason), n in sorted(reasons.items()) if k == kind} for kind in BREAKS},
    }


def growth(samples: list[tuple[float, int]], seconds: float) -> float:
    """Memory in the last quarter of the `seconds` of training, with which a run ends, over that in their second."""
    values = [size for when, size in samples if when > samples[-1][0] - seconds]
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) / statistics.median(values[quarter : 2 * quarter] or values)


def measure(language_model: str, vision_model: str, plan: Plan) -> dict[str, Any]:
    """
    Raises:
        RuntimeError: A run failed.
    """
    results: dict[str, Any] = {"plan": vars(plan), "runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name, share in (("clean", 0.0), ("dirty", plan.broken)):
            shards, folder = Path(temporary, f"{name}_shards"), Path(temporary, name)
            kinds = write_shards(shards, plan, share)
            samples = run(folder, shards, (language_model, vision_model), plan)
            metrics = json.loads((folder / "all_results.json").read_text())
            every = max(1, len(samples) // 60)
            results["runs"][name] = {
                "seconds": metrics["train_runtime"],
                "examples_a_second": plan.count / metrics["train_runtime"],
                "account": account(folder, language_model, kinds, plan.count),
                "memory_growth": growth(samples, metrics["train_runtime"]),
                "memory": [{"seconds": seconds, "megabytes": size >> 20} for seconds, size in samples[::every]],
            }
    runs = results["runs"]
    results["time_ratio"] = runs["dirty"]["seconds"] / runs["clean"]["seconds"]
    return {**results, **provenance("cpu")}


def table(results: dict[str, Any]) -> str:
    """The results in words."""
    lines = []
    for name, found in results["runs"].items():
        own = found["account"]
        lines.append(
            f"{name}: {own['trained_on']:,} trained on + {own['listed']:,} listed = {own['trained_on_or_listed']:,} of "
            f"{own['examples']:,} examples in {own['visits']:,} visits, {found['seconds']:.0f} s, memory of the last "
            f"quarter over the second {found['memory_growth']:.3f}"
        )
    return "\n".join([*lines, f"time, dirty over clean: {results['time_ratio']:.3f}"])


if __name__ == "__main__":
    record_and_train(sys.argv[1], sys.argv[2:])
