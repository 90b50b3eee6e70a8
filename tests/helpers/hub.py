"""Commands run in a process of their own, with a server on loopback for their Hub."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.hub_server import HubServer
from tests.helpers.paths import ROOT


def run(hub: HubServer, tmp_path: Path, *command: str, ok: bool = True) -> str:
    environment = {
        **os.environ,
        **hub.environment,
        "HF_HOME": str(tmp_path / "hf_home"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done.stdout if ok else done.stderr
