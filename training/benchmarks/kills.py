"""A run of two processes and their loader workers that is killed again and again, against one that is left alone."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from modeling_fromage.io.tar_shards import add_member
from modeling_fromage.trainer.checkpoints import last_complete_checkpoint

from ..publishing.provenance import provenance

PROCESSES, WORKERS = 2, 2
PATIENCE = 60.0  # seconds in which a run whose part was killed must have ended
_ROOT = __package__.removesuffix("training.benchmarks")  # what this code is called: installed, a part of the package


@dataclass
class Plan:
    """Kills, examples in all, shards of them, epochs, and steps from one checkpoint to the next."""

    kills: int
    examples: int
    shards: int
    epochs: int
    save_steps: int
    seed: int


def write_shards(folder: Path, plan: Plan) -> None:
    """Tar files in the layout of webdataset: 000123.jpg and 000123.txt."""
    generator = torch.Generator().manual_seed(plan.seed)
    for shard in range(plan.shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, plan.examples, plan.shards):
                picture = io.BytesIO()
                pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(picture, "JPEG")
                for kind, data in (("jpg", picture.getvalue()), ("txt", f"picture number {i}".encode())):
                    add_member(tar, f"{i:06d}.{kind}", data)


def write_config(folder: Path, plan: Plan) -> None:
    keys = {
        "language_model": "tiny/language_model", "vision_model": "tiny/vision_model", "projection_dim": 16,
        "train_data": "shards/*.tar", "streaming": True, "num_train_epochs": plan.epochs, "save_steps": plan.save_steps,
        "save_total_limit": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "ddp_backend": "gloo",
        "dataloader_num_workers": WORKERS, "seed": plan.seed, "disable_tqdm": True, "resume_from_checkpoint": True,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))


def start(folder: Path, output: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "-m",
               f"{_ROOT}training.train", "config.yaml", f"output_dir={output}"]  # fmt: skip
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{output}.log", "ab") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip


def last_step(output: Path) -> int:
    checkpoint = last_complete_checkpoint(output)
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def kill_part(process: subprocess.Popen, generator: random.Random) -> str:
    """Kill all of a run, one of its processes, or a loader worker; what it was."""
    agent = psutil.Process(process.pid)
    ranks = agent.children()
    workers = [worker for rank in ranks for worker in rank.children()]
    kinds = {"the whole run": [], "one process": ranks, "a loader worker": workers}
    kind = generator.choice([kind for kind, parts in kinds.items() if parts or kind == "the whole run"])
    if kind == "the whole run":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        generator.choice(kinds[kind]).kill()
    return kind


def killed_run(folder: Path, output: str, plan: Plan, startup: float, training: float) -> list[dict[str, Any]]:
    """Start a run again and again until it has been killed `plan.kills` times, at random times."""
    generator, kills = random.Random(plan.seed), []
    while len(kills) < plan.kills:
        process = start(folder, output)
        # In its start, or within a share of the training, so that some of it is left for the last kill.
        delay = generator.uniform(0.2, 1) * startup + generator.uniform(0, 1.2 * training / plan.kills)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            kind, then = kill_part(process, generator), time.monotonic()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"A run went on for {PATIENCE:.0f} seconds after {kind} had been killed.") from error
            kills.append({"after": round(delay, 2), "killed": kind, "seconds_to_end": time.monotonic() - then,
                          "last_checkpoint": last_step(folder / output)})  # fmt: skip
        else:
            raise RuntimeError(
                f"The run ended by itself after {len(kills)} kills, see {folder / output}.log. Give more --epochs."
            )
        finally:
            _end(process, folder)
    return kills


def _end(process: subprocess.Popen, folder: Path) -> None:
    """Kill what is left of a run's session: torchrun puts its processes into sessions of their own."""
    for left in psutil.process_iter(["cmdline", "cwd"]):
        own = f"output_dir={process.args[-1].partition('=')[2]}"
        if own in (left.info["cmdline"] or []) and left.info["cwd"] == str(folder.resolve()):
            left.kill()


def measure(plan: Plan, keep: Path | None = None) -> dict[str, Any]:
    """Train once without interruption and once with kills, and compare what is left.

    Raises:
        RuntimeError: A run failed, ended before its last kill, or did not end after one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        (folder / "shards").mkdir(parents=True)
        write_shards(folder / "shards", plan)
        write_config(folder, plan)
        make_tiny = [sys.executable, "-m", f"{_ROOT}hub_scripts.make_tiny_checkpoint", str(folder / "tiny")]
        subprocess.run(make_tiny, check=True, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        process = start(folder, "whole")
        while not any(folder.glob("whole/checkpoint-*")) and process.poll() is None:
            time.sleep(0.1)
        startup = time.monotonic() - begun
        finish(process, folder, "whole")
        total = time.monotonic() - begun
        kills = killed_run(folder, "killed", plan, startup, total - startup)
        finish(start(folder, "killed"), folder, "killed")
        whole, killed = (load_file(folder / output / "model.safetensors") for output in ("whole", "killed"))
        equal = whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
        if keep is None:
            shutil.rmtree(folder / "shards")
    return {
        "kills": kills, "weights_equal": equal, "tensors": len(whole), "processes": PROCESSES, "workers": WORKERS,
        "examples": plan.examples, "shards": plan.shards, "epochs": plan.epochs, "save_steps": plan.save_steps,
        "steps": plan.epochs * -(-plan.examples // (PROCESSES * 4 * 2)), "seconds_uninterrupted": total,
        **provenance("cpu"),
    }  # fmt: skip


def finish(process: subprocess.Popen, folder: Path, output: str) -> None:
    if process.wait():
        log = (folder / f"{output}.log").read_text(errors="replace")
        raise RuntimeError(f"The run failed: {log[-3000:]}")


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    kills = results["kills"]
    lines = ["| killed | times | the run had ended after | steps of the checkpoints that it went on from |",
             "|---|---|---|---|"]  # fmt: skip
    for kind in dict.fromkeys(kill["killed"] for kill in kills):
        own = [kill for kill in kills if kill["killed"] == kind]
        steps = ", ".join(str(kill["last_checkpoint"]) for kill in own)
        slowest = max(kill["seconds_to_end"] for kill in own)
        lines.append(f"| {kind} | {len(own)} | {slowest:.1f} s at most | {steps} |")
    outcome = "equal bit by bit to" if results["weights_equal"] else "NOT equal to"
    note = (
        f"SIGKILL {len(kills)} times at random times, {results['processes']} processes with {results['workers']} "
        f"loader workers each, {results['examples']} examples in {results['shards']} tar shards, {results['epochs']} "
        f"epochs: the {results['tensors']} trained tensors are {outcome} those of the run that was left alone. "
        f"{results['hardware']}, torch {results['versions']['torch']}."
    )
    return "\n".join([*lines, "", note])
