"""Chats by OpenAI's own client with a small random model."""

import asyncio
import re
from collections.abc import Iterator
from types import SimpleNamespace

import openai
import pytest

from modeling_fromage import FromagePipeline
from modeling_fromage.serving.answers import ChatAnswer
from modeling_fromage.serving.guard import ApiKeys
from modeling_fromage.serving.pictures import Links
from tests.helpers.pipelines import COLOURS, NEWLINE, RET, picture, scripted
from tests.helpers.serving import NAME, as_data_url, ask, from_data_url, image_part, serving
from tests.helpers.talking import ALWAYS, NEVER, make_talker

HELLO = [{"role": "user", "content": "hello"}]
CAT = 373  # " cat"
SHOW = {"ret_bias": ALWAYS, "images_per_ret": 2, "max_num_rets": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FromagePipeline]]:
    pipe, _ = make_talker()
    with serving(pipe, max_tokens=100) as address:
        yield address, pipe


@pytest.fixture
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, messages=HELLO, extra=None, **options):
    return client.chat.completions.create(
        model=NAME, messages=messages, extra_body=extra or {"ret_bias": NEVER}, **{"max_tokens": 8, **options}
    )


def text_of(segments) -> str:
    return "".join(part["text"] for part in segments if part["type"] == "text")


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="This server has 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)


def test_an_answer_in_words(client, served):
    answer = chat(client)
    said = served[1](HELLO, ret_bias=NEVER, max_new_tokens=8)
    assert answer.choices[0].message.content == text_of(said) and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.model == NAME
    usage = answer.usage
    assert usage.prompt_tokens > 3 and 1 <= usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_an_answer_with_pictures(client, served):
    """The text has a link for each, `images` the pictures themselves; the link leads to the same picture."""
    message = chat(client, extra=SHOW).choices[0].message
    said = [part for part in served[1](HELLO, max_new_tokens=8, **SHOW) if part["type"] == "image"]
    assert [image["id"] for image in message.images] == [part["id"] for part in said] and len(said) == 2
    links = re.findall(r"!\[(\w+)\]\(([^)]+)\)", message.content)
    for image, part, (name, link) in zip(message.images, said, links, strict=True):
        assert image["score"] == pytest.approx(part["score"], abs=1e-5) and image["metadata"] == part["metadata"]
        assert image["type"] == "image_url" and name == part["id"] and link.partition("#")[0] == image["link"]
        assert link.startswith(f"{served[0]}/v1/images/")
        assert from_data_url(image["image_url"]["url"]).getpixel((0, 0)) == picture(name).getpixel((0, 0))
        status, png, headers = ask(link.partition("#")[0], "")
        assert status == 200 and png.startswith(b"\x89PNG") and headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("extra", [{"ret_bias": NEVER}, SHOW])
