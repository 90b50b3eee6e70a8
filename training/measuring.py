"""What the benchmarks measure with: a clock, a counter of memory, and the device that is asked for."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds_of(step: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_counter(name: str) -> int:
    """Bytes of one of Linux's memory counters of this process: now resident (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def choose_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The device of `--device`, by default a GPU for the paper's shapes alone; ends the program where there is none."""
    device = options.device or ("cuda" if options.preset == "paper" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {options.preset} needs a GPU, and torch sees none.")
    return device
