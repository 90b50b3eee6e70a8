"""What a pipeline and a chat may read, of which images they choose, what they say once, and what they forget."""

import io
import json
import logging
import os
from pathlib import Path, PurePosixPath

import pytest
import torch
from transformers import pipeline

from modeling_fromage import FromageChat, FromageImageIndex, FromagePipeline, UnreadableImageError
from modeling_fromage.interleaved_generation_fromage import InterleavedGeneration
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.pipelines import COLOURS, RET, kinds, picture, plain, scripted


@pytest.fixture(scope="module")
def pipe():
    model, processor = make_model("opt_clip"), make_processor()
    metadata = [{"warm": colour in ("red", "orange")} for colour in COLOURS]
    images = [picture(colour) for colour in COLOURS]
    index = FromageImageIndex.build(model, processor, images, COLOURS, metadata, show_progress=False)
    return pipeline("interleaved-generation", model=model, processor=processor, index=index, max_new_tokens=8)


# ---- what a message may read ----


class Sly(str):
    """A string that says of itself that it is a URL."""

    def lower(self):
        return "https://example.com/a.png"


class SlyPath(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


def naming(path: str) -> list:
    """Parts that name a local file, in every way that has been thought of."""
    sources = [
        path, Sly(path), {"path": path}, {"path": path, "bytes": None}, {"path": path, "bytes": b""}, SlyPath(path),
        {"path": Sly(path)}, {"path": SlyPath(path)}, f"file://{path}", {"path": f"file://{path}"}, [path],
        PurePosixPath(path), {"path": {"path": path}}, {"bytes": path}, {"bytes": None, "path": Path(path)},
        path.encode() + b"\0", {"url": path},
    ]  # fmt: skip
    parts = [{"type": "image", key: source} for key in ("image", "url", "path") for source in sources]
    urls = [{"type": "image_url", "image_url": source} for source in sources]
    return [*parts, *urls, *({"type": "image_url", "image_url": {"url": source}} for source in sources)]


def test_no_message_names_a_local_file(pipe, tmp_path):
    path = str(tmp_path / "secret.png")
    picture("red").save(path)
    for part in naming(path):
        for prompt in ([part], [{"role": "user", "content": [part]}]):
            with pytest.raises(ValueError):
                pipe.preprocess(prompt)
        shown = {**part, "type": "image", "ret_index": 0, "id": "x"}
        if "image" in shown:
            with pytest.raises(ValueError):
                pipe.preprocess([{"role": "assistant", "content": [shown]}], feed_images_back=True)
    with pytest.raises(UnreadableImageError, match="local files are refused.*allow_local_files=True"):
        pipe([{"type": "image", "image": {"path": path}}, "what?"])


def test_what_a_message_may_show(pipe, tmp_path):
    path = tmp_path / "red.png"
    picture("red").save(path)
    file = io.BytesIO()
    picture("red").save(file, "PNG")
    expected = picture("red").tobytes()
    harmless = [picture("red"), path, file.getvalue(), {"bytes": file.getvalue(), "path": "/etc/passwd"}]
    for source in harmless:
        found = pipe.preprocess([{"type": "image", "image": source}])["images"]
        assert [image.tobytes() for image in found] == [expected]
    for source in (str(path), {"path": str(path)}, {"bytes": None, "path": str(path)}, SlyPath(str(path))):
        found = pipe.preprocess([{"type": "image", "image": source}], allow_local_files=True)["images"]
        assert [image.tobytes() for image in found] == [expected]
    for url in ("http://127.0.0.1/a.png", {"path": "http://127.0.0.1/a.png"}):
        with pytest.raises(UnreadableImageError, match="private address"):
            pipe.preprocess([{"type": "image", "image": url}])


# ---- which images ----


def test_where(pipe):
    script = scripted([RET, 373, RET])
    answer = pipe(["x"], **script, where={"warm": True}, load_images=False)
    assert sorted(s["id"] for s in answer if s["type"] == "image") == ["orange", "red"]
    cold = pipe(["x"], **scripted([RET, 373, RET]), where={"warm": False}, load_images=False)
    assert not {"orange", "red"} & {segment.get("id") for segment in cold}
    chat = FromageChat(pipe, where={"warm": [True]}, load_images=False)
    assert chat.send("x", **scripted([RET]))[0]["id"] in ("orange", "red")


def test_no_filter_is_none(pipe):
    """As of a form in which nothing was chosen; the index has fewer images than are looked up."""
    excluded = COLOURS[:-2]
    options = {"exclude_ids": excluded, "images_per_ret": 2}
    answers = [pipe(["x"], where=where, **options, **scripted([RET])) for where in (None, {})]
    assert plain(answers[0]) == plain(answers[1]) and len(answers[0]) == 2


def test_one_excluded_id_is_no_list_of_letters(pipe):
    options = {"load_images": False, "images_per_ret": len(COLOURS)}
    made = FromagePipeline(
        model=pipe.model, processor=pipe.processor, index=pipe._forward_params["index"], exclude_ids="red"
    )
    chat = FromageChat(pipe, exclude_ids="red")
    chat._forgotten_ids = ["blue"]
    answers = [
        pipe(["x"], exclude_ids="red", **options, **scripted([RET])),
        made(["x"], **options, **scripted([RET])),
        chat.send("x", **options, **scripted([RET])),
    ]
    options |= {"index": pipe._forward_params["index"], **scripted([RET])}
    answers += InterleavedGeneration(pipe.model, pipe.processor, **options)(["x"], exclude_ids=["red"])
    for answer in answers:
        assert {s["id"] for s in answer if "id" in s} == {*COLOURS} - {"red"} - (
            {"blue"} if answer is answers[2] else set()
        )


@pytest.mark.parametrize("image_id", [["red"], {"red": 1}, 1.5, 7])
def test_ids_that_are_none_cost_nobody_an_answer(pipe, image_id):
    part = {"type": "image", "image": picture("red"), "id": image_id}
    prompts = [[{"role": "user", "content": [part]}], [{"role": "user", "content": "x"}]]
    assert [len(answer) for answer in pipe(prompts, batch_size=2, **scripted([RET]))] == [1, 1]


def test_a_message_of_one_part(pipe):
    """Not a list of the part's keys."""
    part = {"type": "text", "text": "x"}
    texts = [pipe.preprocess([{"role": "user", "content": content}])["text"] for content in ("x", [part], part)]
    assert texts[0] == texts[1] == texts[2]
    assert len(pipe.preprocess([{"role": "user", "content": picture("red")}])["images"]) == 1
    with pytest.raises(ValueError, match="Expected a text, a PIL image"):
        pipe([{"role": "user", "content": 5}])


class Filtered:
    """An index whose `search` with `where` returns as many images as there are, as its documentation says."""

    def __init__(self, index):
        self.index = index

    def __getattr__(self, name):
        return getattr(self.index, name)

    def search(self, embeds, top_k, exclude_ids, where):
        rows = []
        for embed, excluded in zip(embeds, exclude_ids, strict=True):
            ids, scores, facts = (found[0] for found in self.index.search(embed[None], len(self.index)))
            keep = [
                i for i, image_id in enumerate(ids) if facts[i]["warm"] == where["warm"] and image_id not in excluded
            ]
            rows.append([[values[i] for i in keep[:top_k]] for values in (ids, scores.tolist(), facts)])
        width = max(len(ids) for ids, _, _ in rows)
        scores = [row + [-torch.inf] * (width - len(row)) for _, row, _ in rows]
        return [ids for ids, _, _ in rows], torch.tensor(scores).view(len(rows), width), [facts for _, _, facts in rows]


def test_where_leaves_fewer_than_wanted(pipe, caplog):
    index = Filtered(pipe._forward_params["index"])
    prompts = [["x"], [{"role": "assistant", "content": [{"type": "image", "id": "red", "ret_index": 0}]}]]
    prompts.append([{"role": "assistant", "content": [{"type": "image", "id": c, "ret_index": 0} for c in COLOURS]}])
    options = {"index": index, "where": {"warm": True}, "images_per_ret": 2}
    with caplog.at_level(logging.WARNING):
        answers = [pipe(prompt, **options, **scripted([RET, 68])) for prompt in prompts]
    assert [kinds(answer) for answer in answers] == [["image", "image", "text"], ["image", "text"], ["text"]]
    assert answers[1][0]["id"] == "orange" and answers[1][0]["image"] is not None
    assert answers[2] == [{"type": "text", "text": "[RET]a"}]
    assert "fewer than `images_per_ret=2`" in caplog.text


def test_image_root(pipe, tmp_path):
    (tmp_path / "photos").mkdir()
    for colour in COLOURS:
        picture(colour).save(tmp_path / "photos" / f"{colour}.png")
    index = FromageImageIndex.build(pipe.model, pipe.processor, tmp_path / "photos", show_progress=False)
    index.save_pretrained(tmp_path / "index")
    os.rename(tmp_path / "photos", tmp_path / "moved")
    options = {"index": str(tmp_path / "index"), "image_root": tmp_path / "moved"}
    made = FromagePipeline(model=pipe.model, processor=pipe.processor, **options)
    for answer in (made(["x"], **scripted([RET])), pipe(["x"], **options, **scripted([RET]))):
        assert answer[0]["image"].size == (40, 30)
    for given in ({"index": index}, {}):
        with pytest.raises(ValueError, match="Set it on the index itself"):
            pipe(["x"], image_root=tmp_path / "moved", **given)


# ---- what is said ----


def test_a_reason_is_logged_once(pipe, tmp_path, caplog):
    without = FromagePipeline(model=pipe.model, processor=pipe.processor)
    with caplog.at_level(logging.WARNING, logger="modeling_fromage"):
        for _ in range(3):
            without([["x"], ["y"]], batch_size=2, **scripted([RET, RET]))
        assert len(caplog.records) == 1 and "no image index" in caplog.text
        caplog.clear()
        chat = FromageChat(pipe, images_per_ret=4)
        for _ in range(4):
            chat.send("x", **scripted([RET, 68, RET]))
        assert len([record for record in caplog.records if "images_per_ret" in record.message]) == 1
        caplog.clear()
        for colour in COLOURS[:2]:
            picture(colour).save(tmp_path / f"{colour}.png")
        index = FromageImageIndex.build(pipe.model, pipe.processor, tmp_path, show_progress=False)
        for colour in COLOURS[:2]:
            (tmp_path / f"{colour}.png").unlink()
        for _ in range(3):
            pipe(["x"], index=index, **scripted([RET]))
        assert len(caplog.records) == 2  # one an image


# ---- long chats ----


def test_a_long_chat_forgets_its_oldest_turns(pipe, caplog):
    chat = FromageChat(pipe, system="Be kind.", max_new_tokens=3, ret_bias=1e4, max_num_rets=1, load_images=False)
    shown = []
    with caplog.at_level(logging.WARNING, logger="modeling_fromage"):
        for turn in range(len(COLOURS)):
            answer = chat.send(f"turn {turn} " + "of many words " * 4)
            shown += [segment["id"] for segment in answer if segment["type"] == "image"]
            assert chat.messages[0] == {"role": "system", "content": "Be kind."}
    assert sorted(shown) == sorted(COLOURS)  # none twice, though its turn is forgotten
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)] and 3 <= len(roles) < 11
    last = chat.messages[-2]["content"][0]["text"]
    assert last.startswith(f"turn {len(COLOURS) - 1} ")
    assert len([record for record in caplog.records if "oldest turns are forgotten" in record.message]) == 1
    # No more than had to go.
    kept = chat.messages[:-1]
    older = {"role": "user", "content": "turn 0 " + "of many words " * 4}
    assert (
        pipe.tokens_left([kept[0], older, {"role": "assistant", "content": "x" * 3}, *kept[1:]], max_new_tokens=3) < 0
    )


