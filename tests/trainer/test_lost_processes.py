"""A run of several processes ends soon after one of them is lost, and says which."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import TrainerCallback

from modeling_fromage import FromageTrainer
from modeling_fromage.trainer import heartbeat
from tests.helpers.distributed import free_port, make_trainer, with_environment
from tests.helpers.paths import IMAGES, ROOT
from tests.helpers.processes import forkserver
from training.train import main


class Fate(TrainerCallback):
    def __init__(self, fate: str):
        self.fate = fate

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            if self.fate == "raises":
                raise ValueError("the disk is full")
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[self.fate])


def begin(rank: int, folder: str, is_watched_closely: bool = True):
    os.dup2(os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    if is_watched_closely:
        heartbeat.INTERVAL, heartbeat.SILENCE = 0.3, 3.0


def train(rank: int, folder: str, fate: str):
    begin(rank, folder)
    make_trainer(Path(folder), world_size=2, num_train_epochs=9, callbacks=[Fate(fate)]).train()


@contextmanager
def two_ranks(function, *arguments):
    """Processes that were started by hand."""
    port, context = free_port(), forkserver()
    ranks = [context.Process(target=with_environment, args=(rank, port, function, arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("killed", r"The process of rank 1 \(.*, {pid}\) is silent"),
        ("stopped", r"The process of rank 1 \(.*, {pid}\) has been silent for 3 seconds"),
        ("raises", r"The process of rank 1 \(.*, {pid}\) failed: ValueError: the disk is full"),
    ],
)
def test_a_lost_process_ends_the_run(fate, message, tmp_path):
    with two_ranks(train, str(tmp_path), fate) as ranks:
        ranks[0].join(60)
        assert ranks[0].exitcode not in (0, None)
        errors = (tmp_path / "stderr0").read_text()
        assert re.search(message.format(pid=ranks[1].pid), errors), errors[-3000:]
        assert "resume_from_checkpoint=true" in errors


def run_command(rank: int, folder: str, stops_in: str):
    """`fromage train`, whose second process is stopped at the beginning of a method of the trainer."""
    begin(rank, folder, is_watched_closely=bool(stops_in))
    if rank == 1 and stops_in:
        setattr(FromageTrainer, stops_in, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGSTOP))
    main([f"{folder}/config.yaml"])


@pytest.fixture
def config(backbones, tmp_path):
    lines = [f"thing {i}\t{IMAGES}/img_{i:03d}.png" for i in range(8)]
    (tmp_path / "pairs.tsv").write_text("caption\timage\n" + "\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"language_model: {backbones}/language_model\nvision_model: {backbones}/vision_model\nprojection_dim: 16\n"
        f"train_data: {tmp_path}/pairs.tsv\neval_data: {tmp_path}/pairs.tsv\noutput_dir: {tmp_path}/out\n"
        "max_steps: 1\nper_device_train_batch_size: 4\nsave_strategy: 'no'\nreport_to: none\nuse_cpu: true\n"
        "ddp_backend: gloo\neval_samples: 0\n"
    )


@pytest.mark.parametrize("stops_in", ["__init__", "save_model"])
def test_a_process_that_is_lost_in_any_part_of_the_command_ends_it(stops_in, config, tmp_path):
    with two_ranks(run_command, str(tmp_path), stops_in) as ranks:
        ranks[0].join(60)
        assert ranks[0].exitcode == 1
        errors = (tmp_path / "stderr0").read_text()
        told = rf"The process of rank 1 \(.*, {ranks[1].pid}\) has been silent for 3 seconds"
        assert re.search(told, errors), errors[-3000:]


def test_the_command_ends_where_none_is_lost(config, tmp_path):
    """The one that uploads, say, may take its time."""
    with two_ranks(run_command, str(tmp_path), "") as ranks:
        for rank, process in enumerate(ranks):
            process.join(60)
            assert process.exitcode == 0, (tmp_path / f"stderr{rank}").read_text()[-3000:]
    assert (tmp_path / "out" / "all_results.json").is_file()


def test_torchrun_ends_the_run(tmp_path):
    (tmp_path / "script.py").write_text(
        "from tests.trainer import test_lost_processes as here\n"
        "here.make_trainer(here.Path('run'), world_size=2, callbacks=[here.Fate('killed')]).train()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), "script.py"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr and "rank      : 1 (local_rank: 1)" in done.stderr
