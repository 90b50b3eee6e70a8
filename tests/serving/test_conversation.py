"""Streamed answers and conversations side by side, on a small random model; nothing here knows of a page."""

import threading
import time

import pytest
from PIL import Image

from modeling_fromage.serving.conversation import Conversation, SharedPipeline
from modeling_fromage.serving.own_pictures import MOST_AT_ONCE, add_pictures
from tests.helpers.pipelines import COLOURS, NEWLINE, RET, kinds, picture, plain, scripted
from tests.helpers.talking import ALWAYS, NEVER, make_talker

CAT = 373  # a token


@pytest.fixture
def talker():
    pipe, pace = make_talker()
    return SharedPipeline(pipe), pace


def test_a_stream_grows_into_the_answer(talker):
    shared, _ = talker
    script = [CAT, 220, CAT, RET, CAT, NEWLINE]
    whole = shared.pipe("a", images_per_ret=2, **scripted(script))
    parts = list(shared.stream(lambda **options: shared.pipe("a", images_per_ret=2, **scripted(script), **options)))
    assert plain(parts[-1]) == plain(whole) and kinds(whole) == ["text", "image", "image", "text"]
    assert len(parts) > 3 and ["text", "ret"] in list(map(kinds, parts))
    parts = [part for part in parts if part]
    assert kinds(parts[0]) == ["text"] and whole[0]["text"].startswith(parts[0][0]["text"].strip())


def test_the_prompts_own_ret_is_not_streamed(talker):
    shared, _ = talker
    parts = list(shared.stream(lambda **options: shared.pipe("cat [RET]", **scripted([CAT, NEWLINE]), **options)))
    assert all("ret" not in kinds(part) for part in parts)


def test_an_abandoned_stream_stops_the_model(talker):
    shared, pace = talker
    conversation = Conversation(shared)
    pace.seconds = 0.05
    stream = conversation.stream("hello", remember=False, ret_bias=NEVER, max_new_tokens=100)
    first = next(part for part in stream if part)
    stream.close()
    with shared.lock:  # as soon as the model rests
        assert pace.steps < 50
    assert conversation.turns[0].answer == first  # as far as it was read
    pace.seconds = 0.0
    assert list(conversation.stream("hello", ret_bias=ALWAYS, max_new_tokens=2))[-1]


def test_one_who_gives_up_while_waiting_takes_none_of_the_models_time(talker):
    shared, pace = talker
    stream = shared.stream(lambda **options: shared.pipe("hello", **options))
    with shared.lock:
        assert next(stream) == []
        stream.close()
    time.sleep(0.2)
    with shared.lock:
        assert pace.steps == 0


def test_two_at_once(talker):
    """Each gets the answer that it would get alone; the model never works for both."""
    shared, pace = talker
    alone = [plain(shared.pipe(text, ret_bias=NEVER, max_new_tokens=8)) for text in ("hello", "a red square")]
    pace.seconds = 0.01
    streams = [Conversation(shared).stream(text, remember=False, ret_bias=NEVER, max_new_tokens=8)
               for text in ("hello", "a red square")]  # fmt: skip
    answers: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda i=i, s=s: answers.update({i: list(s)[-1]})) for i, s in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [plain(answers[i]) for i in range(2)] == alone


@pytest.mark.parametrize("remember", [False, True])
def test_no_picture_is_shown_twice(talker, remember):
    conversation, other = Conversation(talker[0]), Conversation(talker[0])
    options = {"remember": remember, "ret_bias": ALWAYS, "images_per_ret": 3, "max_new_tokens": 1}
    said = [list(conversation.stream("hello", **options))[-1] for _ in range(2)]
    assert sorted(part["id"] for answer in said for part in answer) == sorted(COLOURS)
    assert plain(list(other.stream("hello", **options))[-1]) == plain(said[0])  # sessions are apart
    conversation.rewind(1)
    assert plain(list(conversation.stream("hello", **options))[-1]) == plain(said[1])


def test_what_is_remembered_is_read(talker, monkeypatch):
    shared, _ = talker
    prompts: list = []
    preprocess = shared.pipe.preprocess
    monkeypatch.setattr(
        shared.pipe, "preprocess", lambda *args, **kwargs: (prompts.append(preprocess(*args, **kwargs)), prompts[-1])[1]
    )
    conversation = Conversation(shared)
    for remember in (False, True):
        list(conversation.stream(picture("red"), "hello", remember=remember, **scripted([CAT, NEWLINE])))
    assert [prompt["text"] for prompt in prompts] == [
        "<|image|>hello",
        "Q: <|image|>hello\nA: cat\nQ: <|image|>hello\nA:",
    ]
    assert [len(prompt["images"]) for prompt in prompts] == [1, 2]


def test_an_error_reaches_the_one_who_asked(talker):
    conversation = Conversation(talker[0])
    with pytest.raises(ValueError, match="context of 128"):
        list(conversation.stream("far " * 200, remember=True))
    assert not conversation.turns[0].answer
    assert list(conversation.stream("hello", remember=True, **scripted([CAT, NEWLINE])))[-1]


def test_similar(talker):
    found = talker[0].similar(picture("green"), 2)
    assert found[0]["id"] == "green" and found[0]["score"] == pytest.approx(1.0, abs=1e-5) and found[0]["image"].size
    talker[0].pipe.index = None
    assert talker[0].similar(picture("green"), 2) == []


def test_own_pictures(talker, tmp_path):
    shared, _ = talker
    index = shared.pipe.index.__copy__()
    for folder in "abc":
        (tmp_path / folder).mkdir()
    (tmp_path / "no.png").write_bytes(b"none")
    files = [tmp_path / "a" / "mine.png", tmp_path / "b" / "mine.png", tmp_path / "c" / "red", tmp_path / "no.png"]
    with pytest.raises(ValueError, match="Add 200 at a time"):
        add_pictures(shared, index, files * MOST_AT_ONCE)
    for file in files[:3]:
        Image.new("RGB", (3000, 2000), "violet").save(file, format="png")
    ids, refused = add_pictures(shared, index, files)
    assert ids == ["mine.png", "mine (2).png", "red (2)"]
    assert refused == ["no.png cannot be read as a picture (no image)."]
    assert len(index) == len(COLOURS) + 3 and len(shared.pipe.index) == len(COLOURS)
    files[0].unlink()
    assert index.load_image("mine.png").size == (1024, 683) and index.get("mine.png") == {"caption": "mine"}
    index.save_pretrained(tmp_path / "saved")
    assert type(index).from_pretrained(tmp_path / "saved").load_image("red (2)").size == (1024, 683)
    assert shared.similar(Image.new("RGB", (30, 20), "violet"), 1, index)[0]["id"] in ids
