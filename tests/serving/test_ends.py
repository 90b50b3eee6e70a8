"""Where answers end, and what is told of it."""

import pytest

from modeling_fromage.serving.engine import Engine
from tests.helpers.pipelines import NEWLINE, RET, plain, scripted
from tests.helpers.talking import NEVER, make_talker

CAT = 373  # " cat"


@pytest.fixture
def engine():
    engine = Engine(make_talker()[0])
    yield engine
    engine.close()


def test_a_long_stop_string_of_letters_of_several_tokens(engine):
    stop = "😀" * 12
    tokens = engine.pipe.processor.tokenizer(stop, add_special_tokens=False).input_ids
    assert len(tokens) == 48
    answer = engine.submit("a", stop_strings=[stop], **scripted([CAT, *tokens, CAT, CAT, CAT]))
    assert [part["text"] for part in answer.result()] == ["cat"]
    assert answer.completion_tokens == 49 and answer.finish_reason == "stop"


def test_an_image_is_no_text_of_a_stop_string(engine):
    answer = engine.submit("a", stop_strings=["t c", "["], **scripted([CAT, RET, CAT, NEWLINE]))
    assert [part["type"] for part in answer.result()] == ["text", "image", "text"]
    assert answer.completion_tokens == 4 and answer.finish_reason == "length"


@pytest.mark.parametrize(("last", "reason"), [(NEWLINE, "stop"), (2, "stop"), (CAT, "length")])
def test_an_end_that_is_the_last_token_allowed_is_one(engine, last, reason):
    answer = engine.submit("a", stop_strings=["\n"], **scripted([CAT, CAT, last]))
    assert answer.result()[0]["text"] == "cat cat" + " cat" * (last == CAT)
    assert answer.completion_tokens == 3 and answer.finish_reason == reason


def test_a_temperature_next_to_nothing_takes_the_likeliest(engine):
    options = {"ret_bias": NEVER, "max_new_tokens": 6}
    greedy = plain(engine.submit("hello", **options).result())
    assert plain(engine.submit("hello", temperature=1e-300, **options).result()) == greedy
    assert plain(engine.submit("hello", temperature=1e-40, top_p=0.9, **options).result()) == greedy
