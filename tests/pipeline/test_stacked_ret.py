"""Answers and searches of a model whose `[RET]` is several tokens."""

import pytest
import torch

from modeling_fromage import FromageChat, FromageImageIndex
from modeling_fromage.image_search_fromage import ImageSearch
from modeling_fromage.late_interaction_fromage import paired_similarities, search_by_queries, similarities
from modeling_fromage.original.inference import original_generation
from modeling_fromage.prefix_cache_fromage import PrefixCache
from modeling_fromage.serving.engine import Engine
from tests.helpers.pipelines import COLOURS, kinds, picture, plain, scripted
from tests.helpers.stacked import AGGREGATIONS
from tests.helpers.talking import ALWAYS, NEVER, make_talker

RUN = [501, 502, 503]
CAT = 373  # a token


@pytest.fixture(params=AGGREGATIONS)
def pipe(request):
    return make_talker(num_ret_tokens=3, ret_aggregation=request.param)[0]


# ---- searching ------------------------------------------------------------------------------------------------------


def test_similarities_are_of_the_nearest():
    images, texts = torch.randn(5, 8, dtype=torch.double), torch.randn(4, 3, 8, dtype=torch.double)
    expected = torch.stack([torch.stack([max(image @ query for query in text) for text in texts]) for image in images])
    torch.testing.assert_close(similarities(images, texts), expected)
    torch.testing.assert_close(similarities(texts, images), expected.t())
    torch.testing.assert_close(paired_similarities(images[:4], texts), expected.diagonal())
    torch.testing.assert_close(paired_similarities(texts, images[:4]), expected.diagonal())
    assert torch.equal(similarities(images, texts[:, 0]), images @ texts[:, 0].t())
    assert similarities(images, texts[:0]).shape == (5, 0)


@pytest.mark.parametrize("backend", ["flat", "faiss"])
@pytest.mark.parametrize(("top_k", "where"), [(1, None), (7, None), (40, None), (5, {"even": True})])
def test_the_merge_finds_what_brute_force_does(backend, top_k, where):
    generator = torch.Generator().manual_seed(top_k)
    rows = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(9, 4, 16, generator=generator), dim=-1)
    names = [f"image {number}" for number in range(40)]
    metadata = [{"even": number % 2 == 0} for number in range(40)]
    index = FromageImageIndex(rows, names, metadata, backend=backend)
    excluded = [[names[3 * row], names[row]] if row % 2 else [] for row in range(9)]
    scores = (queries @ rows.t()).amax(1)  # (9, 40)
    for row, ids in enumerate(excluded):
        scores[row, [names.index(each) for each in ids]] = -torch.inf
    if where is not None:
        scores[:, 1::2] = -torch.inf
    model = make_talker(COLOURS[:1])[0].model  # of which these embeddings are not, nor of another
    hits = ImageSearch(index, model, load_images=False, where=where).find(queries, top_k, excluded)
    for own, found in zip(scores, hits, strict=True):
        best = own.sort(descending=True)
        count = min(top_k, int(own.isfinite().sum()))
        assert [hit["id"] for hit in found] == [names[i] for i in best.indices[:count].tolist()]
        assert [hit["score"] for hit in found] == pytest.approx(best.values[:count].tolist(), abs=1e-5)
        assert all(hit["metadata"] == metadata[names.index(hit["id"])] for hit in found)


def test_an_index_itself_takes_one_query_a_text():
    index = FromageImageIndex(torch.eye(4), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="Got 3 queries for each of 2 texts .*`search_by_queries`"):
        index.search(torch.rand(2, 3, 4), 1)
    ids, scores, _ = search_by_queries(index.search, torch.eye(4)[None, :3], 3, [["b"]])
    assert ids == [["a", "c", "d"]] and scores.tolist() == [[1, 1, 0]]


def test_the_pipelines_search(pipe):
    index, (queries,) = pipe.index, pipe.model.get_text_embeds(**pipe.processor(text="a red square[RET]",
                                                                                return_tensors="pt"))  # fmt: skip
    scores = (index.embeds @ queries.reshape(-1, 16).t()).amax(1)
    expected = [index.ids[i] for i in scores.argsort(descending=True).tolist()]
    for prompt in ("a red square", "a red square[RET]", ["a red", " square"]):
        assert [hit["id"] for hit in pipe.search(prompt, 4)] == expected[:4]
    assert [hit["id"] for hit in pipe.search("a red square", 99, exclude_ids=expected[1])] == [
        expected[0], *expected[2:]]  # fmt: skip


# ---- answers --------------------------------------------------------------------------------------------------------


def test_each_run_finds_an_image(pipe):
    script = [*RUN, CAT, *RUN, *RUN]
    answer = pipe("a", **scripted(script), images_per_ret=2)
    assert kinds(answer) == ["image"] * 2 + ["text"] + ["image"] * 4
    assert [part["ret_index"] for part in answer if part["type"] == "image"] == [0, 0, 1, 1, 2, 2]
    ids = pipe.processor.token_ids("a")
    whole = torch.tensor([ids + script])
    (embeds,) = pipe.model.get_ret_embeds(whole)
    first = (pipe.index.embeds @ embeds[0].reshape(-1, 16).t()).amax(1).topk(2).indices.tolist()
    assert [part["id"] for part in answer[:2]] == [pipe.index.ids[i] for i in first]
    assert len({part["id"] for part in answer if part["type"] == "image"}) == 6


