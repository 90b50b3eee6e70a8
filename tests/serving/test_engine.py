"""Many who ask one model at once: each gets what it would get alone, and nobody pays for another's mistake."""

import threading
import time

import pytest
import torch
from transformers import StoppingCriteriaList

from modeling_fromage.serving.engine import EngineClosedError, QueueFullError
from modeling_fromage.serving.text_stream import TextStream
from tests.helpers.pipelines import COLOURS, NEWLINE, RET, picture, plain, scripted
from tests.helpers.talking import ALWAYS, NEVER

CAT = 373  # a token
CHAT = [{"role": "user", "content": [picture("red"), "what is it?"]}]
PROMPTS = [
    "hello",
    [picture("green"), "looks like a"],
    CHAT,
    "a much longer prompt than all of the others, which are short",
    [picture("red"), picture("blue")],
]
OPTIONS = [
    {"max_new_tokens": 12, "ret_bias": 0.4},
    {"max_new_tokens": 3, "ret_bias": NEVER},
    {"max_new_tokens": 12, "ret_bias": ALWAYS, "max_num_rets": 2, "images_per_ret": 2},
    {"max_new_tokens": 9, "stop_strings": ["a", "e"], "ret_bias": NEVER},
    {"max_new_tokens": 6, "feed_images_back": True, "ret_bias": 0.4, "min_tokens_before_ret": 2},
]


