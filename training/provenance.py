"""Where a published number comes from: hardware, versions, and the state of the repository."""

import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(device: str) -> dict[str, Any]:
    """For a results file; `device` is "cpu" or "cuda"."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return run.stdout.strip() if run.returncode == 0 else "no repository"

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{name}, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
