"""Processes of their own that start with torch imported already: that is two thirds of what their start costs.

A server that has imported torch, and nothing of Hugging Face's or ours, forks once for every script. What the scripts
import from there on, and with which environment variables, is their own.
"""

import atexit
import functools
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 240  # seconds for ranks, on a busy machine
_one_at_a_time = threading.Lock()


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`, with `-c`, `-m` or a script.

    `environment` is added to this process's.
    """
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        output = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        request = {"command": command, "cwd": str(cwd), "environment": {**os.environ, **environment}, "output": output}
        with _one_at_a_time:
            server = _server()
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
        stdout, stderr = (Path(path).read_text(encoding="utf-8") for path in output)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def run_ranks(function: Callable, *arguments: object, world_size: int = 2):
    """`function(rank, *arguments)` in processes that fork from one that has imported what tests import.

    A fork of this process would not do: torch refuses backward passes there, after one was run here.
    """
    from torch.multiprocessing import start_processes

    forkserver()
    ranks = start_processes(function, arguments, world_size, start_method="forkserver", join=False)
    end = time.monotonic() + PATIENCE
    while not ranks.join(1):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"Some of {world_size} processes have not ended within {PATIENCE} seconds.")


def forkserver() -> multiprocessing.context.BaseContext:
    """A context whose processes have imported what tests import."""
    multiprocessing.set_forkserver_preload(["tests.conftest", "transformers.trainer"])
    return multiprocessing.get_context("forkserver")


@functools.cache
def _server() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    atexit.register(server.communicate)  # the end of its input is its own
    return server


def _serve():
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401 (as transformers does)

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            return _become(**request)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _become(command: list[str], cwd: str, environment: dict[str, str], output: list[str]):
    """Run a command line of Python's here; an exception of its is Python's to report."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, *output)):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    kind = command[0] if command[0] in ("-c", "-m") else "script"
    first = {"-c": "", "-m": cwd, "script": str(Path(command[0]).resolve().parent)}[kind]
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "script":
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    elif kind == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})  # noqa: S102


if __name__ == "__main__":
    _serve()
