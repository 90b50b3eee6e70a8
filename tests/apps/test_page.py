"""The page in a browser, on a small random model: what a person does there, and sees."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright import sync_api

from modeling_fromage.serving.demo import Demo, mount
from tests.helpers.browser import find_browser
from tests.helpers.pipelines import COLOURS, picture
from tests.helpers.serving import NAME, ask, serving
from tests.helpers.talking import ALWAYS, NEVER, Pace, make_talker

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")
PATIENCE = 60_000  # ms, for a busy machine
sync_api.expect.set_options(timeout=PATIENCE)


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
    examples = ["a red square", {"text": "", "files": [str(example)]}]

    def put_page(app, service):
        mount(Demo(service.engine).blocks("Colours", examples), app)

    with serving(pipe, mount=put_page) as address:
        yield address, pace


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
        self.stop = self.page.get_by_role("button", name="Stop", exact=True)

    def set_bias(self, bias: float) -> None:
        number = self.page.locator("#ret-bias input[type=number]")
        number.fill(str(bias))
        number.press("Enter")

    def send(self, text: str = "", picture: Path | None = None) -> None:
        self.shown = self.bots.count()
        if picture is not None:
            self.page.locator("input[type=file]").last.set_input_files(picture)
            self.page.locator(".thumbnails .thumbnail-item").first.wait_for()
        self.textbox.fill(text)
        self.textbox.press("Enter")

    def wait_until_answered(self) -> None:
        sync_api.expect(self.bots.nth(self.shown)).to_be_visible()
        sync_api.expect(self.stop).to_be_hidden()

    def ask(self, text: str = "", bias: float = 0.0, picture: Path | None = None) -> None:
        self.set_bias(bias)
        self.send(text, picture)
        self.wait_until_answered()

    def names(self) -> list[str]:
        """What stands below the pictures, without the scores."""
        labels = self.bots.locator(".caption-label").all_inner_texts()
        assert all(re.fullmatch(r"\S.* -?\d\.\d\d", label) for label in labels), labels
        return [label.rpartition(" ")[0].strip() for label in labels]

    def widths(self, pictures: sync_api.Locator) -> list[int]:
        """Of pictures as they are, once all of the page are loaded; of one that failed to load it is 0."""
        self.page.wait_for_function("[...document.images].every(image => image.complete)")
        return pictures.evaluate_all("images => images.map(image => image.naturalWidth)")

    def count_pictures(self) -> int:
        self.page.wait_for_timeout(300)  # the last of an answer is being drawn
        return self.pictures.count()

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
    widths = visitor.widths(visitor.pictures)
    assert len(widths) == 3 and min(widths) > 0
    assert {address.split("/")[2] for address in visitor.addresses if "//" in address} == {server[0].split("/")[2]}


def test_the_api_is_beside_the_page(visitor, server):
    """Of one model: it answers a request while the page waits for the next message."""
    visitor.ask("a red square", NEVER)
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "ret_bias": ALWAYS, "max_tokens": 1}
    status, body, _ = ask(server[0], "/v1/chat/completions", asked)
    assert status == 200 and len(body["choices"][0]["message"]["images"]) == 1
    visitor.ask("a red square", ALWAYS)
    assert visitor.count_pictures() == 3


def test_the_slider_decides(visitor):
    visitor.ask("a red square", NEVER)
    assert visitor.count_pictures() == 0 and visitor.bots.count() and visitor.bots.first.inner_text().strip()
    visitor.ask("a red square", ALWAYS)
    assert visitor.count_pictures() == 3


def test_a_picture_of_ones_own_is_read(visitor, tmp_path):
    """It is shown, described, and compared with the index, which has one of its colour."""
    picture("green").save(tmp_path / "mine.png")
    visitor.ask("", NEVER, tmp_path / "mine.png")
    sync_api.expect(visitor.bots.get_by_text("Not said by the model")).to_be_visible()
    assert visitor.names()[0] == "green"
    assert visitor.bots.locator(".caption-label").first.inner_text().endswith(" 1.00")
    visitor.page.locator("[data-testid=user] img").first.wait_for()
    assert visitor.widths(visitor.page.locator("[data-testid=user] img"))[0] == 40


def test_an_example_is_a_click(visitor):
    visitor.shown = 0
    visitor.page.get_by_role("button", name="a red square").click()
    visitor.wait_until_answered()
    assert visitor.page.locator("[data-testid=user]").inner_text() == "a red square"


def test_pictures_of_ones_own_enter_the_index(visitor, browser, server, tmp_path):
    """For the one who brought them; what cannot be read is named, and nothing of it is added."""
    Image.new("RGB", (40, 30), (120, 0, 200)).save(tmp_path / "violet.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    upload = visitor.page.locator("input[type=file]").first
    upload.set_input_files([tmp_path / "violet.png", tmp_path / "broken.png"])
    visitor.page.get_by_text("violet").first.wait_for()
    visitor.page.locator("#add").click()
    told = visitor.page.locator("#told")
    sync_api.expect(told).to_contain_text("Added 1 (in memory, for you alone): violet.png.")
    sync_api.expect(told).to_contain_text("broken.png cannot be read as a picture (no image).")
    other = Visitor(browser, server[0])
    for each, name in ((visitor, "violet"), (other, None)):
        each.ask("", NEVER, tmp_path / "violet.png")
        assert (each.names()[0] == "violet") == (name is not None), each.names()
    other.close()


@pytest.mark.parametrize("kind", ["too long", "unreadable"])
def test_an_error_is_a_sentence(visitor, tmp_path, kind):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    if kind == "too long":
        visitor.ask("far " * 500)
        expected = "exceed the language model's context of 128"
    else:
        visitor.ask("", 0.0, tmp_path / "broken.png")
        expected = "broken.png cannot be read as a picture (no image)."
    sync_api.expect(visitor.bots.last).to_contain_text(expected)
    assert "Traceback" not in visitor.page.content()
    visitor.ask("a red square", ALWAYS)  # and the conversation goes on
    assert visitor.count_pictures() == 3


def test_stop(visitor, server):
    pace = server[1]
    pace.seconds = 0.5
    visitor.set_bias(NEVER)
    visitor.send("hello")  # answered in words, which come one by one
    sync_api.expect(visitor.bots.last).not_to_have_text("…")
    visitor.stop.click()
    visitor.wait_until_answered()
    time.sleep(1.5)
    steps = pace.steps
    time.sleep(1.5)
    assert pace.steps == steps  # the model rests
    pace.seconds = 0.0
    visitor.ask("a red square", ALWAYS)
    assert visitor.count_pictures() == 3


def test_two_people_at_once(visitor, browser, server):
    """Both are answered, and what one was shown says nothing about the other."""
    server[1].seconds = 0.1
    other = Visitor(browser, server[0])
    for each in (visitor, other):
        each.set_bias(ALWAYS)
    for _ in range(2):  # six pictures, all of the index
        for each in (visitor, other):
            each.send("a red square")
        for each in (visitor, other):
            each.wait_until_answered()
    for each in (visitor, other):
        assert sorted(each.names()) == sorted(COLOURS)
    other.close()


def test_starting_over(visitor):
    for _ in range(2):
        visitor.ask("a red square", ALWAYS)
    visitor.ask("a red square", ALWAYS)
    assert visitor.count_pictures() == 6  # each is shown once
    visitor.page.get_by_role("button", name="Clear").click()
    sync_api.expect(visitor.bots).to_have_count(0)
    visitor.ask("a red square", ALWAYS)
    assert visitor.count_pictures() == 3
