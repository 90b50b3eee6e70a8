"""What happens while tests are collected: nothing is fetched."""

from tests.helpers import processes
from tests.helpers.paths import ROOT

IMPORT = """
import sys
from pathlib import Path
from tests.helpers import fetch_transformers_tests

fetch_transformers_tests.ROOT = Path("/as/on/a/new/machine")

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo") or event == "subprocess.Popen" and "pip" in arguments[1]:
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
import tests.model.test_transformers_common as common
tests = common.unittest.defaultTestLoader.loadTestsFromModule(common)
result = common.unittest.TestResult()
tests.run(result)
told = [trace for _, trace in [*result.errors, *result.failures]]
assert told and all("python -m tests.helpers.fetch_transformers_tests" in trace for trace in told), told
"""


def test_nothing_is_fetched_at_import(tmp_path):
    """Where transformers' own tests were not fetched yet, they fail, and say what to do."""
    run = processes.run("-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr[-3000:]
