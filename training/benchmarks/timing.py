"""Timing, memory counters, and fresh processes for the benchmarks."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def seconds_of(step: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a matrix product (rows, inner) x (inner, columns): the best of several."""
    left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    return 2 * rows * inner * columns / min(seconds_of(lambda: left @ right, device) for _ in range(5))


def fastest_dtype() -> torch.dtype:
    """bfloat16 where matrix products are faster in it, else float32. A processor that only emulates it is tens of times
    slower, and what it claims to have is not always fast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {dtype: product_rate(256, 512, 512, dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if rates[torch.bfloat16] > 1.5 * rates[torch.float32] else torch.float32


def reset_peak_memory() -> None:
    """Let the peak of this process's memory (VmHWM) start anew, from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_counter(name: str) -> int:
    """Bytes of a Linux memory counter of this process: resident now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function(*arguments)` in a new process, whose memory holds only the modules that it imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()
