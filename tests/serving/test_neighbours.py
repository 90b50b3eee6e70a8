"""What one request does that its neighbours in a batch must not feel."""

import threading

import pytest

from modeling_fromage import FromageChat
from modeling_fromage.serving.conversation import Conversation
from modeling_fromage.serving.retrieval import embed
from tests.helpers.pipelines import picture, plain
from tests.helpers.talking import ALWAYS, NEVER


class Watched:
    """An index that counts its searches, and does something at each."""

    def __init__(self, index, act):
        self.index, self.act, self.searches = index, act, 0

    def search(self, *args, **kwargs):
        self.searches += 1
        self.act()
        return self.index.search(*args, **kwargs)

    def load_image(self, image_id, limits=None):
        return self.index.load_image(image_id)


@pytest.mark.parametrize("feed_images_back", [False, True])
def test_nothing_more_is_looked_up_for_one_who_gives_up(talker, feed_images_back):
    engine, _ = talker
    asked = threading.Event()

    def give_up():
        asked.wait(10)
        if index.searches == 2:
            answer.cancel()

    index = Watched(engine.pipe.index, give_up)
    options = {"ret_bias": ALWAYS, "max_new_tokens": 30, "feed_images_back": feed_images_back}
    answer = engine.submit("hello", index=index, **options)
    beside = engine.submit("hello", ret_bias=ALWAYS, max_new_tokens=2)
    asked.set()
    assert len([part for part in answer.result() if part["type"] == "image"]) == 2
    assert index.searches == 2 and answer.finish_reason == "cancelled"
    assert len(beside.result()) == 2


@pytest.fixture
def crossing(talker):
    """A model whose rotary frequencies would change after 30 tokens."""
    engine, _ = talker
    config = engine.pipe.model.config.text_config
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 30}
    return engine


def test_who_crosses_to_other_frequencies_is_refused_before_the_batch(crossing):
    beside = crossing.submit("hello", ret_bias=NEVER, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"new ones go beyond 30, .*longrope.* Lower the number of new tokens"):
        crossing.submit("a much longer prompt than all", max_new_tokens=28)
    assert beside.result()
    assert crossing.pipe.tokens_left("a much longer prompt than all", max_new_tokens=28) < 0
    assert crossing.submit("far " * 40, ret_bias=NEVER, max_new_tokens=3).result()  # beyond from its beginning


def test_an_image_that_would_cross_is_not_fed_back(crossing):
    options = {"ret_bias": ALWAYS, "max_num_rets": 4, "feed_images_back": True}
    left = int(crossing.pipe.tokens_left("a cat", max_new_tokens=0))
    alone = crossing.pipe("a cat", max_new_tokens=left, **options)
    assert [part["type"] for part in alone].count("image") == 4
    answers = [
        crossing.submit("a cat", max_new_tokens=left, **options),
        crossing.submit([picture("red")], max_new_tokens=9, **options),
    ]
    assert plain(answers[0].result()) == plain(alone)


def test_a_chat_forgets_turns_rather_than_cross(crossing):
    chat = FromageChat(crossing.pipe, max_new_tokens=4, ret_bias=NEVER)
    assert all(chat.send(f"turn {number}") for number in range(6)) and len(chat.messages) < 12


def test_the_models_tokenizer_is_used_by_the_engine_alone(talker, monkeypatch):
    """It pads the texts of a batch, and would pad those of others, or leave the batch without padding."""
    engine, _ = talker
    kind, threads = type(engine.pipe.processor.tokenizer), set()
    encode = kind._encode_plus

    def watched(tokenizer, *args, **kwargs):
        if tokenizer is engine.pipe.processor.tokenizer:
            threads.add(threading.current_thread().name)
        return encode(tokenizer, *args, **kwargs)

    monkeypatch.setattr(kind, "_encode_plus", watched)
    conversation = Conversation(engine)
    assert all(list(conversation.stream("hello", max_new_tokens=2, ret_bias=NEVER)) for _ in range(2))
    engine.run(lambda: embed(engine.pipe, [[{"type": "text", "text": text}] for text in ("a", "a cat")]))
    assert threads == {"fromage-engine"}
