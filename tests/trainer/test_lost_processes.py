"""A run of several processes ends soon after one of them is lost, and says which."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from modeling_fromage.trainer import heartbeat
from tests.helpers.distributed import free_port, make_trainer, with_environment
from tests.helpers.paths import ROOT
from tests.helpers.processes import forkserver


class Fate(TrainerCallback):
    def __init__(self, fate: str):
        self.fate = fate

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            if self.fate == "raises":
                raise ValueError("the disk is full")
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[self.fate])


def train(rank: int, folder: str, fate: str):
    os.dup2(os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    heartbeat.INTERVAL, heartbeat.SILENCE = 0.3, 3.0
    make_trainer(Path(folder), world_size=2, num_train_epochs=9, callbacks=[Fate(fate)]).train()


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("killed", r"The process of rank 1 \(.*, {pid}\) is silent"),
        ("stopped", r"The process of rank 1 \(.*, {pid}\) has been silent for 3 seconds"),
        ("raises", r"The process of rank 1 \(.*, {pid}\) failed: ValueError: the disk is full"),
    ],
)
def test_a_lost_process_ends_the_run(fate, message, tmp_path):
    """Of processes that were started by hand."""
    port, context = free_port(), forkserver()
    ranks = [
        context.Process(target=with_environment, args=(rank, port, train, (str(tmp_path), fate))) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(60)
        assert ranks[0].exitcode not in (0, None)
        errors = (tmp_path / "stderr0").read_text()
        assert re.search(message.format(pid=ranks[1].pid), errors), errors[-3000:]
        assert "resume_from_checkpoint=true" in errors
    finally:
        for process in ranks:
            process.kill()
            process.join()


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
