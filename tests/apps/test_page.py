"""The page in a browser, on a small random model: what a person does there, and sees."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from modeling_fromage.serving.demo import Demo, launch
from tests.helpers.browser import find_browser
from tests.helpers.pipelines import COLOURS, picture
from tests.helpers.talking import ALWAYS, NEVER, Pace, make_talker

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")
PATIENCE = 60_000  # ms, for a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Pace]]:
    pipe, pace = make_talker()
    example = tmp_path_factory.mktemp("examples") / "orange.png"
    picture("orange").save(example)
    blocks = Demo(pipe).blocks("Colours", ["a red square", {"text": "", "files": [str(example)]}])
    _, address, _ = launch(blocks, prevent_thread_lock=True)
    yield address, pace
    blocks.close()


class Visitor:
    """A person with a browser of their own."""

    def __init__(self, browser, address: str):
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.addresses: list[str] = []
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(address, wait_until="domcontentloaded")
        self.textbox = self.page.get_by_test_id("textbox").last
        self.textbox.wait_for()
        self.bots = self.page.locator("[data-testid=bot]")
        self.pictures = self.bots.locator("img")

    def set_bias(self, bias: float) -> None:
        number = self.page.locator("#ret-bias input[type=number]")
        number.fill(str(bias))
        number.press("Enter")

    def send(self, text: str = "", picture: Path | None = None) -> None:
        if picture is not None:
            self.page.locator("input[type=file]").last.set_input_files(picture)
            self.page.locator(".thumbnail-item img, .thumbnails img").first.wait_for()
        self.textbox.fill(text)
        self.textbox.press("Enter")

    def wait_until_answered(self) -> None:
        """The button that stops an answer is gone."""
        self.page.wait_for_timeout(300)
        self.page.get_by_test_id("stop-button").wait_for(state="hidden")

    def ask(self, text: str = "", bias: float = 0.0, picture: Path | None = None) -> None:
        self.set_bias(bias)
        self.send(text, picture)
        self.wait_until_answered()

    def names(self) -> list[str]:
        """What stands below the pictures, without the scores."""
        labels = self.bots.locator(".caption-label").all_inner_texts()
        assert all(re.fullmatch(r"\S.* -?\d\.\d\d", label) for label in labels), labels
        return [label.rpartition(" ")[0].strip() for label in labels]

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture
def visitor(browser, server) -> Iterator[Visitor]:
    visitor = Visitor(browser, server[0])
    yield visitor
    server[1].seconds = 0.0
    visitor.close()


def test_an_answer_with_pictures(visitor, server):
    visitor.ask("a red square", ALWAYS)
    visitor.pictures.first.wait_for()
    assert sorted(set(visitor.names()) & set(COLOURS)) == sorted(visitor.names()) and len(visitor.names()) == 3
    widths = visitor.pictures.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 3 and min(widths) > 0
    assert {address.split("/")[2] for address in visitor.addresses if "//" in address} == {server[0].split("/")[2]}


def test_the_slider_decides(visitor):
    visitor.ask("a red square", NEVER)
    assert visitor.pictures.count() == 0 and visitor.bots.count() and visitor.bots.first.inner_text().strip()
    visitor.ask("a red square", ALWAYS)
    assert visitor.pictures.count() == 3
