"""The batch script and the Kubernetes jobs of examples/ are run, but for the commands: those run in this process."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from hub_scripts import build_image_index
from modeling_fromage import FromageImageIndex
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.indexes import write_pictures

EXAMPLES = Path(__file__).parents[2] / "examples"
SBATCH, JOBS = EXAMPLES / "index.sbatch", EXAMPLES / "index_job.yaml"


class Shell:
    """Runs a command whose `fromage index` is that of this checkout."""

    def __init__(self, folder: Path):
        make_model("opt_clip").save_pretrained(folder / "model")
        make_processor().save_pretrained(folder / "model")
        write_pictures(folder / "images", *(f"{i}.png" for i in range(5)), "broken.png")
        self.bin, self.told = folder / "bin", folder / "told"
        self.bin.mkdir()
        for name, text in (("srun", 'exec "$@"'), ("fromage", f"printf '%s\\0' \"$@\" > {self.told}")):
            (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
            (self.bin / name).chmod(0o755)
        self.names = {name: str(folder / name.lower()) for name in ("MODEL", "IMAGES", "OUTPUT")}

    def run(self, *command: str, **environment: str) -> None:
        environment["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        subprocess.run(command, env=environment, check=True)
        index, *arguments = self.told.read_text().split("\0")[:-1]
        assert index == "index"
        build_image_index.main(arguments)

    def check(self) -> None:
        index = FromageImageIndex.from_pretrained(self.names["OUTPUT"])
        assert sorted(index.ids) == [f"{i}.png" for i in range(5)] and len(index.skipped) == 1


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_the_batch_script(shell):
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    for task in range(2):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        shell.run("bash", str(SBATCH), **shell.names, **slurm)
    shell.run("bash", str(SBATCH), "merge", **shell.names)
    shell.check()
    done = subprocess.run(["bash", str(SBATCH)], env={"MODEL": "m"}, capture_output=True, text=True)
    assert done.returncode and "set IMAGES to a folder" in done.stderr


def test_the_jobs(shell):
    parts, merge = yaml.safe_load_all(JOBS.read_text(encoding="utf-8"))
    for job in (parts, merge):
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/data"} and given["OUTPUT"].startswith("/data/")
        pods = [{}]
        if job is parts:
            assert job["spec"]["completionMode"] == "Indexed" and int(given["PARTS"]) == job["spec"]["completions"]
            pods = [{"JOB_COMPLETION_INDEX": str(pod), "PARTS": "3"} for pod in range(3)]
        for pod in pods:
            here = {name: shell.names.get(name, value) for name, value in given.items()}
            shell.run(*container["command"], *container["args"], **here | pod)
    shell.check()
