"""`fromage serve` and `fromage demo` as processes: started, told to end, and killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from modeling_fromage.serving.server import listen
from tests.helpers import pages
from tests.helpers.paths import ROOT
from tests.helpers.pipelines import COLOURS, picture
from tests.helpers.serving import ask

ASKED = {"model": "fromage", "messages": [{"role": "user", "content": "hello"}], "ret_bias": 20, "max_tokens": 1}
PATIENCE = 120


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = make_tiny_checkpoint(folder)
    model = FromageForConditionalGeneration.from_pretrained(checkpoint)
    processor = FromageProcessor.from_pretrained(checkpoint)
    pictures = [picture(name) for name in COLOURS]
    index = FromageImageIndex.build(model, processor, pictures, ids=list(COLOURS), show_progress=False)
    index.save_pretrained(folder / "index")
    (folder / "serve.yaml").write_text(f"model: {checkpoint}\nindex: {folder / 'index'}\nshutdown_timeout: 20\n")
    return folder


class Process:
    """A command of ours that serves, at a port that was free."""

    def __init__(self, *command: str):
        with listen("127.0.0.1", [0]) as free:
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", self.address.rpartition(":")[2]],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Process":
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if ask(self.address, "/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.2)
        self.process.kill()
        raise AssertionError(self.process.communicate()[0])

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_it_ends_when_told_to(files):
    """With status 0, and after the answer that is being written."""
    answers = []
    with Process("hub_scripts.serve", str(files / "serve.yaml")) as server:
        assert ask(server.address, "/v1/chat/completions", ASKED)[1]["choices"][0]["message"]["images"]
        long = {**ASKED, "ret_bias": -20, "max_tokens": 100, "messages": [{"role": "user", "content": "a"}]}
        runs = threading.Thread(target=lambda: answers.append(ask(server.address, "/v1/chat/completions", long)))
        runs.start()
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=30)
        runs.join()
    assert server.process.returncode == 0 and "finishing what runs" in output and "Traceback" not in output
    assert answers[0][0] in (200, 503)


def test_killed_and_started_again(files):
    """The index is whole, and answers are the same."""
    answers = []
    for _ in range(2):
        with Process("hub_scripts.serve", str(files / "serve.yaml")) as server:
            message = ask(server.address, "/v1/chat/completions", ASKED)[1]["choices"][0]["message"]
            answers.append([image["id"] for image in message["images"]])
            server.process.kill()
            server.process.wait()
    assert answers[0] == answers[1] and len(answers[0]) == 1
    assert FromageImageIndex.from_pretrained(files / "index").ids == list(COLOURS)


def test_the_page_and_the_api_of_one_command(files):
    with Process("hub_scripts.demo", str(files / "serve.yaml"), "--title", "Colours") as server:
        status, page, headers = ask(server.address, "/")
        assert status == 200 and b"Colours" in page and "default-src 'self'" in headers["content-security-policy"]
        assert ask(server.address, "/v1/chat/completions", ASKED)[0] == 200
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=30)
    assert re.search(r"The page is at http://127.0.0.1:\d+ ", output) and server.process.returncode == 0


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(files):
    with listen("127.0.0.1", [0]) as taken:
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-m", "hub_scripts.serve", "nowhere", "--port", port],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
    assert run.returncode == 2 and f"127.0.0.1:{port} cannot be served (Address already in use)" in run.stderr


def test_the_page_of_documentation(files, capsys):
    """Every JSON body of docs/serve.md is answered as it stands there, and its snippet runs."""
    text = pages.read("docs/serve.md")
    bodies = re.findall(r"^`POST (/v1/\S+)`[^`]*```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (snippet,) = pages.blocks("docs/serve.md", "python")
    with Process("hub_scripts.serve", str(files / "serve.yaml"), "--served-model-name", "my-fromage") as server:
        for path, body in bodies:
            status, answer, _ = ask(server.address, path, json.loads(body))
            assert status == 200, (path, answer)
        exec(snippet.replace("http://127.0.0.1:8000", server.address), {})  # noqa: S102
    assert len(bodies) == 4 and capsys.readouterr().out