def test_a_message_too_long_by_itself_is_refused_and_not_remembered(pipe):
    chat = FromageChat(pipe, system="Be kind.", max_new_tokens=3)
    chat.send("hi")
    before = list(chat.messages)
    with pytest.raises(ValueError, match="context of 128"):
        chat.send("word " * 200)
    assert chat.messages == before
    chat.send("and?")
    assert len(chat.messages) == 5


def test_tokens_left_is_what_generation_counts(pipe):
    long = "a " * 90
    for prompt in ([long], [picture("red"), long], [{"role": "user", "content": [picture("red"), long, "</s> hi"]}]):
        left = pipe.tokens_left(prompt, max_new_tokens=1)
        assert pipe(prompt, max_new_tokens=int(left) + 1, max_num_rets=0) is not None
        with pytest.raises(ValueError, match="context of 128"):
            pipe(prompt, max_new_tokens=int(left) + 2)


# ---- saved ----


def test_a_saved_pipeline_needs_no_trust_where_the_package_is_imported(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    assert "custom_pipelines" in json.loads((tmp_path / "model" / "config.json").read_text())
    expected = plain(pipe(["a cat"], max_num_rets=0))
    for options in ({}, {"task": "interleaved-generation"}, {"trust_remote_code": True}):
        again = pipeline(model=str(tmp_path / "model"), **options)
        assert type(again) is FromagePipeline and type(again.model) is type(pipe.model)
        assert plain(again(["a cat"], max_new_tokens=8, max_num_rets=0)) == expected
    again.save_pretrained(tmp_path / "again")  # as a stranger needs it
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["custom_pipelines"]["interleaved-generation"]["impl"] == "pipeline_fromage.FromagePipeline"