def read(answer):
    """The parts of an answer as they come, texts joined."""
    parts = []
    for event in answer:
        if event["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {**event, "text": parts[-1]["text"] + event["text"]}
        elif event["type"] != "ret":
            parts.append(event)
    return parts


def test_one_batch_with_options_of_their_own(talker):
    engine, pace = talker
    alone = [engine.pipe(prompt, **own) for prompt, own in zip(PROMPTS, OPTIONS, strict=True)]
    steps, pace.steps = pace.steps, 0
    answers = [engine.submit(prompt, **own) for prompt, own in zip(PROMPTS, OPTIONS, strict=True)]
    streams = [read(answer) for answer in answers]
    assert pace.steps < 0.6 * steps  # together
    for stream, answer, expected in zip(streams, answers, alone, strict=True):
        assert plain(stream) == plain(answer.result()) == plain(expected)
        assert answer.prompt_tokens > 0
    assert [answer.finish_reason for answer in answers[:2]] == ["length", "length"]
    assert answers[1].completion_tokens == 3


@pytest.mark.parametrize(
    "options", [{"temperature": 1.3}, {"temperature": 0.8, "top_k": 20}, {"temperature": 2.0, "top_p": 0.9}]
)
def test_a_sample_does_not_depend_on_its_neighbours(talker, options):
    engine, _ = talker

    def ask(seed):
        return engine.submit("hello", ret_bias=NEVER, max_new_tokens=8, seed=seed, **options)

    [alone] = [ask(7).result()]
    crowd = [ask(seed) for seed in (1, 7, 2, 7)]
    crowd.append(engine.submit(PROMPTS[3], ret_bias=NEVER, max_new_tokens=20))
    said = [plain(answer.result()) for answer in crowd]
    assert said[1] == said[3] == plain(alone) and len({str(each) for each in said[:3]}) == 3


def test_samples_follow_the_distribution(talker):
    """First tokens of many seeds, against the softmax at that temperature."""
    engine, _ = talker
    pipe = engine.pipe
    inputs = pipe.processor(text=["hello"], return_tensors="pt")
    logits = pipe.model(**inputs).logits[0, -1].float()
    logits[[pipe.model.config.image_token_id, pipe.model.config.ret_token_id]] = -torch.inf
    top = logits.topk(4)
    expected = (top.values / 0.5).softmax(-1)
    generation = engine._prepare("hello", {"max_new_tokens": 1, "max_num_rets": 0}).generation
    own = [generation.options(temperature=0.5, top_k=4, seed=seed) for seed in range(1500)]
    rows = generation.contexts.rows(["hello"] * 1500, [[]] * 1500, [[]] * 1500, own)
    generation.run(rows)
    drawn = torch.tensor([row.ids[-1] for row in rows])
    found = torch.stack([(drawn == token).float().mean() for token in top.indices])
    assert found.sum() == 1 and (found - expected).abs().max() < 0.05


def test_one_bad_request_fails_alone(talker):
    engine, _ = talker
    good = engine.submit("hello", ret_bias=ALWAYS, max_new_tokens=2)
    bad = engine.submit("hello", ret_bias=ALWAYS, max_new_tokens=2, where={"caption": object()})
    also_good = engine.submit(CHAT, ret_bias=NEVER, max_new_tokens=2)
    assert good.result() and also_good.result()
    with pytest.raises((ValueError, TypeError)):
        bad.result()
    with pytest.raises((ValueError, TypeError)):
        list(bad)  # again
    for prompt, options, message in [
        ("far " * 200, {}, "context of 128"),
        ("", {}, "empty"),
        ("hello", {"top_p": 7.0, "temperature": 1.0}, "`top_p` above 0"),
        ("hello", {"images_per_ret": 0}, "at least 1"),
        ([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}], {}, "file|allow_local_files"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, **options)
    assert engine.submit("hello", max_new_tokens=1).result() is not None


def test_a_broken_index_costs_only_who_asks_it(talker):
    class Broken:
        def search(self, embeds, top_k=1, exclude_ids=None, where=None):
            raise ConnectionError("the cluster is away")

        def load_image(self, image_id, limits=None):
            raise ValueError

    engine, _ = talker
    answers = [
        engine.submit("a", index=index, ret_bias=ALWAYS, max_new_tokens=1) for index in (Broken(), engine.pipe.index)
    ]
    with pytest.raises(ConnectionError):
        answers[0].result()
    assert answers[1].result()[0]["id"] in COLOURS


def test_a_failing_model_ends_the_batch_and_not_the_engine(talker, caplog):
    engine, _ = talker

    def fail(*args):
        raise RuntimeError("out of memory")

    hook = engine.pipe.model.language_model.register_forward_pre_hook(fail)
    hooked = engine.pipe.model.get_decoder().register_forward_pre_hook(fail)
    answers = [engine.submit("hello", max_new_tokens=3) for _ in range(2)]
    for answer in answers:
        with pytest.raises(RuntimeError, match="out of memory"):
            answer.result()
    hook.remove(), hooked.remove()
    assert engine.submit("hello", max_new_tokens=3, ret_bias=NEVER).result()


def test_beams_and_scripts_run_by_themselves(talker):
    engine, _ = talker
    asked = [
        {"num_beams": 3, "max_new_tokens": 5},
        {"max_new_tokens": 5},
        {"repetition_penalty": 3.0, "max_new_tokens": 5},
    ]
    asked = [{**each, "ret_bias": NEVER} for each in asked]
    alone = [plain(engine.pipe("hello", **each)) for each in asked]
    assert [plain(answer.result()) for answer in [engine.submit("hello", **each) for each in asked]] == alone


def test_the_queue_has_an_end(talker):
    engine, pace = talker
    engine.max_queue, pace.seconds = 2, 0.05
    held = threading.Event()
    blocker = threading.Thread(target=lambda: engine.run(held.wait))
    blocker.start()
    time.sleep(0.1)
    waiting = [engine.submit("hello", max_new_tokens=1) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit("hello")
    waiting[0].cancel()
    third = engine.submit("hello", max_new_tokens=1)  # in the place of one that gave up
    assert waiting[0].result() == [] and waiting[0].finish_reason == "cancelled"
    held.set()
    blocker.join()
    assert third.result() is not None and waiting[1].result() is not None


def test_who_gives_up_ends_at_the_next_token(talker):
    engine, pace = talker
    pace.seconds = 0.03
    gone, stays = (engine.submit("hello", ret_bias=NEVER, max_new_tokens=n) for n in (100, 10))
    assert gone.wait(10)
    gone.cancel()
    assert stays.result() and gone.finish_reason == "cancelled" and gone.completion_tokens < 20
    engine.run(lambda: None)
    assert pace.steps < 30
    while_waiting = engine.submit("hello", max_new_tokens=100)
    while_waiting.cancel()
    assert while_waiting.result() == [] and while_waiting.completion_tokens == 0


def test_closing_finishes_what_was_taken(talker):
    engine, pace = talker
    pace.seconds = 0.01
    answers = [engine.submit("hello", ret_bias=NEVER, max_new_tokens=5) for _ in range(3)]
    engine.close()
    assert all(answer.result() for answer in answers)
    with pytest.raises(EngineClosedError):
        engine.submit("hello")
    with pytest.raises(EngineClosedError):
        engine.run(lambda: None)


def test_closing_cancels_what_takes_too_long(talker):
    engine, pace = talker
    pace.seconds = 0.1
    answer = engine.submit("hello", ret_bias=NEVER, max_new_tokens=100)
    assert answer.wait(10)
    start = time.monotonic()
    engine.close(timeout=0.2)
    assert time.monotonic() - start < 3 and answer.finish_reason == "cancelled"


def test_text_comes_when_it_is_certain(talker):
    """Never white space at an end, the beginning of a stop string, or what follows a picture that is not there yet."""
    engine, _ = talker
    answer = engine.submit("a", stop_strings=["cat cat"], **scripted([CAT, 220, CAT, 220, 220, RET, CAT, NEWLINE]))
    events = list(answer)
    assert answer.result() and all(not event.get("text", "x").endswith(" ") or i for i, event in enumerate(events))
    kinds = [event["type"] for event in events]
    assert kinds.index("ret") < kinds.index("image") and "text" not in kinds[kinds.index("ret") : kinds.index("image")]
    stopped = engine.submit("a", stop_strings=["catcat"], **scripted([CAT, CAT, CAT, NEWLINE]))
    assert "".join(event["text"] for event in stopped) == "".join(part["text"] for part in stopped.result())


def test_a_criterion_of_ones_own(talker):
    engine, _ = talker
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: torch.full((len(ids),), True)])
    answer = engine.submit("hello", stopping_criteria=stop, ret_bias=NEVER, max_new_tokens=9)
    assert len(answer.result()) <= 1 and answer.completion_tokens == 1