@pytest.mark.parametrize("length", [1, 2])
def test_a_run_that_is_cut_is_dropped(pipe, length):
    answer = pipe("a", **scripted([CAT, *RUN[:length]]))
    assert kinds(answer) == ["text"] and "[RET" not in answer[0]["text"]
    answer = pipe("a", **scripted([CAT, *RUN, *RUN[:length]]), feed_images_back=False)
    assert kinds(answer) == ["text", "image"]


def test_a_ret_ends_an_answer_with_its_image(pipe):
    ends = {"eos_token_id": pipe.processor.ret_token_id, "ret_bias": ALWAYS, "min_tokens_before_ret": 2}
    assert kinds(pipe("a", **ends, max_new_tokens=20)) == ["text", "image"]
    assert kinds(pipe("a", **ends, max_new_tokens=20, num_beams=2)) == ["text", "image"]


def test_images_are_fed_back_behind_whole_runs(pipe):
    answer = pipe("a", ret_bias=ALWAYS, max_num_rets=2, max_new_tokens=9, feed_images_back=True)
    assert kinds(answer)[:2] == ["image", "image"]
    text = "a[RET]<|image|>"
    first = picture(answer[0]["id"])
    inputs = pipe.processor(text=text + "[RET]", images=[first], return_tensors="pt")
    (_, second) = pipe.model.get_ret_embeds(**inputs)[0]
    scores = (pipe.index.embeds @ second.reshape(-1, 16).t()).amax(1)
    scores[pipe.index.ids.index(answer[0]["id"])] = -1
    assert answer[1]["id"] == pipe.index.ids[int(scores.argmax())]


def test_the_rets_of_a_prompt(pipe):
    answer = pipe(["a cat[RET] and a dog[RET]"], max_new_tokens=0)
    assert [kind for kind in kinds(answer) if kind == "image"] == ["image"] * 2
    assert "[RET" not in "".join(part["text"] for part in answer if part["type"] == "text")


def test_without_an_index_a_marker_stands_for_a_run(pipe):
    pipe.index = None
    answer = pipe("a", **scripted([CAT, *RUN]))
    assert kinds(answer) == ["text"] and answer[0]["text"].endswith("[RET]") and "[RET2]" not in answer[0]["text"]
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "b"},
    ]
    ids = pipe.processor.token_ids(pipe.preprocess(chat)["text"])
    assert [token for token in ids if token in RUN] == RUN


@pytest.mark.parametrize("options", [{}, {"feed_images_back": True}])
def test_chats_that_do_not_start_over(options):
    answers = []
    for size in (0, 1 << 28):
        pipe, _ = make_talker(num_ret_tokens=3, ret_aggregation="max")
        pipe.prefix_cache = PrefixCache(max_bytes=size)
        chat = FromageChat(pipe, max_new_tokens=8, ret_bias=0.5, **options)
        answers.append([plain(chat.send(*turn)) for turn in ([picture("red"), "what is it?"], ["and then?"], ["why?"])])
    assert answers[0] == answers[1] and "image" in str(answers)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_engine_answers_as_the_pipeline_does(aggregation):
    pipe, _ = make_talker(num_ret_tokens=3, ret_aggregation=aggregation)
    engine = Engine(pipe, wait_seconds=0.2)
    try:
        prompts = ["hello", [picture("green"), "looks like a"], "a much longer prompt than the others"]
        options = [
            {"max_new_tokens": 12, "ret_bias": ALWAYS, "max_num_rets": 2},
            {"max_new_tokens": 2, "ret_bias": ALWAYS},  # cut
            {"max_new_tokens": 9, "ret_bias": 0.6, "feed_images_back": True},
        ]
        alone = [pipe(prompt, **own) for prompt, own in zip(prompts, options, strict=True)]
        answers = [engine.submit(prompt, **own) for prompt, own in zip(prompts, options, strict=True)]
        for answer, expected in zip(answers, alone, strict=True):
            events = list(answer)
            assert plain(answer.result()) == plain(expected)
            assert kinds(events).count("ret") == len({e["ret_index"] for e in events if e["type"] == "image"})
        assert [answer.finish_reason for answer in answers[:2]] == ["length"] * 2
        seeds = [engine.submit("hello", temperature=1.5, seed=7, max_new_tokens=12, ret_bias=8.0) for _ in range(2)]
        said = [plain(answer.result()) for answer in seeds]
        assert said[0] == said[1] and "image" in kinds(said[0])
        assert "image" not in kinds(engine.submit("hello", ret_bias=NEVER, max_new_tokens=6).result())
    finally:
        engine.close()


def test_the_authors_answers_have_one_token(pipe):
    with pytest.raises(ValueError, match="knows one .RET. token, and this model has 3"):
        original_generation(pipe.model, pipe.processor, ["a"], pipe.index)
