"""`[RET]` of several tokens in texts: written once, read as all of them, and never made of what somebody types."""

import pytest
from PIL import Image

from modeling_fromage import FromageDataCollator, FromageProcessor
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.batches import RET

RUN = [RET, RET + 1, RET + 2]
IMAGE_PART = {"type": "image", "image": "x.png"}


@pytest.fixture
def processor():
    return make_processor(num_ret_tokens=3)


def ids_of(processor, text, **kwargs):
    return processor(text=text, **kwargs)["input_ids"][0]


def test_ret_is_written_once(processor):
    assert processor.ret_tokens == ["[RET]", "[RET2]", "[RET3]"] and processor.ret_token_ids == RUN
    one = make_processor()
    text = "show[RET] and[RET][RET] more"
    alone = ids_of(one, text)
    expected = sum(([*RUN] if token == RET else [token] for token in alone), [])
    assert ids_of(processor, text) == processor.token_ids(text) == expected
    # As a decoder spells them.
    whole = processor.decode(expected)
    assert "[RET][RET2][RET3]" in whole and processor.token_ids(whole.removeprefix("</s>")) == expected
    assert processor.decode(expected, skip_special_tokens=True) == one.decode(alone, skip_special_tokens=True)
    assert processor.count_tokens(text) == len(expected)


@pytest.mark.parametrize("text", ["a cat", "a cat[RET]", "a cat[RET][RET2][RET3]"])
def test_a_text_for_retrieval_ends_in_all_of_them(processor, text):
    prompt = processor.retrieval_text(text)
    assert processor.retrieval_text(prompt) == prompt
    assert ids_of(processor, prompt) == processor.tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids_of(processor, prompt)[-4:] == [ids_of(processor, "a cat")[-1], *RUN]


@pytest.mark.parametrize("text", ["[RET2]", "a[RET][RET3]", "a[RET][RET2]", "[RET][RET2][RET3][RET2]"])
def test_the_others_by_themselves_are_refused(processor, text):
    for read in (ids_of, lambda processor, text: processor.token_ids(text)):
        with pytest.raises(ValueError, match=r"has \[RET[23]\] without the tokens before it. Write \[RET\] alone"):
            read(processor, text)


def test_what_somebody_types_is_text(processor):
    typed = [{"role": "user", "content": "what is [RET2] and [RET][RET2][RET3]?"}]
    ids = processor.apply_chat_template(typed, tokenize=True, return_dict=True)["input_ids"][0]
    assert not set(ids) & set(RUN)
    parts = ["look", {"type": "ret"}, " [RET3][RET2]", {**IMAGE_PART, "ret_index": 0}, {**IMAGE_PART, "ret_index": 0}]
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    ids = processor.token_ids(processor.join_parts(parts))
    assert [token for token in ids if token in RUN] == [*RUN, *RUN]
    meant = processor.join_parts([{"type": "text", "text": "see[RET] and [RET2]"}], rets_in_text=True)
    assert [token for token in processor.token_ids(meant) if token in RUN] == RUN


