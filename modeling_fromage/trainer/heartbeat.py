"""A run of several processes ends when one of them is lost, with a message that names it.

Otherwise the others wait in a collective: NCCL's for `ddp_timeout`, half an hour. torchrun sees a process of its own
die; of one that was started by hand, or is stopped rather than dead, nobody learns.
"""

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds from one sign of life to the next
SILENCE = 40.0  # seconds after which a process counts as lost
_WHAT_TO_DO = (
    "Look at the end of its own output; where that shows no error it was killed, for want of memory for instance (see "
    "`dmesg`), or its machine is gone. With `resume_from_checkpoint=true` the same command continues the run."
)
_runs = itertools.count()
_is_watched = threading.Event()


@contextmanager
def watched_processes(args: TrainingArguments) -> Iterator[None]:
    """Within, each process of a run leaves signs of life in the run's store, and watches those of the next one.

    Where the next one falls silent, or says that it has failed, each process logs which one that is and exits at once:
    its main thread may be in a collective that nothing else ends. An error that a lost process has caused is given a
    note with its name. All processes enter and leave together; within another `watched_processes` one does nothing.
    Without `MASTER_ADDR`, as where processes meet by a file, nothing is watched.

    Args:
        args (`TrainingArguments`): Of the run. Making them has joined its processes.

    Example:

        with watched_processes(args):
            trainer = FromageTrainer(model, args, train_dataset=pairs, processing_class=processor)
            trainer.train()
            trainer.evaluate()
            trainer.save_model()
    """
    address = os.environ.get("MASTER_ADDR")
    if args.world_size == 1 or not address or _is_watched.is_set():
        yield
        return
    _is_watched.set()
    try:
        with _watched(args, address, next(_runs)):
            yield
    finally:
        _is_watched.clear()


@contextmanager
def _watched(args: TrainingArguments, address: str, run: int) -> Iterator[None]:
    # A client of its own: that of the process group is locked while the main thread waits in it.
    patience = timedelta(seconds=SILENCE)
    client = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    # A run that torchrun has started again has the same store.
    prefix = f"fromage/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{run}"
    watch = Watch(dist.PrefixStore(prefix, client), args.process_index, args.world_size)
    watch.sign()
    dist.barrier()  # all have signed
    watch.start()
    try:
        yield
        watch.wait_for_all()  # the last one is watched, too
    except BaseException as error:
        watch.explain(error)
        raise
    finally:
        watch.end()
    dist.barrier()  # none closes the store while another still signs in it


class Watch(threading.Thread):
    """The thread of one process that signs in `store`, and watches the process of the next rank."""

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        super().__init__(daemon=True, name="watched_processes")
        self.store, self.rank, self.world_size = store, rank, world_size
        self.stopped = threading.Event()

    def run(self) -> None:
        last, looks = "", 0  # in vain: seconds would include those in which this process was suspended itself
        while not self.stopped.wait(INTERVAL):
            failure = None
            try:
                self.sign()
                failure = self._failure()
                sign = self._sign_of((self.rank + 1) % self.world_size)
                looks = looks + 1 if sign == last else 0
                last = sign
                if not failure and looks * INTERVAL > SILENCE:
                    failure = f"The process {_name(sign)} has been silent for {SILENCE:.0f} seconds."
                    self.store.compare_set("failure", "", failure)
            except RuntimeError as error:
                failure = f"The process of rank 0, which holds the run's store, does not answer ({error})."
            # One that is about to fail itself, for the same reason perhaps, is given the time to say so.
            if failure and not self.stopped.wait(2 * INTERVAL):
                logger.error("This run ends. %s %s", failure, _WHAT_TO_DO)
                os._exit(1)

    def end(self) -> None:
        """Stop, and wait for the thread, so that it uses no store that is being closed; one that hangs is left."""
        self.stopped.set()
        self.join(2 * INTERVAL)

    def sign(self) -> None:
        self.store.set(str(self.rank), f"of rank {self.rank} ({socket.gethostname()}, {os.getpid()}) {time.time()}")

    def wait_for_all(self) -> None:
        """Wait until all processes have come so far: one may be uploading for longer than a collective waits."""
        self.store.set(f"end of {self.rank}", "")
        ends = [f"end of {rank}" for rank in range(self.world_size)]
        while not self.store.check(ends):
            time.sleep(INTERVAL / 10)

    def explain(self, error: BaseException) -> None:
        """Tell `error` which lost process has caused it, or tell the others of it."""
        try:
            lost = self._lost() if isinstance(error, RuntimeError) else None
            if lost:
                error.add_note(f"{lost} {_WHAT_TO_DO}")
            else:
                own = f"The process {_name(self._sign_of(self.rank))} failed: {type(error).__name__}: {error}."
                self.store.compare_set("failure", "", own)
        except RuntimeError:
            error.add_note(f"The process of rank 0, which holds the run's store, does not answer. {_WHAT_TO_DO}")

    def _lost(self) -> str | None:
        """What is known of a process that has failed or is silent now, waiting for some signs."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = [self._sign_of(rank) for rank in others]
        for _ in range(3):
            time.sleep(INTERVAL)
            if failure := self._failure():
                return failure
        silent = [_name(old) for rank, old in zip(others, before, strict=True) if self._sign_of(rank) == old]
        return f"The process {', the process '.join(silent)} is silent." if silent else None

    def _failure(self) -> str | None:
        return self.store.get("failure").decode() if self.store.check(["failure"]) else None

    def _sign_of(self, rank: int) -> str:
        return self.store.get(str(rank)).decode()


def _name(sign: str) -> str:
    return sign.rsplit(" ", 1)[0]  # without the time


__all__ = ["watched_processes"]
