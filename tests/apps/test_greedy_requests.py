"""Requests that cost far more than they send, and what a client sends that is not what it seems."""

import json
import logging
import re
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image
from starlette.responses import Response

from modeling_fromage import FromagePipeline
from modeling_fromage.serving import app as app_module
from modeling_fromage.serving import prompts
from modeling_fromage.serving.guard import ApiKeys
from modeling_fromage.serving.pictures import Links
from tests.helpers.pipelines import COLOURS, picture
from tests.helpers.serving import NAME, as_data_url, ask, connect, head, image_part, read_all, serving
from tests.helpers.talking import ALWAYS, NEVER, make_talker

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FromagePipeline]]:
    pipe, _ = make_talker()
    with serving(pipe) as address:
        yield address, pipe


@pytest.fixture
def seen(served, monkeypatch) -> list[tuple[str, list]]:
    """What the model is given: texts and images."""
    seen: list[tuple[str, list]] = []
    preprocess = served[1].preprocess

    def watched(*args, **kwargs):
        inputs = preprocess(*args, **kwargs)
        seen.append((inputs["text"], inputs["images"]))
        return inputs

    monkeypatch.setattr(served[1], "preprocess", watched)
    return seen


def chat(content, role="user", **options) -> dict:
    return {
        "model": NAME,
        "messages": [{"role": role, "content": content}],
        "max_tokens": 1,
        "ret_bias": NEVER,
        **options,
    }


def told(answer: tuple) -> str:
    status, body, _ = answer
    assert status == 400, answer
    return body["error"]["message"]


@pytest.mark.parametrize("text", ["![" * 100_000, "![a](" * 50_000, "![" + "a" * 199 + "![", "![](data:" * 30_000])
def test_no_text_holds_the_server_up(text):
    links = Links(ApiKeys([]), "http://here", None)
    began = time.process_time()
    assert links.split(text) == [{"type": "text", "text": text}]
    assert prompts.text_length(text) <= len(text) and time.process_time() - began < 2


def test_texts_are_counted_before_they_are_read(served, monkeypatch):
    """An answer's own images in `data:` URLs do not count."""
    monkeypatch.setattr(Links, "split", lambda *args: pytest.fail("A text that is too long was searched."))
    assert "120,000 characters" in told(ask(served[0], CHAT, chat("![" * 60_000, "assistant")))
    monkeypatch.undo()
    inline = f"![red]({as_data_url(picture('red'))}{'A' * 150_000}#id=red&ret=0)"
    assert ask(served[0], CHAT, chat([inline, "more"], "assistant"))[0] == 200


def test_an_image_of_an_answer_that_a_user_sends_is_looked_at(served, seen):
    shown = ask(served[0], CHAT, chat("a", ret_bias=ALWAYS, max_num_rets=1))[1]["choices"][0]["message"]["images"][0]
    inline = {**shown, "image_url": {"url": f"{shown['image_url']['url']}#id=green&ret=0"}}  # another's id
    for part in (shown, {**shown, "image_url": {"url": shown["link"]}}, inline):
        assert ask(served[0], CHAT, chat(["what is this?", part]))[0] == 200
        text, (image,) = seen[-1]
        assert text.count("[RET]") == 0 and image.getpixel((0, 0)) == picture(shown["id"]).getpixel((0, 0))
    rows = ask(served[0], EMBED, {"model": NAME, "input": [shown, image_part(picture(shown["id"]))]})[1]["data"]
    assert rows[0]["embedding"] == pytest.approx(rows[1]["embedding"], abs=1e-5)
    assert "has a part 'image'" in told(ask(served[0], CHAT, chat([{"type": "image", "id": "red"}])))


def test_links_of_other_servers_are_theirs(served):
    links = Links(ApiKeys([]), "http://here", served[1].index)
    assert links.parse("http://here/v1/images/red#ret=2") == {"type": "image", "id": "red", "ret_index": 2}
    for url in ("http://there/v1/images/red", "http://there/?a=http://here/v1/images/red", "/v1/images/red"):
        assert links.parse(url) is None
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/v1/images/red"}}
    assert "private address" in told(ask(served[0], CHAT, chat([part])))


def test_an_index_in_the_place_of_another_is_read(served, monkeypatch):
    part = {"type": "image_url", "image_url": {"url": f"{served[0]}/v1/images/violet"}}
    assert ask(served[0], CHAT, chat([part]))[0] == 400
    monkeypatch.setattr(served[1], "index", make_talker([*COLOURS, "violet"])[0].index)
    assert ask(served[0], CHAT, chat([part]))[0] == 200


def test_images_that_were_shown_count_where_they_are_read(served, seen, monkeypatch):
    """Each is read once."""
    read: list[str] = []
    load = prompts.load_indexed
    monkeypatch.setattr(
        prompts, "load_indexed", lambda index, name, *rest: (read.append(name), load(index, name, *rest))[1]
    )

    def again(names, **options):
        images = [{"type": "image", "id": name} for name in names]
        return {**chat("a", **options), "messages": [{"role": "assistant", "images": images}, *chat("a")["messages"]]}

    assert ask(served[0], CHAT, again(["red"] * 10))[0] == 200 and not read
    assert "100000 images; 8 are allowed" in told(ask(served[0], CHAT, again(["red"] * 100_000, feed_images_back=True)))
    assert ask(served[0], CHAT, again(["red", "red", "green"], feed_images_back=True))[0] == 200
    assert sorted(read) == ["green", "red"] and len(seen[-1][1]) == 3
    assert "no image 'none'" in told(ask(served[0], CHAT, again(["none", "red"], feed_images_back=True)))


