"""Embeddings by OpenAI's own client, searches for images, and the images themselves."""

import threading
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from modeling_fromage import FromageImageIndex, FromagePipeline, UnreadableImageError
from modeling_fromage.index.reranking import rerank_by_likelihood
from modeling_fromage.pipeline_fromage import query_embeds
from tests.helpers.pipelines import COLOURS, picture
from tests.helpers.serving import NAME, ask, from_data_url, image_part, serving
from tests.helpers.talking import make_talker


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FromagePipeline]]:
    pipe, _ = make_talker([*COLOURS, "violet"])
    rows = {"images": [Image.new("RGB", (3000, 2000), "gold")], "ids": ["a/b c#?.png"]}
    metadata = [{"caption": "x] (y"}]
    index = FromageImageIndex.build(pipe.model, pipe.processor, **rows, metadata=metadata, show_progress=False)
    pipe.index = FromageImageIndex.merge([pipe.index, index])
    with serving(pipe, max_inputs=20, max_results=6) as address:
        yield address, pipe


@pytest.mark.parametrize("encoding", ["float", openai.omit])  # the client asks for base64 by itself
def test_embeddings(served, encoding):
    """Of texts, images and both, those of the model; more than fit a batch."""
    address, pipe = served
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    texts = [f"{colour} square" * (i % 3 + 1) for i, colour in enumerate([*COLOURS, *COLOURS, *COLOURS])]
    both = [image_part(picture("red")), {"type": "text", "text": "but green"}]
    inputs = [*texts, image_part(picture("blue")), both]
    answer = client.embeddings.create(model=NAME, input=inputs, encoding_format=encoding)
    rows = torch.tensor(np.array([each.embedding for each in answer.data]), dtype=torch.float32)
    expected = torch.cat([query_embeds(pipe, [text])[0] for text in [*texts, [picture("red"), "but green"]]])
    torch.testing.assert_close(torch.cat([rows[:-2], rows[-1:]]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[-2], pipe.index.embeds[pipe.index.ids.index("blue")], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(inputs)))
    assert answer.usage.prompt_tokens > len(texts) and [each.index for each in answer.data] == list(range(20))


def test_searches(served):
    address, pipe = served
    both = ["like", image_part(picture("red"))]
    for query, prompt in (("red square", "red square"), (both, ["like", picture("red")])):
        status, body, _ = ask(address, "/v1/images/search", {"query": query, "top_k": 3})
        hits = pipe.search(prompt, top_k=3)
        assert status == 200 and [each["id"] for each in body["data"]] == [hit["id"] for hit in hits]
        assert [each["score"] for each in body["data"]] == pytest.approx([hit["score"] for hit in hits], abs=1e-5)
        assert [each["metadata"] for each in body["data"]] == [hit["metadata"] for hit in hits]
    looks = {"query": image_part(picture("green")), "top_k": 1, "load_images": True}
    _, body, _ = ask(address, "/v1/images/search", looks)
    (found,) = body["data"]
    assert found["id"] == "green" and found["score"] == pytest.approx(1, abs=1e-5)
    assert from_data_url(found["image_url"]["url"]).size == (40, 30)
    narrowed = {"query": "a", "where": {"caption": ["red", "blue"]}, "exclude_ids": ["red"], "top_k": 6}
    assert [each["id"] for each in ask(address, "/v1/images/search", narrowed)[1]["data"]] == ["blue"]


def test_the_first_hits_are_reranked(served):
    """By the likelihood of the query given each, which counts alone, or with a weight beside the cosine."""
    address, pipe = served
    hits = pipe.search("red square", top_k=6)
    images = [pipe.index.load_image(hit["id"]) for hit in hits]
    (scores,) = rerank_by_likelihood(pipe.model, pipe.processor, ["red square"], [images])
    likelihood = {hit["id"]: score for hit, score in zip(hits, scores.tolist(), strict=True)}
    scale = pipe.model.adapter.logit_scale.exp().item()

    def expected(count, key):
        return [hit["id"] for hit in sorted(hits[:count], key=key, reverse=True) + hits[count:]]

    for options, order in (
        ({"rerank": 6}, expected(6, lambda hit: likelihood[hit["id"]])),
        ({"rerank": 3}, expected(3, lambda hit: likelihood[hit["id"]])),
        ({"rerank": 6, "rerank_weight": 3}, expected(6, lambda h: scale * h["score"] + 3 * likelihood[h["id"]])),
    ):
        body = {"query": "red square", "top_k": 5, **options}
        status, answer, _ = ask(address, "/v1/images/search", body)
        assert status == 200 and [each["id"] for each in answer["data"]] == order[:5], options
        for each in answer["data"]:
            if each["id"] in [hit["id"] for hit in hits[: options["rerank"]]]:
                assert each["log_likelihood"] == pytest.approx(likelihood[each["id"]], abs=1e-4)
            else:
                assert "log_likelihood" not in each
    assert expected(6, lambda hit: likelihood[hit["id"]]) != [hit["id"] for hit in hits]
    (first,) = ask(address, "/v1/images/search", {"query": "red square", "top_k": 1, "rerank": 6})[1]["data"]
    assert first["id"] == max(likelihood, key=likelihood.get)


def test_an_image_that_cannot_be_read_stands_behind_those_reranked(served, monkeypatch):
    address, pipe = served
    hits = pipe.search("red square", top_k=3)
    load = type(pipe.index).load_image

    def failing(self, image_id, *args):
        if image_id == hits[0]["id"]:
            raise UnreadableImageError(image_id, "gone")
        return load(self, image_id, *args)

    monkeypatch.setattr(type(pipe.index), "load_image", failing)
    _, answer, _ = ask(address, "/v1/images/search", {"query": "red square", "top_k": 3, "rerank": 3})
    assert answer["data"][2]["id"] == hits[0]["id"] and "log_likelihood" not in answer["data"][2]


