"""Commands run in a process of their own, with a server on loopback for their Hub; what an upload would upload."""

from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from tests.helpers import processes
from tests.helpers.hub_server import HubServer
from tests.helpers.paths import ROOT


def run(hub: HubServer, tmp_path: Path, *command: str, ok: bool = True) -> str:
    """What a command of Python's prints, or its errors where it is not to be `ok`."""
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": str(ROOT)}
    done = processes.run(*command, cwd=tmp_path, **environment)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done.stdout if ok else done.stderr


def uploaded(folder: str | Path, ignore_patterns: list[str]) -> set[str]:
    """The files of a folder that `HfApi.upload_folder` uploads."""
    names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    return set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
