"""Provenance of published numbers: hardware, versions, and the state of the repository."""

import functools
import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(*arguments: str) -> str | None:
    """The output of git in this file's folder; `None` if git is missing or fails."""
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


@functools.cache
def checkout() -> Path | None:
    """The root of the git checkout that contains this code.

    `None` for installed code, even if its environment is inside a checkout, where git does not track it.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    root = _git("rev-parse", "--show-toplevel")
    return None if root is None else Path(root)


def provenance(device: str) -> dict[str, Any]:
    """The provenance entries of a results file; `device` is "cpu" or "cuda"."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    in_checkout = checkout() is not None
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{name}, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "commit": (_git("rev-parse", "HEAD") if in_checkout else None) or "no repository",
        "dirty": in_checkout and bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
