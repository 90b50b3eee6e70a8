"""Properties of the prompt's layout, for any text: BOS once, text that stays text, captions within their length."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_fromage import FromageDataCollator
from modeling_fromage.prompts_fromage import (
    DEFAULT_CHAT_TEMPLATE,
    IMAGE_TOKEN,
    RET_TOKEN,
    CaptionFormat,
    chat_stop_strings,
    retrieval_text,
)
from tests.helpers.backbones import make_processor
from tests.helpers.pipelines import picture

PROCESSOR = make_processor()
BOS, IMAGE, RET = PROCESSOR.tokenizer.bos_token_id, PROCESSOR.image_token_id, PROCESSOR.ret_token_id
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

words = st.text(alphabet="abc XYZ.,\n\u00e9\u732b", max_size=12)
spelled = st.sampled_from([*PROCESSOR.tokenizer.added_tokens_encoder, "<|ima", "ge|>", "[RE", "T]", "</", "s>", "<"])
texts = st.lists(st.one_of(words, spelled), max_size=6).map("".join)
parts = st.lists(st.one_of(st.just({"type": "image"}), texts.map(lambda t: {"type": "text", "text": t})), min_size=1)


def ids_of(text: str) -> list[int]:
    """Token ids of a text with placeholders, by the processor itself."""
    images = text.count(IMAGE_TOKEN)
    return PROCESSOR(text=text, images=[picture("red")] * images or None).input_ids[0]


@quick
@given(st.lists(st.one_of(st.just(IMAGE_TOKEN), st.text("abc .\n", min_size=1, max_size=8)), min_size=1, max_size=6))
def test_bos_stands_once_after_the_leading_images(pieces):
    ids = ids_of("".join(pieces))
    leading = next((i for i, token in enumerate(ids) if token != IMAGE), len(ids))
    assert leading >= 2 * next((i for i, piece in enumerate(pieces) if piece != IMAGE_TOKEN), len(pieces))
    if leading == len(ids):
        assert BOS not in ids
    else:
        assert ids[leading] == BOS and ids.count(BOS) == 1


@quick
@given(parts)
def test_interleaved_text_never_becomes_a_token(content):
    shown = sum(part["type"] == "image" for part in content)
    text = PROCESSOR.join_parts(content)
    ids = PROCESSOR(text=text, images=[picture("red")] * shown or None).input_ids[0]
    assert ids.count(IMAGE) == 2 * shown and RET not in ids
    assert [token for token in ids if token in (0, 1, 2)] in ([], [BOS])
    assert PROCESSOR.count_tokens(text) == len(ids)


@quick
@given(st.lists(texts, min_size=1, max_size=3), st.booleans())
def test_messages_never_become_tokens(said, as_parts):
    roles = ["user", "assistant", "user"]
    contents = [[{"type": "text", "text": text}] if as_parts else text for text in said]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    ids = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert IMAGE not in ids and RET not in ids
    assert ids[0] == BOS and not {0, 1, 2} & set(ids[1:])


@quick
@given(
    st.lists(st.text("abc dog.\u00e9\u732b", min_size=1, max_size=80).filter(str.strip), min_size=1, max_size=4),
    st.sampled_from(["", "A picture of", "Image:"]),
    st.sampled_from(["", "\n", " and"]),
    st.integers(8, 24),
    st.booleans(),
)  # fmt: skip
def test_captions_fit_and_targets_align(captions, prefix, suffix, max_length, has_bos):
    processor = make_processor()
    if not has_bos:
        processor.bos_text = ""
    collate = FromageDataCollator(processor, max_length, 0.0, prefix, suffix)
    batch = collate([{"pooled_image_features": torch.zeros(4), "caption": caption} for caption in captions])
    tail = processor.tokenizer(suffix, add_special_tokens=False).input_ids
    head = len(processor.caption_prompt_ids()) - has_bos
    for row in range(len(captions)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        labels = batch["labels"][row][batch["attention_mask"][row].bool()].tolist()
        retrieval = batch["retrieval_input_ids"][row][batch["retrieval_attention_mask"][row].bool()].tolist()
        assert labels == [-100] * head + ids[head:] and len(ids) - head + 1 <= max_length
        assert ids[: head + has_bos] == processor.caption_prompt_ids() and ids[len(ids) - len(tail) :] == tail
        assert len(retrieval) <= max_length and retrieval[-1] == RET and retrieval.count(RET) == 1
        assert (batch["labels"][row][~batch["attention_mask"][row].bool()] == -100).all()


@pytest.mark.parametrize("text", ["a cat", "a cat[RET]", "<|image|>a cat", "</s>a cat"])
def test_retrieval_texts_end_in_ret_and_have_one_bos(text):
    laid_out = PROCESSOR.retrieval_text(text)
    ids = ids_of(laid_out)
    assert ids.count(RET) == ids.count(BOS) == 1 and ids[-1] == RET
    assert ids == ids_of(retrieval_text(text)) and laid_out == PROCESSOR.retrieval_text(laid_out)


def test_the_formats_of_a_processor_are_one_value():
    processor = make_processor()
    assert processor.caption_format == CaptionFormat() == CaptionFormat("", "", 24)
    processor.set_caption_format(caption_suffix="\n")
    assert processor.caption_format == CaptionFormat(caption_suffix="\n")
    assert processor.image_placeholders == IMAGE_TOKEN * processor.num_image_tokens
    assert CaptionFormat(caption_suffix=" and").stop_strings == ["\n", " and"]
    assert chat_stop_strings(DEFAULT_CHAT_TEMPLATE) == ["\n"] and chat_stop_strings("{{ messages }}") == []
    assert RET_TOKEN == processor.ret_token