def test_images_in_memory_are_few_and_small(monkeypatch):
    """However many requests come at once; those for which there is no place read none."""
    pipe, _ = make_talker()
    inside, most, sizes, lock = 0, 0, set(), threading.Lock()
    read, embed = prompts.read_picture, app_module.embed

    def count(change: int) -> None:
        nonlocal inside, most
        with lock:
            inside += change
            most = max(most, inside)

    def reading(*args):
        count(1)
        image = read(*args)
        sizes.add(image.size)
        return image

    def embedding(pipe, inputs):
        time.sleep(0.05)
        rows = embed(pipe, inputs)
        count(-len(inputs))
        return rows

    monkeypatch.setattr(prompts, "read_picture", reading)
    monkeypatch.setattr(app_module, "embed", embedding)
    body = {"model": NAME, "input": [image_part(Image.new("RGB", (1000, 600), colour)) for colour in COLOURS[:4]]}
    answers: list[int] = []
    with serving(pipe, max_inputs=4, max_images=1, max_queue=3) as address:
        threads = [threading.Thread(target=lambda: answers.append(ask(address, EMBED, body)[0])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(answers) == {200, 429} and most == 4 and inside == 0
    assert sizes == {(106, 64)}  # twice what the encoder takes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: 10**400}, f"`{name}`: ")
            for name in ("min_tokens_before_ret", "max_num_rets", "top_k", "max_tokens")
        ),
        ({"exclude_ids": ["a"] * 1001}, "`exclude_ids`: .*1000 items"),
        ({"where": {str(i): i for i in range(33)}}, "`where`: .*32 items"),
        ({"where": {"a": 1, "b": [*range(1000)]}}, "`where`: .*1,001 values"),
        ({"stop": ["a"] * 17}, "`stop`: .*16 items"),
        ({"stop": "a" * 201}, "`stop.0`: .*200 characters"),
        ({"stop": ["a", "a" * 201]}, "`stop.1`: .*200 characters"),
    ],
)
def test_numbers_and_stops_have_bounds(served, options, message):
    answer = ask(served[0], CHAT, chat("a", **options))
    assert re.search(message, told(answer)) and len(told(answer)) < 300
    assert ask(served[0], CHAT, chat("a", stop="a" * 200, max_num_rets=2**31 - 1, top_k=2**31 - 1))[0] == 200


def test_a_name_is_told_as_far_as_it_is_one(served):
    began = time.monotonic()
    answer = ask(served[0], CHAT, {"x" * 5_000_000: 1})
    assert "There is no option" in told(answer) and len(json.dumps(answer[1])) < 1000
    assert time.monotonic() - began < 10
    roles = {"model": NAME, "messages": [{"role": "x" * 100_000, "content": "a"}]}
    assert len(told(ask(served[0], CHAT, roles))) < 300


def test_a_connection_that_was_closed_is_not_aborted(caplog):
    """Its client has read the rest of an answer after it was closed."""

    def put_page(app, service):
        app.add_route("/large", lambda request: Response(b"a" * 20_000_000))

    with caplog.at_level(logging.ERROR), serving(make_talker()[0], mount=put_page, body_timeout=1.0) as address:
        with connect(address) as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            time.sleep(0.3)
            assert len(read_all(connection)) > 20_000_000
        time.sleep(1.2)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_health_tells_of_a_model_that_no_longer_answers():
    services: list = []
    with serving(make_talker()[0], mount=lambda app, service: services.append(service)) as address:
        assert ask(address, "/health")[0] == 200
        services[0].engine.close()
        status, body, _ = ask(address, "/health")
    assert status == 503 and "Restart the server" in body["error"]["message"]


def test_uploads_to_the_page_have_the_limits_of_bodies():
    """They need no key."""
    from modeling_fromage.serving.demo import Demo, mount

    def put_page(app, service):
        mount(Demo(service.engine).blocks("Colours", []), app, service.settings.max_image_bytes)

    limits = {"max_body_bytes": 100_000, "max_image_bytes": 50_000, "body_timeout": 1.0}
    kind = {"Content-Type": "multipart/form-data; boundary=B"}
    start = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    with serving(make_talker()[0], ("key",), put_page, **limits) as address:
        for size, expected in ((1000, 200), (60_000, 413), (5_000_000, 413)):
            status, answer, _ = ask(address, "/gradio_api/upload", start + b"x" * size + b"\r\n--B--\r\n", **kind)
            assert status == expected, (size, answer)
        assert ask(address, "/")[0] == 200 and ask(address, CHAT, chat("a"))[0] == 401
        with connect(address) as connection:
            connection.sendall(head("/gradio_api/upload", Content_Length=1000) + start)
            assert b"408" in read_all(connection).partition(b"\r\n")[0]


def test_the_settings_of_images_fit_the_room():
    """A request may have as many images as are ever in memory at once, or it would wait for ever."""
    pipe, _ = make_talker()
    with serving(pipe, max_inputs=1, max_images=3) as address:
        parts = [image_part(picture(colour)) for colour in COLOURS[:3]]
        assert ask(address, CHAT, chat(parts))[0] == 200
