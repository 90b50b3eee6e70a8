"""Chats that do not start over: the same answers, from fewer tokens, and never from what no longer holds."""

import copy
import math
import pickle

import pytest
import torch

from modeling_fromage import FromageChat, FromageImageIndex, FromagePipeline
from modeling_fromage.answer_rows_fromage import Row
from modeling_fromage.interleaved_generation_fromage import InterleavedGeneration, _fit_together
from modeling_fromage.prefix_cache_fromage import PrefixCache
from tests.helpers.backbones import BACKBONES, make_model, make_processor
from tests.helpers.pipelines import COLOURS, RET, picture, plain, scripted

TURNS = [
    [picture("red"), "what is it?"],
    ["and then?"],
    [picture("blue"), "and here?"],
    ["show me more of the old train", picture("red")],
    ["why?"],
]


class Counted:
    """Counts the tokens that a language model reads, and the images that a vision encoder does."""

    def __init__(self, model):
        self.tokens = self.images = 0
        model.get_decoder().register_forward_pre_hook(self._read, with_kwargs=True)
        model.vision_model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _read(self, module, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]

    def _see(self, module, args, kwargs):
        self.images += len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])


def make_pipe(name="opt_clip", cache=None, **options):
    model, processor = make_model(name), make_processor()
    index = FromageImageIndex.build(model, processor, [picture(c) for c in COLOURS], ids=COLOURS, show_progress=False)
    return FromagePipeline(
        model=model, processor=processor, index=index, prefix_cache=cache, max_new_tokens=4, ret_bias=0.3, **options
    )


def answers_of(pipe, turns=TURNS, **options):
    chat = FromageChat(pipe, **options)
    return [plain(chat.send(*turn)) for turn in turns]


@pytest.mark.parametrize("name", ["opt_clip", "gpt2_resnet", "llama_clip", "gemma2_vit", "granite_vit"])
@pytest.mark.parametrize("options", [{}, {"feed_images_back": True}, {"stop_strings": ["a"]}])
def test_answers_are_those_of_a_fresh_run(name, options):
    fresh = make_pipe(name, PrefixCache(max_bytes=0))
    pipe = make_pipe(name)
    slow, fast = Counted(fresh.model), Counted(pipe.model)
    assert answers_of(pipe, **options) == answers_of(fresh, **options)
    assert fast.tokens < 0.6 * slow.tokens
    assert fast.images <= 2 + (len(COLOURS) if options.get("feed_images_back") else 0)  # red and blue, once each


def test_scores_are_those_of_a_fresh_run():
    chats = [FromageChat(make_pipe(cache=cache)) for cache in (None, PrefixCache(max_bytes=0))]
    for turn in TURNS[:3]:
        first, second = (chat.send(*turn, **scripted([373, RET, 373, RET])) for chat in chats)
        assert plain(first) == plain(second)
        for one, other in zip(first, second, strict=True):
            assert one.get("score", 0) == pytest.approx(other.get("score", 0), abs=1e-5)


