"""Interleaved answers, through the pipeline: what comes out, in which order, of which images, and what is refused."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TextStreamer, pipeline
from transformers.pipelines import any_to_any

from modeling_fromage import FromageChat, FromageImageIndex, FromagePipeline, UnreadableImageError
from modeling_fromage.interleaved_generation_fromage import InterleavedGeneration
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.pipelines import COLOURS, NEWLINE, RET, kinds, picture, plain, scripted


@pytest.fixture(scope="module")
def pipe():
    model, processor = make_model("opt_clip"), make_processor()
    index = FromageImageIndex.build(model, processor, [picture(c) for c in COLOURS], ids=COLOURS, show_progress=False)
    return pipeline("interleaved-generation", model=model, processor=processor, index=index, max_new_tokens=8)


MIXED = [
    ["a cat"],
    [picture("red"), "looks like"],
    ["the old train", picture("blue"), picture("white"), " waiting at the station"],
    [picture("green")],
    [{"role": "user", "content": "what is in the park?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": picture("black")}, {"type": "text", "text": "who?"}]},
        {"role": "assistant", "content": "a bird"},
        {"role": "user", "content": "and here?"},
    ],
    ["a much longer prompt than all of the others, so that everyone else is padded on the left"],
]


@pytest.mark.parametrize("name", ["opt_clip", "gpt2_resnet", "llama_clip"])
@pytest.mark.parametrize(
    "options",
    [
        {"ret_bias": 0.5, "max_num_rets": 3},
        {"ret_bias": 0.5, "images_per_ret": 2, "max_num_rets": 2},
        {"ret_bias": 0.5, "feed_images_back": True, "max_num_rets": 2},
        {"num_beams": 3},
    ],
    ids=["greedy", "several images", "fed back", "beams"],
)
def test_batched_equals_single(name, options):
    model, processor = make_model(name), make_processor()
    index = FromageImageIndex.build(model, processor, [picture(c) for c in COLOURS], ids=COLOURS, show_progress=False)
    pipe = FromagePipeline(model=model, processor=processor, index=index, max_new_tokens=6, **options)
    single = [pipe(prompt) for prompt in MIXED]
    for batch_size in (1, 3, len(MIXED)):
        batched = pipe(MIXED, batch_size=batch_size)
        assert list(map(plain, batched)) == list(map(plain, single))
        for one, other in zip(sum(single, []), sum(batched, []), strict=True):
            assert one.get("score") == pytest.approx(other.get("score"), abs=1e-5)
    if "ret_bias" in options:
        assert any("image" in kinds(segments) for segments in single)
    assert any("text" in kinds(segments) for segments in single)


def test_order_of_texts_and_images(pipe):
    cat, dog = 373, 475
    answer = pipe(["show me"], **scripted([cat, RET, RET, dog, cat, RET]), images_per_ret=2)
    assert kinds(answer) == ["text", "image", "image", "image", "image", "text", "image", "image"]
    assert [s["ret_index"] for s in answer if s["type"] == "image"] == [0, 0, 1, 1, 2, 2]
    assert [s["text"] for s in answer if s["type"] == "text"] == ["cat", " dog cat"]
    shown = [s["id"] for s in answer if s["type"] == "image"]
    assert sorted(shown) == sorted(COLOURS)  # each of the six once
    # The images are those of the index for the embedding of each [RET], less those shown before.
    ids = pipe.processor(text="show me", return_tensors="pt")["input_ids"]
    whole = torch.cat([ids, torch.tensor([[cat, RET, RET, dog, cat, RET]])], dim=1)
    for i, embed in enumerate(pipe.model.get_ret_embeds(whole)[0]):
        index = pipe._forward_params["index"]
        expected, scores, _ = index.search(embed[None], 2, exclude_ids=shown[: 2 * i])
        assert shown[2 * i : 2 * i + 2] == expected[0]
        found = [s["score"] for s in answer if s.get("ret_index") == i]
        assert found == pytest.approx(scores[0].tolist(), abs=1e-5)
    assert all(s["image"].getpixel((0, 0)) == picture(s["id"]).getpixel((0, 0)) for s in answer if "image" in s)


def test_images_shown_before_are_left_out(pipe):
    chat = FromageChat(pipe, max_new_tokens=3, ret_bias=1e4, max_num_rets=1)
    shown = []
    for _ in COLOURS:
        answer = chat.send("and another?")
        shown += [segment["id"] for segment in answer if segment["type"] == "image"]
    assert sorted(shown) == sorted(COLOURS)
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * len(COLOURS)
    # The same without a chat object, after a JSON-like round trip of the messages (images as ids alone).
    messages = [
        {**m, "content": [{k: v for k, v in part.items() if k != "image"} for part in m["content"]]}
        for m in chat.messages[:2]
    ]
    again = pipe([*messages, {"role": "user", "content": "more"}], max_new_tokens=3, ret_bias=1e4, max_num_rets=1)
    assert shown[0] not in [segment.get("id") for segment in again]


def test_an_index_that_has_no_more(pipe, caplog):
    index = pipe._forward_params["index"]
    few = FromageImageIndex(index.embeds[:2], COLOURS[:2], model_fingerprint=index.model_fingerprint)
    with caplog.at_level(logging.WARNING):
        answer = pipe(["x"], index=few, images_per_ret=3, **scripted([RET, 68]))
        assert kinds(answer) == ["image", "image", "text"] and "fewer than `images_per_ret=3`" in caplog.text
        shown = [{"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
        assert pipe(shown, index=few, **scripted([68, RET])) == [{"type": "text", "text": "a[RET]"}]


def test_without_an_index(pipe, caplog):
    without = FromagePipeline(model=pipe.model, processor=pipe.processor)
    with caplog.at_level(logging.WARNING):
        assert without(["x"], **scripted([373, RET, 68])) == [{"type": "text", "text": "cat[RET]a"}]
    assert "Give `index=`" in caplog.text


@torch.no_grad()
def test_a_retrieved_image_is_fed_back(pipe):
    """Each round against `generate` on a context put together by hand."""
    model, processor, index = pipe.model, pipe.processor, pipe._forward_params["index"]
    options = {"ret_bias": 0.5, "feed_images_back": True, "max_num_rets": 2, "min_tokens_before_ret": 1}
    answer = pipe(["look at ", picture("red"), " and"], **options, max_new_tokens=7)
    inputs = processor(text="look at <|image|> and", images=[picture("red")], return_tensors="pt")
    ids, features = inputs["input_ids"], list(model.get_pooled_image_features(inputs["pixel_values"]))
    shown, left, texts = [], 7, []
    while left > 0:
        output = model.generate(
            ids, pooled_image_features=torch.stack(features), max_new_tokens=left, do_sample=False, ret_bias=0.5,
            min_tokens_before_ret=0 if shown else 1, max_num_rets=2 - len(shown), eos_token_id=[2, RET], pad_token_id=1,
            return_dict_in_generate=True,
        )  # fmt: skip
        new = output.sequences[0, ids.shape[1] :].tolist()
        left -= len(new)
        texts.append(processor.decode([token for token in new if token != RET], skip_special_tokens=True))
        if new[-1] != RET:
            break
        shown.append(index.search(output.ret_embeds[0][-1:], 1, exclude_ids=shown)[0][0][0])
        pixels = processor.image_processor(picture(shown[-1]), return_tensors="pt")["pixel_values"]
        features += list(model.get_pooled_image_features(pixels))
        image = torch.full((1, processor.num_image_tokens), processor.image_token_id)
        ids = torch.cat([output.sequences, image], dim=1)
    assert len(shown) == 2 and [s["id"] for s in answer if s["type"] == "image"] == shown
    assert "".join(s["text"] for s in answer if s["type"] == "text") == "".join(texts).strip()
    # What it says next depends on what it showed.
    blind = pipe(["look at ", picture("red"), " and"], **{**options, "feed_images_back": False}, max_new_tokens=7)
    assert plain(blind)[:2] == plain(answer)[:2]


def test_fed_back_images_stay_in_the_context(pipe):
    answer = pipe(["x"], images_per_ret=2, **scripted([68, RET, 373]))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "more"})
    blind, seeing = (pipe.preprocess(messages, feed_images_back=back) for back in (False, True))
    assert blind["text"] == "Q: x\nA: a[RET] cat\nQ: more\nA:" and blind["images"] == []
    assert seeing["text"] == "Q: x\nA: a[RET]<|image|><|image|> cat\nQ: more\nA:" and len(seeing["images"]) == 2
    assert blind["shown"] == seeing["shown"] == [s["id"] for s in answer if s["type"] == "image"]


def test_what_ends_an_answer(pipe):
    script = [373, NEWLINE, 68, RET, 373]
    assert pipe(["x"], **scripted(script)) == [{"type": "text", "text": "cat"}]
    assert kinds(pipe(["x"], **scripted(script), stop_strings=None)) == ["text", "image", "text"]
    assert pipe(["x"], **scripted([68, 373, 284, 68]), stop_strings=["."])[0]["text"] == "a cat"
    assert pipe(["x"], **scripted([68, 2, 373])) == [{"type": "text", "text": "a"}]
    own = make_processor()
    own.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    other = FromagePipeline(model=pipe.model, processor=own)
    assert other(chat, **scripted([373, NEWLINE, 68]))[0]["text"] == "cat\na"
    assert pipe(chat, **scripted([373, NEWLINE, 68]))[0]["text"] == "cat"
    assert other.preprocess(chat)["text"] == "<user>hi"


def test_the_prompts_own_rets(pipe):
    answer = pipe([picture("red"), "a cat[RET] and a dog[RET]"], max_new_tokens=0)
    assert kinds(answer) == ["text", "image", "text", "image"]
    inputs = pipe.processor(text="<|image|>a cat[RET] and a dog[RET]", images=[picture("red")], return_tensors="pt")
    embed = pipe.model.get_text_embeds(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
    index = pipe._forward_params["index"]
    assert answer[3]["id"] == index.search(embed, 1, exclude_ids=[answer[1]["id"]])[0][0][0]


def test_unreadable_images_give_way(pipe, tmp_path):
    for colour in COLOURS:
        picture(colour).save(tmp_path / f"{colour}.png")
    index = FromageImageIndex.build(pipe.model, pipe.processor, tmp_path, show_progress=False)
    first, second = (s["id"] for s in pipe(["x"], index=index, images_per_ret=2, **scripted([RET])))
    (tmp_path / first).unlink()
    answer = pipe(["x"], index=index, **scripted([RET]))
    assert [s["id"] for s in answer] == [second] and answer[0]["image"].size == (40, 30)
    assert [s["id"] for s in pipe(["x"], index=index, load_images=False, **scripted([RET]))] == [first]
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").unlink(missing_ok=True)
    answer = pipe(["x"], index=index, **scripted([RET]))
    assert [(s["id"], s["image"]) for s in answer] == [(first, None)]


def test_streaming(pipe, capsys):
    streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = pipe(["a cat sits"], streamer=streamer, max_num_rets=0)
    assert capsys.readouterr().out.strip() == answer[0]["text"]


def test_datasets_and_generators_stream(pipe):
    prompts = [["a"], ["b", picture("red")], "c"]
    found = list(pipe((prompt for prompt in prompts), batch_size=2, max_num_rets=0))
    assert found == [pipe(prompt, max_num_rets=0) for prompt in prompts]


def test_index_by_path(pipe, tmp_path):
    pipe._forward_params["index"].save_pretrained(tmp_path / "index")
    other = FromagePipeline(model=pipe.model, processor=pipe.processor, index=str(tmp_path / "index"))
    expected = plain(pipe(["x"], **scripted([RET])))
    assert plain(other(["x"], **scripted([RET]))) == expected
    assert plain(pipe(["x"], index=tmp_path / "index", **scripted([RET]))) == expected


# ---- bad input ----


@pytest.mark.parametrize("prompt", [[], "", [[]], [""], [["a"], []]])
def test_empty_prompts(pipe, prompt):
    with pytest.raises(ValueError, match="empty"):
        pipe(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([3], "Expected a text, a PIL image"),
        ([{"type": "video"}], "Expected a text, a PIL image"),
        ([{"type": "image"}], "needs one of"),
        ([" ".join(["word"] * 200)], "context of 128"),
        ([{"type": "image", "path": "/etc/hostname"}], "local files are refused"),
        ([{"type": "image", "url": "/etc/hostname"}], "local files are refused"),
        ([{"type": "image", "url": "file:///etc/hostname"}], "local files are refused"),
        ([{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}], "local files are refused"),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/cat.png"}}], "private address"),
    ],
)
def test_bad_prompts(pipe, prompt, message):
    with pytest.raises(ValueError, match=message):
        pipe(prompt)


def test_bad_options(pipe):
    for options, message in [
        ({"images_per_ret": 0}, "at least 1"),
        ({"max_new_tokens": -1}, "at least 0"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"feed_images_back": True, "load_images": False}, "needs an index"),
        ({"ret_boost": 1.0}, "ret_boost"),
        ({"max_length": 20}, "max_length"),
        ({"generation_config": pipe.model.generation_config}, "one by one"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(["x"], **options)
    other = make_model("gpt2_resnet")
    with pytest.raises(ValueError, match="made by the model"):
        InterleavedGeneration(other, pipe.processor, pipe._forward_params["index"])
    with pytest.raises(ValueError, match="num_image_tokens"):
        FromagePipeline(model=pipe.model, processor=make_processor(num_image_tokens=1))


@pytest.mark.parametrize("prompt", [{"text": "a", "images": []}, [{"text": "a"}], ({"text": t} for t in "ab"), 3])
def test_rows_are_not_taken_for_their_keys(pipe, prompt):
    with pytest.raises((ValueError, TypeError), match="Expected a text|not iterable"):
        list(pipe(prompt))


def test_one_message_is_a_chat_and_one_image_a_prompt(pipe):
    message = {"role": "user", "content": "hi"}
    assert pipe(message, max_num_rets=0) == pipe([message], max_num_rets=0)
    assert pipe(picture("red"), max_num_rets=0) == pipe([picture("red")], max_num_rets=0)


def test_messages_with_absent_keys_filled_in(pipe):
    """As tables and data classes give them."""
    nothing = {"id": None, "url": None, "ret_index": None, "text": None}
    filled = [
        {"role": "user", "content": [{"type": "image", "image": picture("red"), **nothing},
                                     {"type": "text", "image": None, **nothing, "text": "hi"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "and?"},
    ]  # fmt: skip
    short = [{"type": "image", "image": picture("red")}, {"type": "text", "text": "hi"}]
    plain_messages = [{"role": "user", "content": short}, {"role": "assistant", "content": ""}, filled[2]]
    assert pipe(filled, max_num_rets=0) == pipe(plain_messages, max_num_rets=0)
    inputs = pipe.processor.apply_chat_template(filled[:1], tokenize=True, return_dict=True, return_tensors="pt")
    assert len(inputs["pixel_values"]) == 1


def test_near_the_end_of_the_context(pipe):
    """Rows that fit by themselves do so in a batch, and an image that has no room is not fed back."""
    long = " ".join(["a"] * 107)
    options = {"feed_images_back": True, "images_per_ret": 4, "ret_bias": 1e4, "max_num_rets": 1, "max_new_tokens": 19}
    single = [pipe(prompt, **options) for prompt in (long, "x")]
    assert list(map(plain, pipe([[long], ["x"]], batch_size=2, **options))) == list(map(plain, single))
    assert kinds(single[0]) == ["image"] * 4 + ["text"]


def test_the_prompts_own_rets_whatever_stands_between(pipe):
    assert kinds(pipe(["a cat\nand a dog[RET]"], max_new_tokens=0)) == ["text", "image"]
    with pytest.raises(ValueError, match="context has 128"):
        pipe([" ".join(["a"] * 200) + "[RET]"], max_new_tokens=0)


def test_a_turn_that_fails_is_not_remembered(pipe):
    chat = FromageChat(pipe, system="Be kind.")
    with pytest.raises(UnreadableImageError):
        chat.send({"type": "image", "path": "missing.png"}, allow_local_files=True)
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_local_files_where_allowed(pipe, tmp_path):
    picture("red").save(tmp_path / "red.png")
    expected = pipe([picture("red"), "x"], max_num_rets=0)
    part = {"type": "image", "path": str(tmp_path / "red.png")}
    assert pipe([part, "x"], max_num_rets=0, allow_local_files=True) == expected
    assert pipe([tmp_path / "red.png", "x"], max_num_rets=0) == expected


# ---- transformers' own pipelines, and strangers' ----


def test_image_text_to_text(pipe, monkeypatch):
    stock = pipeline("image-text-to-text", model=pipe.model, processor=pipe.processor)
    monkeypatch.setattr(pipe.model.generation_config, "max_num_rets", 0)
    options = {"max_new_tokens": 4, "return_full_text": False}
    content = [{"type": "image", "image": picture("red")}, {"type": "text", "text": "what?"}]
    chats = [[{"role": "user", "content": content}], [{"role": "user", "content": content[::-1]}]]
    found = [row[0]["generated_text"] for row in stock(chats, batch_size=2, **options)]
    ours = [pipe(chat, max_new_tokens=4, max_num_rets=0, stop_strings=None)[0]["text"] for chat in chats]
    assert [text.strip() for text in found] == ours
    plain_text = stock(text="<|image|> a", images=[picture("red")], **options)
    assert plain_text[0]["generated_text"].strip() == pipe([picture("red"), " a"], max_new_tokens=4, max_num_rets=0,
                                                           stop_strings=None)[0]["text"]  # fmt: skip


def test_any_to_any(pipe, monkeypatch):
    """Text comes out. transformers asks for torchvision as soon as a model reads images; ours does without."""
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *args: None)
    stock = pipeline("any-to-any", model=pipe.model, processor=pipe.processor)
    content = [{"type": "image", "image": picture("red")}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": content}]
    found = stock(chat, max_new_tokens=4, generate_kwargs={"max_num_rets": 0}, return_full_text=False)
    expected = pipe(chat, max_new_tokens=4, max_num_rets=0, stop_strings=None)[0]["text"]
    assert found[0]["generated_text"].strip() == expected


def test_a_stranger_answers_with_images_of_an_index_of_their_own(pipe, tmp_path):
    """From a saved folder, in a process that has not this package: any object with `search` is an index."""
    pipe.save_pretrained(tmp_path / "model")
    torch.save((pipe.index.embeds, pipe.index.ids), tmp_path / "embeds.pt")
    script = """
import sys; sys.modules["modeling_fromage"] = None
import torch
from transformers import pipeline

class Index:
    def __init__(self, embeds, ids):
        self.embeds, self.ids = embeds, ids

    def search(self, embeds, top_k=1, exclude_ids=None, where=None):
        scores, rows = (embeds @ self.embeds.T).topk(min(top_k, len(self.ids)))
        return [[self.ids[i] for i in row] for row in rows], scores, [[{} for _ in row] for row in rows]

folder, embeds = sys.argv[1:]
pipe = pipeline(model=folder, trust_remote_code=True, index=Index(*torch.load(embeds)))
answer = pipe(["a cat[RET]"], max_new_tokens=0, load_images=False)
found = pipe.search("a cat", top_k=3, load_images=False)
print(type(pipe).__name__, pipe.task, answer[-1]["id"], *(hit["id"] for hit in found))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "embeds.pt")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    expected = [hit["id"] for hit in pipe.search("a cat", top_k=3)]
    assert run.stdout.split()[-6:] == ["FromagePipeline", "interleaved-generation", expected[0], *expected]
    assert not any(Path(tmp_path / "model").glob("*.safetensors.tmp"))