def test_links_hold_any_id_and_large_pictures_are_shrunk(served):
    narrowed = {"query": "a", "where": {"caption": "x] (y"}}
    (found,) = ask(served[0], "/v1/images/search", narrowed)[1]["data"]
    assert found["link"] == f"{served[0]}/v1/images/a%2Fb%20c%23%3F.png"
    status, png, _ = ask(found["link"], "")
    assert status == 200 and png.startswith(b"\x89PNG")
    assert ask(served[0], "/v1/images/none")[0] == 404 and ask(served[0], "/v1/images/search")[0] == 404
    message = ask(served[0], "/v1/chat/completions", {
        "model": NAME, "messages": [{"role": "user", "content": "a"}], "where": {"caption": "x] (y"}, "ret_bias": 20,
        "max_num_rets": 1, "max_tokens": 1})[1]["choices"][0]["message"]  # fmt: skip
    width, height = from_data_url(message["images"][0]["image_url"]["url"]).size
    assert width * height <= 1 << 20 and width / height == pytest.approx(1.5, abs=0.01)
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": message["content"]}]
    again = {"model": NAME, "messages": [*history, {"role": "user", "content": "a"}], "where": {"caption": "x] (y"},
             "ret_bias": 20, "max_num_rets": 1, "max_tokens": 1}  # fmt: skip
    assert not ask(served[0], "/v1/chat/completions", again)[1]["choices"][0]["message"]["images"]


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("embeddings", {"input": ["a"] * 21}, "has 21 items; 20 are allowed"),
        ("embeddings", {"input": [1, 2]}, "has a part '1'"),
        ("embeddings", {"input": []}, "`input` is empty"),
        ("embeddings", {"input": ["a", " "]}, r"`input[1]` is empty"),
        ("embeddings", {"input": "a", "dimensions": 3}, "Leave `dimensions` out"),
        ("embeddings", {"input": "far " * 500}, "context"),
        ("images/search", {"query": "a", "top_k": 7}, "6 images are found at most"),
        ("images/search", {"query": "a", "topk": 7}, "Did you mean top_k"),
        ("images/search", {"query": "far " * 500}, "context"),
        ("images/search", {"query": ["a", "b"], "rerank": 2}, "it must be one text"),
        ("images/search", {"query": image_part(picture("red")), "rerank": 2}, "it must be one text"),
        ("images/search", {"query": "a", "rerank": 7}, "6 images are reranked at most"),
    ],
)
def test_what_is_refused(served, path, body, told):
    status, answer, _ = ask(served[0], f"/v1/{path}", {"model": NAME, **body})
    assert status == 400 and told in answer["error"]["message"], answer


def test_several_queries_a_text():
    """An index is searched by all of them; no one embedding stands for a text."""
    pipe, _ = make_talker(num_ret_tokens=3, ret_aggregation="max")
    with serving(pipe) as address:
        for query, prompt in (
            ("red square", "red square"),
            ([image_part(picture("red")), "now"], [picture("red"), "now"]),
        ):
            status, body, _ = ask(address, "/v1/images/search", {"query": query, "top_k": 4})
            assert status == 200
            assert [each["id"] for each in body["data"]] == [hit["id"] for hit in pipe.search(prompt, top_k=4)]
        looks = {"model": NAME, "input": [image_part(picture("green"))]}
        status, body, _ = ask(address, "/v1/embeddings", looks)
        expected = pipe.index.embeds[pipe.index.ids.index("green")]
        torch.testing.assert_close(torch.tensor(body["data"][0]["embedding"]), expected, atol=1e-5, rtol=0)
        status, body, _ = ask(address, "/v1/embeddings", {"model": NAME, "input": [*looks["input"], "red"]})
        assert status == 400 and "A text has 3 embeddings here" in body["error"]["message"]
        assert "/v1/images/search" in body["error"]["message"]


def test_embeddings_of_several_tokens_side_by_side():
    pipe, _ = make_talker(num_ret_tokens=3)
    with serving(pipe) as address:
        status, body, _ = ask(address, "/v1/embeddings", {"model": NAME, "input": ["a red square"]})
    expected = query_embeds(pipe, ["a red square"])[0][0]
    assert status == 200
    torch.testing.assert_close(torch.tensor(body["data"][0]["embedding"]), expected, atol=1e-5, rtol=0)
    assert body["usage"]["prompt_tokens"] == len(pipe.processor.token_ids("a red square[RET]"))


def test_without_an_index():
    pipe, _ = make_talker()
    pipe.index = None
    with serving(pipe) as address:
        status, body, _ = ask(address, "/v1/images/search", {"query": "a"})
        assert status == 400 and "There is no image index" in body["error"]["message"]
        assert ask(address, "/v1/images/red")[0] == 404
        asked = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "ret_bias": 20, "max_tokens": 1}
        assert ask(address, "/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"] == "[RET]"


def test_tokens_are_counted_apart_from_the_model(monkeypatch):
    """Its tokenizer pads while it reads a batch, which is the business of the engine's thread alone."""
    pipe, _ = make_talker()
    kind, threads = type(pipe.processor.tokenizer), set()
    encode = kind._encode_plus

    def watched(tokenizer, *args, **kwargs):
        if tokenizer is pipe.processor.tokenizer:
            threads.add(threading.current_thread().name)
        return encode(tokenizer, *args, **kwargs)

    monkeypatch.setattr(kind, "_encode_plus", watched)
    with serving(pipe) as address:
        answer = ask(address, "/v1/embeddings", {"model": NAME, "input": ["a", "</s> a cat"]})[1]
    assert answer["usage"]["prompt_tokens"] > 6 and threads == {"fromage-engine"}