def test_a_stream_is_the_answer_in_pieces(client, extra):
    whole = chat(client, extra=extra)
    chunks = list(chat(client, extra=extra, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    images = [image for delta in deltas for image in (delta.model_extra or {}).get("images", [])]
    assert images == whole.choices[0].message.images
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1 and deltas[0].role == "assistant"


@pytest.mark.parametrize("between", ["", " "])
def test_links_of_one_ret_stand_apart_and_come_back_as_images_alone(served, between):
    """By a space that is no text, unlike one that the model wrote between two `[RET]`s."""
    links = Links(ApiKeys([]), "http://here", served[1].index)
    tokens = served[1].processor.tokenizer(between, add_special_tokens=False).input_ids
    whole = served[1](HELLO, images_per_ret=2, **scripted([CAT, RET, *tokens, RET, NEWLINE]))
    counts = SimpleNamespace(prompt_tokens=1, completion_tokens=1, finish_reason="stop")

    async def events():
        for part in whole:
            yield part

    async def encode(function, *args):
        return function(*args)

    text = asyncio.run(ChatAnswer("m", events(), counts, links, False, encode).whole())["choices"][0]["message"]
    assert re.sub(r"!\[\w+\]\([^)]+\)", "i", text["content"]) == ("cati i i i" if between else "cati ii i")
    back = [(part["type"], part.get("id"), part.get("text")) for part in links.split(text["content"])]
    assert back == [(part["type"], part.get("id"), part.get("text")) for part in whole]


def test_the_clients_own_stream_helper(client):
    with client.chat.completions.stream(model=NAME, messages=HELLO, max_tokens=8, extra_body=SHOW) as stream:
        for _ in stream:
            pass
        message = stream.current_completion_snapshot.choices[0].message
    assert len(message.images) == 2 and message.content == chat(client, extra=SHOW).choices[0].message.content


def test_pictures_are_read(client, served):
    content = [image_part(picture("red")), {"type": "text", "text": "hello"}]
    answer = chat(client, [{"role": "user", "content": content}])
    alone = [{"role": "user", "content": [picture("red"), "hello"]}]
    assert answer.choices[0].message.content == text_of(served[1](alone, ret_bias=NEVER, max_new_tokens=8))
    assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens + 2  # `num_image_tokens` of the processor


def histories(message) -> dict[str, dict]:
    """An answer as clients send it back: all of it, its text alone, and its parts."""
    whole = message.model_dump(exclude={"refusal"})
    parts = [{"type": "text", "text": "look:"}, *message.images]
    return {
        "message": whole,
        "text": {"role": "assistant", "content": message.content},
        "parts": {"role": "assistant", "content": parts},
        "images": {"role": "assistant", "content": "", "images": message.images},
    }


@pytest.mark.parametrize("kind", ["message", "text", "parts", "images"])
@pytest.mark.parametrize("inline", [False, True])
def test_no_picture_is_shown_twice(client, kind, inline):
    extra = {**SHOW, "images_per_ret": 3, "inline_images": inline}
    first = chat(client, extra=extra).choices[0].message
    assert ("data:image/png" in first.content) == inline
    history = [*HELLO, histories(first)[kind], {"role": "user", "content": "more"}]
    second = chat(client, history, extra).choices[0].message
    assert sorted(image["id"] for image in [*first.images, *second.images]) == sorted(COLOURS)


def test_an_answer_that_comes_back_is_read_as_it_was_written(client, served, monkeypatch):
    """By its text alone: the prompt of the second turn is that of the pipeline's own chat."""
    prompts = []
    preprocess = served[1].preprocess
    monkeypatch.setattr(
        served[1], "preprocess", lambda *args, **kwargs: (prompts.append(preprocess(*args, **kwargs)), prompts[-1])[1]
    )
    said = served[1](HELLO, max_new_tokens=8, **SHOW)
    message = chat(client, extra=SHOW).choices[0].message
    prompts.clear()
    more = {"role": "user", "content": "more"}
    served[1]([*HELLO, {"role": "assistant", "content": said}, more], max_new_tokens=1)
    chat(client, [*HELLO, {"role": "assistant", "content": message.content}, more], max_tokens=1)
    ours, theirs = prompts[0], prompts[-1]
    assert ours["text"] == theirs["text"] and ours["shown"] == theirs["shown"] and len(ours["shown"]) == 2


def test_a_link_of_the_server_is_a_picture_that_can_be_looked_at(client, served):
    part = {"type": "image_url", "image_url": {"url": f"{served[0]}/v1/images/red"}}
    answers = [chat(client, [{"role": "user", "content": [each]}]) for each in (part, image_part(picture("red")))]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage


def test_options(client):
    plain = chat(client).choices[0].message.content
    assert chat(client, temperature=0, n=1, top_p=1.0, user="me", logprobs=False, tools=[],
                presence_penalty=0.0).choices[0].message.content == plain  # fmt: skip
    stop = plain.strip()[1:3]
    assert chat(client, stop=[stop]).choices[0].message.content == plain.partition(stop)[0].rstrip()
    drawn = [chat(client, temperature=2.0, seed=seed, max_tokens=20).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not chat(client, extra={**SHOW, "max_num_rets": 0}).choices[0].message.images
    shown = chat(client, extra={**SHOW, "where": {"caption": ["green", "blue"]}, "exclude_ids": ["blue"]})
    assert [image["id"] for image in shown.choices[0].message.images] == ["green"]
    (image,) = chat(client, extra={**SHOW, "images_per_ret": 1, "load_images": False}).choices[0].message.images
    assert image["image_url"]["url"] == image["link"]
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens <= 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 2}, "`n` is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "`tools` is not supported"),
        ({"logprobs": True}, "`logprobs` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"frequency_penalty": 0.5}, "`frequency_penalty` is not supported"),
        ({"logit_bias": {"5": 1}}, "`logit_bias` is not supported"),
        ({"extra_body": {"ret_bais": 1}}, "no option `ret_bais`. Did you mean ret_bias"),
        ({"extra_body": {"images_per_ret": 99}}, "`images_per_ret`: .*less than or equal to 16"),
        ({"temperature": -1}, "`temperature`: .*greater than or equal to 0"),
        ({"max_tokens": 101}, "`max_tokens` is 101; an answer has 100 tokens at most"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "role` must be system"),
        ({"messages": [{"role": "user", "content": ""}]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "has a part 'input_audio'"),
        ({"messages": [{"role": "user", "content": "far " * 500}]}, "the language model's context of 128"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"messages": [{"role": "user", "content": "a" * 100_001}]}, "100,001 characters"),
        ({"messages": [{"role": "user", "content": [image_part(picture("red"))] * 9}]}, "9 images; 8 are allowed"),
    ],
)
def test_what_is_refused(served, options, told):
    asked = {"model": NAME, "messages": HELLO, "max_tokens": 2, **options.pop("extra_body", {}), **options}
    status, body, _ = ask(served[0], "/v1/chat/completions", asked)
    if told:
        assert status == 400 and re.search(told, body["error"]["message"]), body
        assert body["error"]["type"] == "invalid_request_error"
    else:  # answered or refused, but never a failure of the server
        assert status in (200, 400), body
    if "context" in told or "characters" in told:
        assert body["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/etc/passwd", "An image is a data: or http"),
        ("file:///etc/passwd", "An image is a data: or http"),
        ("http://127.0.0.1:1/a.png", "private address"),
        ("http://169.254.169.254/latest/meta-data", "private address"),
        ("http://localhost:1/a.png", "private address"),
        ("data:image/png;base64,AAAA", "no image"),
        (as_data_url(picture("red"))[:200] + "=", ""),
        ("data:text/html,hello", "no image"),
    ],
)
def test_images_that_are_refused(served, url, told):
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url}):
        messages = [{"role": "user", "content": [part]}]
        status, body, _ = ask(served[0], "/v1/chat/completions", {"model": NAME, "messages": messages})
        assert status == 400 and told in body["error"]["message"] and body["error"]["code"] == "invalid_image", body


def test_bodies_that_are_none(served):
    status, told, _ = ask(served[0], "/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})
    assert status == 400 and "JSON" in told["error"]["message"]
    for body in (b"", b"{", b"[]", b'{"model": "tiny"}', b"[" * 100_000, b'{"model": NaN}'):
        status, told, _ = ask(served[0], "/v1/chat/completions", body)
        assert status == 400 and told["error"]["message"], told
    status, told, _ = ask(served[0], "/v1/nothing")
    assert status == 404 and "GET /v1/nothing" in told["error"]["message"]
    assert ask(served[0], "/v1/chat/completions")[0] == 405