def test_images_are_not_confused_in_a_batch_of_chats_and_others(talker):
    engine, _ = talker
    options = {"max_new_tokens": 8, "ret_bias": NEVER}
    for colour in ("red", "blue", "green", "red"):
        fresh = engine.pipe([picture(colour), "looks like a"], **options)
        answers = [engine.submit(CHAT, **options), engine.submit([picture(colour), "looks like a"], **options)]
        assert plain(answers[1].result()) == plain(fresh) and answers[0].result() is not None


def test_one_who_gives_up_while_the_batch_is_gathered(talker):
    engine, _ = talker
    engine.wait_seconds = 0.5
    gone = engine.submit("hello", max_new_tokens=2)
    time.sleep(0.1)
    gone.cancel()
    with engine._changed:
        engine._check_room()  # as another request does
    assert gone.result() == [] and engine.is_alive
    time.sleep(0.6)
    assert engine.submit("hello", max_new_tokens=2, ret_bias=NEVER).result() is not None and engine.is_alive


def test_a_mistake_of_ours_leaves_nobody_waiting(talker, monkeypatch):
    engine, _ = talker
    monkeypatch.setattr(engine, "_choose", lambda: 1 / 0)
    answer = engine.submit("hello")
    with pytest.raises(ZeroDivisionError):
        answer.result()
    engine._thread.join(5)
    assert not engine.is_alive
    with pytest.raises(EngineClosedError):
        engine.submit("hello")


def test_the_models_own_config_does_not_make_it_sample(talker):
    engine, _ = talker
    expected = plain(engine.submit("hello", ret_bias=NEVER, max_new_tokens=8).result())
    engine.pipe.model.generation_config.do_sample = True
    assert [plain(engine.submit("hello", ret_bias=NEVER, max_new_tokens=8).result()) for _ in range(3)] == [
        expected
    ] * 3
    engine.pipe.model.generation_config.num_beams = 2
    assert engine.submit("hello", max_new_tokens=2).is_alone


def test_what_ends_early_beside_others(talker):
    """Neither the padding behind it nor noise that is drawn meanwhile is its own."""
    engine, _ = talker
    text = engine.pipe("hello", ret_bias=NEVER, max_new_tokens=4)[0]["text"]
    long = engine.submit(PROMPTS[3], ret_bias=NEVER, max_new_tokens=20)
    short = engine.submit("hello", ret_bias=NEVER, max_new_tokens=20, stop_strings=[text[0]])
    assert short.result() == [] and short.finish_reason == "stop" and short.row.num_generated < 20
    assert long.result()
    sampled = {"temperature": 1.5, "seed": 3, "feed_images_back": True, "ret_bias": 1.0, "max_new_tokens": 10}
    alone = engine.submit("a cat", **sampled).result()
    beside = engine.submit("a cat", **sampled)
    assert engine.submit(PROMPTS[3], ret_bias=NEVER, max_new_tokens=30).result() and plain(beside.result()) == plain(
        alone
    )


def test_closing_does_not_wait_for_what_never_ends(talker, monkeypatch):
    engine, _ = talker
    monkeypatch.setattr("modeling_fromage.serving.engine._GRACE", 0.2)
    held, told = threading.Event(), []

    def run():
        try:
            engine.run(held.wait)
        except EngineClosedError as error:
            told.append(error)

    errand = threading.Thread(target=run)
    errand.start()
    time.sleep(0.1)
    answer = engine.submit("hello")
    start = time.monotonic()
    engine.close(timeout=0.2)
    assert time.monotonic() - start < 3
    with pytest.raises(EngineClosedError):
        answer.result()
    errand.join(5)
    assert told  # nor does who waits for an errand
    held.set()
    engine._thread.join(5)
    assert not engine._thread.is_alive()


class Letters:
    """A tokenizer of bytes, as those with byte fallback."""

    def decode(self, tokens, skip_special_tokens=True):
        return b"".join(bytes([token]) for token in tokens).decode(errors="replace")

    def convert_ids_to_tokens(self, token):
        return f"<0x{token:02X}>" if token > 127 else chr(token)


@pytest.mark.parametrize("stops", [[], ["答："]])
def test_letters_of_several_tokens(talker, stops):
    options = talker[0].submit("a", stop_strings=stops, max_new_tokens=1).options
    for written in ("a€ b", "问：答：no", "ab答", "a 答"):
        stream = TextStream(Letters(), (), options)
        pieces = [event["text"] for token in written.encode() for event in stream.put(token)]
        final = written.split(stops[0])[0] if stops else written
        pieces += [event["text"] for event in stream.rest([{"type": "text", "text": final}])]
        assert "".join(pieces) == final
