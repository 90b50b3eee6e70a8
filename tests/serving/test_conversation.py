"""Streamed answers and conversations side by side, on a small random model; nothing here knows of a page."""

import pytest
from PIL import Image

from modeling_fromage.serving.conversation import Conversation, similar
from modeling_fromage.serving.engine import Engine
from modeling_fromage.serving.own_pictures import MOST_AT_ONCE, add_pictures
from tests.helpers.pipelines import COLOURS, NEWLINE, RET, kinds, picture, plain, scripted
from tests.helpers.talking import ALWAYS, NEVER, make_talker

CAT = 373  # a token


@pytest.fixture
def talker():
    pipe, pace = make_talker()
    engine = Engine(pipe)
    yield engine, pace
    engine.close()


def test_an_answer_grows(talker):
    engine, _ = talker
    script = [CAT, 220, CAT, RET, CAT, NEWLINE]
    whole = engine.pipe("a", images_per_ret=2, **scripted(script))
    parts = list(Conversation(engine).stream("a", remember=False, images_per_ret=2, **scripted(script)))
    assert plain(parts[-1]) == plain(whole) and kinds(whole) == ["text", "image", "image", "text"]
    assert ["text", "ret"] in list(map(kinds, parts))
    assert sum("image" in kinds(part) for part in parts) == 1  # a page writes their files each time
    parts = [part for part in parts if part]
    assert kinds(parts[0]) == ["text"] and whole[0]["text"].startswith(parts[0][0]["text"].strip())


def test_an_abandoned_stream_stops_the_model(talker):
    engine, pace = talker
    conversation = Conversation(engine)
    pace.seconds = 0.05
    stream = conversation.stream("hello", remember=False, ret_bias=NEVER, max_new_tokens=100)
    first = next(part for part in stream if part)
    stream.close()
    engine.run(lambda: None)  # as soon as the model rests
    assert pace.steps < 50
    assert conversation.turns[0].answer == first  # as far as it was read
    pace.seconds = 0.0
    assert list(conversation.stream("hello", ret_bias=ALWAYS, max_new_tokens=2))[-1]


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
    engine, _ = talker
    prompts: list = []
    preprocess = engine.pipe.preprocess
    monkeypatch.setattr(
        engine.pipe, "preprocess", lambda *args, **kwargs: (prompts.append(preprocess(*args, **kwargs)), prompts[-1])[1]
    )
    conversation = Conversation(engine)
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
    found = similar(talker[0], picture("green"), 2)
    assert found[0]["id"] == "green" and found[0]["score"] == pytest.approx(1.0, abs=1e-5) and found[0]["image"].size
    talker[0].pipe.index = None
    assert similar(talker[0], picture("green"), 2) == []


def test_own_pictures(talker, tmp_path):
    engine, _ = talker
    index = engine.pipe.index.__copy__()
    for folder in "abc":
        (tmp_path / folder).mkdir()
    (tmp_path / "no.png").write_bytes(b"none")
    files = [tmp_path / "a" / "mine.png", tmp_path / "b" / "mine.png", tmp_path / "c" / "red", tmp_path / "no.png"]
    with pytest.raises(ValueError, match="Add 200 at a time"):
        add_pictures(engine, index, files * MOST_AT_ONCE)
    for file in files[:3]:
        Image.new("RGB", (3000, 2000), "violet").save(file, format="png")
    ids, refused = add_pictures(engine, index, files)
    assert ids == ["mine.png", "mine (2).png", "red (2)"]
    assert refused == ["no.png cannot be read as a picture (no image)."]
    assert len(index) == len(COLOURS) + 3 and len(engine.pipe.index) == len(COLOURS)
    files[0].unlink()
    assert index.load_image("mine.png").size == (1024, 683) and index.get("mine.png") == {"caption": "mine"}
    index.save_pretrained(tmp_path / "saved")
    assert type(index).from_pretrained(tmp_path / "saved").load_image("red (2)").size == (1024, 683)
    assert similar(engine, Image.new("RGB", (30, 20), "violet"), 1, index)[0]["id"] in ids
