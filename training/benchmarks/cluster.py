"""Indexes built by Ray actors, of which one is killed, and by a driver that is killed, against the plain build."""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from modeling_fromage import FromageImageIndex
from modeling_fromage.io.tar_shards import add_member

from ..publishing.provenance import provenance

PATIENCE = 600.0  # seconds that a build may take to get as far as it is waited for
_BROKEN_EVERY = 1000  # pictures
_ROOT = __package__.removesuffix("training.benchmarks")  # what this code is called: installed, a part of the package


@dataclass
class Plan:
    """Pictures in all, tar shards of them, actors, and parts that they build."""

    images: int
    shards: int
    actors: int
    parts: int
    seed: int = 0


def write_shards(folder: Path, plan: Plan) -> int:
    """Random pictures of 32 x 32 in tar shards, with JSON beside them; how many of them are broken."""
    generator = torch.Generator().manual_seed(plan.seed)
    folder.mkdir(parents=True)
    for shard in range(plan.shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, plan.images, plan.shards):
                picture = io.BytesIO()
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(picture, "PNG")
                image = b"broken" if i % _BROKEN_EVERY == 1 else picture.getvalue()
                for kind, data in (("png", image), ("json", json.dumps({"number": i, "even": i % 2 == 0}).encode())):
                    add_member(tar, f"{i:06d}.{kind}", data)
    return len(range(1, plan.images, _BROKEN_EVERY))


class Build:
    """A run of `fromage index` over the shards in a folder, with what it starts."""

    def __init__(self, folder: Path, output: str, *arguments: str):
        self.log, self.parts, self._all = folder / f"{output}.log", folder / f"{output}.parts", {}
        command = [sys.executable, "-m", f"{_ROOT}hub_scripts.build_image_index", "tiny/fromage", "shards", output]
        path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        self.begun = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)

    def finished_parts(self) -> dict[str, int]:
        """Those of the run that are finished, with the time of their last change."""
        return {path.parent.name: path.stat().st_mtime_ns for path in self.parts.glob("*/index.json")}

    def actors(self) -> list[psutil.Process]:
        """Those that build at this moment. What the run has started is remembered."""
        with suppress(psutil.NoSuchProcess):
            self._all |= {child.pid: child for child in psutil.Process(self.process.pid).children(recursive=True)}
        found = []
        for child in self._all.values():
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] == ["ray::PartBuilder.build"]:
                    found.append(child)
        return found

    def wait_for_parts(self, count: int) -> list[psutil.Process]:
        """Wait until some parts are finished and others are being built; the actors at work.

        Raises:
            RuntimeError: The run ended before, or takes too long.
        """
        while time.monotonic() < self.begun + PATIENCE and self.process.poll() is None:
            if (actors := self.actors()) and len(self.finished_parts()) >= count:
                return actors
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"The run did not get as far as {count} parts with others left: {self._tail()}")

    def finish(self) -> float:
        """Wait for the end; the seconds since the start."""
        if self.process.wait():
            raise RuntimeError(f"The run failed: {self._tail()}")
        return time.monotonic() - self.begun

    def kill(self) -> None:
        """End the driver, and what it leaves behind."""
        self.process.kill()
        self.process.wait()
        for child in self._all.values():
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def measure(plan: Plan, keep: Path | None = None) -> dict[str, Any]:
    """Build one index plainly, one with an actor killed, and one with the driver killed and started again.

    Raises:
        RuntimeError: A run failed, or ended before it could be killed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        broken = write_shards(folder / "shards", plan)
        make_tiny = [sys.executable, "-m", f"{_ROOT}hub_scripts.make_tiny_checkpoint", str(folder / "tiny")]
        subprocess.run(make_tiny, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        plain = Build(folder, "plain").finish()
        ray = ["--ray", "--actors", str(plan.actors), "--parts", str(plan.parts)]
        with_actor, kept_of_actor = _with_an_actor_killed(Build(folder, "actor", *ray))
        first = Build(folder, "driver", *ray)
        first.wait_for_parts(max(1, plan.parts // 4))
        first.kill()
        kept = first.finished_parts()
        second = Build(folder, "driver", *ray)
        second.wait_for_parts(len(kept) + 1)
        built_again = sum(second.finished_parts().get(name) != changed for name, changed in kept.items())
        with_driver = second.finish()
        expected = FromageImageIndex.from_pretrained(folder / "plain")
        compared = {name: compare(expected, FromageImageIndex.from_pretrained(folder / name))
                    for name in ("actor", "driver")}  # fmt: skip
        return {
            **vars(plan), "broken": broken, "indexed": len(expected), "seconds_plain": plain,
            "actor_killed": {"seconds": with_actor, "parts_finished": kept_of_actor, **compared["actor"]},
            "driver_killed": {"seconds_of_second_run": with_driver, "parts_finished": len(kept),
                              "parts_built_again": built_again, **compared["driver"]},
            **provenance("cpu"),
        }  # fmt: skip


def _with_an_actor_killed(build: Build) -> tuple[float, int]:
    """Kill an actor in the middle; the seconds of the whole run, and the parts that were finished then."""
    actor = build.wait_for_parts(1)[0]
    actor.kill()
    finished = len(build.finished_parts())
    return build.finish(), finished


def compare(expected: FromageImageIndex, found: FromageImageIndex) -> dict[str, Any]:
    """Whether two indexes hold the same, in whatever order."""
    place = {name: number for number, name in enumerate(found.ids)}
    same_ids = place.keys() == set(expected.ids) and len(found) == len(expected)
    if not same_ids:
        return {"same_ids": False, "same_metadata": False, "same_skipped": False, "largest_difference": None}
    order = [place[name] for name in expected.ids]
    metadata, rows = found.metadata, found.embeds[order].float()
    reasons = [{row["id"]: row["reason"] for row in index.skipped} for index in (expected, found)]
    return {
        "same_ids": True,
        "same_metadata": [metadata[number] for number in order] == expected.metadata,
        "same_skipped": reasons[0] == reasons[1] and len(expected.skipped) == len(found.skipped),
        "largest_difference": (rows - expected.embeds.float()).abs().max().item(),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| killed | finished parts | built again | ids, metadata, skipped images | embeddings differ by |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, key in (("an actor", "actor_killed"), ("the driver, started again", "driver_killed")):
        run = results[key]
        is_same = run["same_ids"] and run["same_metadata"] and run["same_skipped"]
        difference = run["largest_difference"]
        lines.append(
            f"| {name} | {run['parts_finished']} of {results['parts']} | {run.get('parts_built_again', 0)} | "
            f"{'those of the plain build' if is_same else 'NOT those of the plain build'} | "
            f"{'-' if difference is None else '0' if not difference else f'{difference:.1e}'} |"
        )
    note = (
        f"SIGKILL; {results['images']:,} pictures of 32 x 32 in {results['shards']} tar shards, {results['broken']} of "
        f"them broken, {results['actors']} actors with one thread each, a tiny random model. {results['hardware']}, "
        f"torch {results['versions']['torch']}, Ray {results['versions']['ray']}."
    )
    return "\n".join([*lines, "", note])