def test_chats_with_retrieved_images(processor):
    chat = [
        {"role": "user", "content": "show me"},
        {"role": "assistant", "content": [{"type": "text", "text": "here"}, {**IMAGE_PART, "ret_index": 0}]},
    ]
    options = {"tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chat, **options)
    assert inputs["input_ids"][0] == processor.token_ids(processor.apply_chat_template(chat, tokenize=False))
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    processor.chat_template = template
    inputs = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    answer = [t for t, m in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if m]
    assert answer == processor.tokenizer("here", add_special_tokens=False).input_ids + RUN
    chat[1]["content"] = "here[RET]"
    with pytest.raises(ValueError, match='Give it as a part of type "ret"'):
        processor.apply_chat_template(chat, return_assistant_tokens_mask=True, sanitize_control_tokens=False, **options)


def test_captions_are_laid_out_with_all_of_them(processor):
    processor.set_caption_format(max_length=10)
    layout, bos = processor.caption_layout, processor.tokenizer.bos_token_id
    caption = layout.encode("a very long caption of a cat that sits on a mat")
    assert len(caption.retrieval_input_ids) == 10 and caption.retrieval_input_ids[-3:] == RUN
    assert caption.retrieval_input_ids[:-3] == [bos, *caption.caption_ids]
    assert layout.retrieval_ids(["a very long caption of a cat that sits on a mat"]) == [caption.retrieval_input_ids]
    processor.set_caption_format(max_length=5)  # BOS, a token, [RET]
    with pytest.raises(ValueError, match="leaves no room"):
        processor.set_caption_format(max_length=4)
    with pytest.raises(ValueError, match=r"without .*\[RET3\]"):
        processor.set_caption_format(caption_suffix="[RET3]")
    collator = FromageDataCollator(processor)
    for example in (
        {"caption": "a [RET2] b", "image": Image.new("RGB", (8, 8))},
        {"document": ["a[RET3]", IMAGE_PART]},
    ):
        with pytest.raises(ValueError, match="special token"):
            collator([example])


def test_the_number_is_saved_and_compared(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = FromageProcessor.from_pretrained(tmp_path)
    assert again.num_ret_tokens == 3 and ids_of(again, "a[RET]") == ids_of(processor, "a[RET]")
    again.check_config(make_model("opt_clip", num_ret_tokens=3).config)
    with pytest.raises(ValueError, match="`num_ret_tokens` is 3, the model's is 1"):
        again.check_config(make_model("opt_clip").config)
    parts = again.image_processor, again.tokenizer
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"`num_ret_tokens` is {number}, but the tokenizer has .*\[RET2\]"):
            FromageProcessor(*parts, num_ret_tokens=number)
    again.tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="`num_ret_tokens` is 4, .* must be contiguous"):
        FromageProcessor(*parts, num_ret_tokens=4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_processor(num_ret_tokens=0)


# ---- documents ------------------------------------------------------------------------------------------------------


def batch_of(processor, documents, **options):
    examples = [{"pooled_image_features": [[0.0]] * 9, "document": document} for document in documents]
    return FromageDataCollator(processor, **options)(examples)


@pytest.mark.parametrize("length", range(2, 20))
def test_the_cut_of_a_document_splits_no_run(length):
    processor = make_processor(num_image_tokens=2, num_ret_tokens=3)
    document = ["one", IMAGE_PART, "two", IMAGE_PART, IMAGE_PART, " three"]
    whole = batch_of(processor, [document])["input_ids"][0].tolist()
    try:
        batch = batch_of(processor, [document], max_document_length=length)
    except ValueError as error:
        assert "document without an image" in str(error) and length < whole.index(processor.image_token_id) + 2
        return
    ids, labels, finds = (batch[name][0].tolist() for name in ("input_ids", "labels", "ret_targets"))
    assert len(ids) <= length and ids == whole[: len(ids)]
    assert [ids.count(token) for token in RUN] == [ids.count(processor.image_token_id) // 2] * 3
    assert len(ids) == len(whole) or len(ids) == length or whole[len(ids)] == RET
    ends = [place for place, token in enumerate(ids) if token == RUN[-1]]
    assert [place for place, found in enumerate(finds) if found >= 0] == ends
    assert [finds[place] for place in ends] == list(range(len(ends)))
    assert labels == [-100 if token == processor.image_token_id else token for token in ids]


def test_images_are_shown_without_a_whole_run_by_chance(processor):
    batch = batch_of(processor, [[f"text {row}", IMAGE_PART, "more", IMAGE_PART] for row in range(40)],
                     document_ret_prob=0.5)  # fmt: skip
    counts = (batch["ret_targets"] != -100).sum(1)
    assert counts.min() == 0 and counts.max() == 2
    for token in RUN:
        assert ((batch["input_ids"] == token).sum(1) == counts).all()
    assert ((batch["input_ids"] == processor.image_token_id).sum(1) == 4).all()
    ends = batch["ret_targets"] != -100
    assert (batch["input_ids"][ends] == RUN[-1]).all()
