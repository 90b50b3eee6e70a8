"""Scores that took hours survive a kill, a full disk and a run of something else."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.evaluation.score_cache import ScoreCache

ROOT = Path(__file__).parents[2]
FACTS = {"model": "a", "protocol": "paper"}


def write_scores(path: Path, count: int, torn: bytes = b""):
    lines = [json.dumps(FACTS), *(json.dumps([i, [i / 2] * 40]) for i in range(count))]
    path.write_bytes(("\n".join(lines) + "\n").encode() + torn)


# Killed by the kernel in the middle of a write: at so many bytes of a file, whichever file it writes.
KILLED = """
import os, resource, signal, sys
from pathlib import Path
from training.evaluation.score_cache import ScoreCache

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
for limit in map(int, sys.argv[2:]):
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        ScoreCache(Path(sys.argv[1]), {"model": "a", "protocol": "paper"})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_kills_within_the_write_lose_nothing(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, 200, torn=b"[200, [0.5, ")
    limits = [str(limit) for limit in (0, 1, 100, 4096, path.stat().st_size // 2)]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), *limits], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(-signal.SIGXFSZ)] * len(limits), ran.stderr
    assert len(ScoreCache(path, FACTS).found) == 200


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, 50, torn=b"[50, [0.")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            ScoreCache(path, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(ScoreCache(path, FACTS).found) == 50
    assert path.read_bytes() == before.removesuffix(b"[50, [0.")


def test_a_whole_file_is_not_written_again(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, 5)
    os.utime(path, (1, 1))
    before = path.stat()
    assert sorted(ScoreCache(path, FACTS).found) == [0, 1, 2, 3, 4]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_of_something_else_is_kept(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, 5)
    of_paper = path.read_bytes()
    other = ScoreCache(path, {**FACTS, "protocol": "corrected"})
    assert not other.found
    other.add(3, [0.25])
    assert (tmp_path / "scores.jsonl.1").read_bytes() == of_paper
    ScoreCache(path, FACTS).add(7, [0.5])
    assert (tmp_path / "scores.jsonl.1").read_bytes() == of_paper
    assert json.loads((tmp_path / "scores.jsonl.2").read_text().splitlines()[1]) == [3, [0.25]]
    assert ScoreCache(path, FACTS).found == {7: [0.5]}


def test_a_line_that_is_no_score_is_computed_again(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], b"\0" * 30 + b"\n", b"12\n", b"[1]\n", lines[3]]))
    assert sorted(ScoreCache(path, FACTS).found) == [0, 2]
