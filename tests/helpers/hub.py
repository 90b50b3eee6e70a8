"""Commands run in a process of their own, with a server on loopback for their Hub."""

from pathlib import Path

from tests.helpers import processes
from tests.helpers.hub_server import HubServer
from tests.helpers.paths import ROOT


def run(hub: HubServer, tmp_path: Path, *command: str, ok: bool = True) -> str:
    """What a command of Python's prints, or its errors where it is not to be `ok`."""
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": str(ROOT)}
    done = processes.run(*command, cwd=tmp_path, **environment)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done.stdout if ok else done.stderr