def test_a_chat_beyond_the_attention_window_starts_over(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mistral_vit", ("mistral", "vit"))  # a window of four tokens
    fresh, pipe = make_pipe("mistral_vit", PrefixCache(max_bytes=0)), make_pipe("mistral_vit")
    assert answers_of(pipe) == answers_of(fresh) and pipe.prefix_cache.num_bytes == 0


def test_chats_of_unlike_lengths_in_one_batch():
    pipe, fresh = make_pipe(), make_pipe(cache=PrefixCache(max_bytes=0))
    chats = [
        [{"role": "user", "content": ["a much longer question than that of the others"]}],
        [{"role": "user", "content": [picture("green"), "?"]}],
        [{"role": "user", "content": "hello"}],
    ]
    counted = Counted(pipe.model)
    for _ in range(3):
        before = counted.tokens
        got = pipe(chats, batch_size=3)
        assert list(map(plain, got)) == [plain(fresh(chat)) for chat in chats]
        used = counted.tokens - before
        for chat, answer in zip(chats, got, strict=True):
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on, then"}]
    width = max(len(pipe.processor.tokenizer(pipe.preprocess(chat)["text"]).input_ids) for chat in chats)
    assert used < 3 * width  # the last round read less than one padded prompt


def test_a_model_that_changed_starts_over():
    """Also where only numbers changed, behind the counter of changes."""
    pipe = make_pipe()
    changes = [
        lambda model: model.adapter.multi_modal_projector.weight.data.mul_(-3.0),
        lambda model: model.language_model.model.decoder.layers[0].fc1.weight.data.mul_(0.5),
        lambda model: model.to(torch.float64),
    ]
    for change in changes:
        answers_of(pipe)
        change(pipe.model)
        fresh = FromagePipeline(
            model=copy.deepcopy(pipe.model), processor=pipe.processor, prefix_cache=PrefixCache(max_bytes=0),
            max_new_tokens=4, load_images=False,
        )  # fmt: skip
        pipe.index = None
        assert answers_of(pipe, ret_bias=0.0) == answers_of(fresh, ret_bias=0.0)


def test_two_images_are_not_one():
    pipe, fresh = make_pipe(), make_pipe(cache=PrefixCache(max_bytes=0))
    for colour in ("red", "black", "red"):
        prompt = [{"role": "user", "content": [picture(colour), "what is in the old park?"]}]
        assert plain(pipe(prompt)) == plain(fresh(prompt))


def test_what_was_not_used_for_longest_goes_first():
    pipe = make_pipe()
    pipe([{"role": "user", "content": "hello there"}])
    one = pipe.prefix_cache.num_bytes
    pipe.prefix_cache.max_bytes = int(2.5 * one)
    for text in ("hello friend", "goodbye now", "a cat sits"):
        pipe([{"role": "user", "content": text}])
        assert 0 < pipe.prefix_cache.num_bytes <= 2.5 * one
    pipe.prefix_cache.clear()
    assert pipe.prefix_cache.num_bytes == 0


def test_prompts_that_do_not_go_on_keep_nothing():
    pipe = make_pipe()
    pipe(["a cat"]), pipe([picture("red"), "looks like"])
    assert pipe.prefix_cache.num_bytes == 0


def test_a_longer_turn_takes_the_place_of_the_shorter():
    pipe = make_pipe()
    answers_of(pipe)
    assert len(pipe.prefix_cache._entries) == 1


def test_beams_start_over():
    pipe, fresh = make_pipe(num_beams=3), make_pipe(cache=PrefixCache(max_bytes=0), num_beams=3)
    assert answers_of(pipe) == answers_of(fresh) and pipe.prefix_cache.num_bytes == 0


def test_copies_start_empty():
    pipe = make_pipe()
    answers_of(pipe)
    for cache in (copy.deepcopy(pipe.prefix_cache), pickle.loads(pickle.dumps(pipe.prefix_cache))):
        assert cache.num_bytes == 0 and cache.max_bytes == pipe.prefix_cache.max_bytes


def test_generate_takes_the_first_columns_and_all_images():
    """A prompt whose first columns are in `past_key_values`, cut within an image."""
    model, processor = make_model("llama_clip", num_image_tokens=3), make_processor(num_image_tokens=3)
    inputs = processor(
        text=["a <|image|> cat <|image|>"], images=[picture("red"), picture("blue")], return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for columns in range(1, inputs["input_ids"].shape[1]):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(columns - inputs["input_ids"].shape[1])
        assert model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False).equal(expected)


def test_options_of_one_prompt():
    pipe = make_pipe()
    generation = InterleavedGeneration(pipe.model, pipe.processor, index=pipe.index, max_new_tokens=5)
    own = [{"ret_bias": 20.0}, {"ret_bias": -20.0, "max_new_tokens": 2}, {"ret_bias": 20.0, "max_num_rets": 1},
           {"ret_bias": 20.0, "min_tokens_before_ret": 3}, {"ret_scale_factor": 50.0}]  # fmt: skip
    options = [generation.options(**each) for each in own]
    rows = generation.contexts.rows(["a cat"] * 5, [[]] * 5, [[]] * 5, options)
    generation.run(rows)
    for each, row in zip(own, rows, strict=True):
        alone = InterleavedGeneration(pipe.model, pipe.processor, index=pipe.index, **{"max_new_tokens": 5, **each})
        [single] = alone.contexts.rows(["a cat"], [[]], [[]], [alone.options()])
        alone.run([single])
        assert single.ids == row.ids and plain(single.segments) == plain(row.segments)
    with pytest.raises(ValueError, match="no options of one prompt"):
        generation.options(num_beams=2)
    with pytest.raises(ValueError, match="`top_p` above 0"):
        generation.options(top_p=0.0)
    with pytest.raises(ValueError, match="Beams take one set"):
        InterleavedGeneration(pipe.model, pipe.processor, num_beams=2).options(ret_bias=1.0)


def test_two_models_do_not_share_what_they_know():
    cache = PrefixCache()
    pipes = [make_pipe(cache=cache), make_pipe(cache=cache)]
    pipes[1].model.language_model.model.decoder.layers[0].fc1.weight.data.mul_(-2.0)
    chats = [FromageChat(pipe) for pipe in pipes]
    said = [[plain(chat.send(*turn)) for chat in chats] for turn in TURNS]
    pipes[0].prefix_cache = pipes[1].prefix_cache = PrefixCache(max_bytes=0)
    chats = [FromageChat(pipe) for pipe in pipes]
    assert said == [[plain(chat.send(*turn)) for chat in chats] for turn in TURNS]


def test_rows_that_cannot_share_a_pass():
    pipe = make_pipe()
    generation = InterleavedGeneration(pipe.model, pipe.processor)

    def fit(lengths, context, switch):
        own = generation.options(max_new_tokens=5)
        return _fit_together([Row([1] * length, [], [], [], own) for length in lengths], context, switch)

    assert fit([10, 20], 25, math.inf) and not fit([10, 21], 25, math.inf)
    assert fit([10, 20], 99, 25) and not fit([10, 21], 99, 25) and not fit([10, 30], 99, 25) and fit([26, 40], 99, 25)


def test_what_another_precision_computed_is_not_gone_on_from():
    pipe = make_pipe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        FromageChat(pipe).send("hello there")
    expected = answers_of(make_pipe(cache=PrefixCache(max_bytes=0)), [["hello there"], ["and?"]])
    counted = Counted(pipe.model)
    assert answers_of(pipe, [["hello there"]]) == expected[:1] and counted.tokens > 8  # all of it
    chat = FromageChat(pipe)
    chat.send("hello there")
    known = pipe.prefix_cache.check_model(pipe.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pipe.prefix_cache.check_model(pipe.model) != known


def test_a_model_on_another_device_starts_over(monkeypatch):
    """Whose tensors are the same objects there, as unchanged as before."""
    pipe = make_pipe()
    known = pipe.prefix_cache.check_model(pipe.model)
    assert pipe.prefix_cache.check_model(pipe.model) == known
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("cuda", 1))
    assert pipe.prefix_cache.check_model(pipe.model) != known


def test_a_conversation_that_is_too_large_is_told_of_once(caplog):
    pipe = make_pipe()
    chat, other = FromageChat(pipe), FromageChat(pipe)
    other.send("a short one")
    pipe.prefix_cache.max_bytes = kept = pipe.prefix_cache.num_bytes
    for _ in range(2):
        chat.send("many words " * 20)
    assert caplog.text.count("read again what does not fit. Give more: PrefixCache(max_bytes=...)") == 1
    assert pipe.prefix_cache.num_bytes == kept  # of the other, which did not have to go
