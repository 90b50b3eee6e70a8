"""Tokens, BOS, images of every kind and the collator."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from modeling_fromage import FromageDataCollator
from modeling_fromage.images_fromage import load_rgb_image
from tests.helpers.backbones import make_model

IMAGE = Image.new("RGB", (40, 30), "red")


def test_special_tokens(processor, tmp_path):
    assert (processor.image_token_id, processor.ret_token_id) == (500, 501)
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    assert (again.image_token_id, again.ret_token_id, again.num_image_tokens) == (500, 501, 2)
    ids = processor(text="a cat[RET]").input_ids[0]
    assert ids[-1] == 501 and processor.decode(ids, skip_special_tokens=True) == "a cat[RET]"


@pytest.mark.parametrize(
    ("text", "images", "start"),
    [
        ("a cat", 0, [2]),
        ("<|image|>a cat", 1, [500, 500, 2]),
        ("<|image|><|image|>a cat<|image|>", 3, [500] * 4 + [2]),
        ("</s>a cat", 0, [2]),
        ("<|image|>", 1, [500, 500]),
    ],
)
def test_one_bos_after_the_leading_images(processor, text, images, start):
    ids = processor(text=text, images=[IMAGE] * images or None).input_ids[0]
    assert ids[: len(start)] == start
    assert ids.count(2) == (2 in start)


def test_images_and_placeholders_must_agree(processor):
    with pytest.raises(ValueError, match="2 .* tokens and 1 images"):
        processor(text="<|image|> and <|image|>", images=[IMAGE])
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<|image|>")
    with pytest.raises(ValueError, match="0 .* tokens and 1 images"):
        processor(text="a cat", images=[IMAGE])
    with pytest.raises(ValueError, match="empty"):
        processor(text=[])


def test_config_of_another_tokenizer_is_refused(processor):
    model = make_model("opt_clip", ret_token_id=505)
    with pytest.raises(ValueError, match="`ret_token_id` is 501, the model's is 505"):
        processor.check_config(model.config)
    processor.check_config(make_model("opt_clip").config)


def test_chat_template_places_images(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "Q: <|image|>What?\nA:"
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert (inputs["input_ids"] == 500).sum() == 2


YCBCR = pytest.param(
    "YCbCr",
    marks=pytest.mark.xfail(
        int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow before 13 cannot read the YCbCr TIFF that it writes"
    ),
)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F", YCBCR])
def test_image_modes(mode, tmp_path):
    grey = np.full((20, 30), 200, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = Image.fromarray(grey).convert("RGBA" if mode == "LA" else "RGB")
        image = image.quantize() if mode == "P" else image.convert(mode)
    path = tmp_path / ("image.tiff" if mode in ("F", "CMYK", "YCbCr") else "image.png")
    image.save(path)
    pixels = np.asarray(load_rgb_image(path)).astype(int)
    assert pixels.shape == (20, 30, 3)
    if mode == "1":  # dithered to black and white
        assert set(np.unique(pixels)) == {0, 255} and abs(pixels.mean() - 200) < 15
    else:
        assert abs(pixels - 200).max() <= 2


def test_transparency_is_white_and_animations_give_their_first_frame(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(load_rgb_image(tmp_path / "clear.png")) == 255).all()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_rgb_image(tmp_path / "moving.gif").getpixel((0, 0))[0] > 200


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("text.png", "cut.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            load_rgb_image(tmp_path / name)


def test_collator_keeps_ret_last_and_masks_pads(processor):
    collate = FromageDataCollator(processor, max_length=8, concat_captions_prob=0)
    batch = collate([{"image": IMAGE, "caption": "a cat"}, {"image": IMAGE, "caption": "a dog " * 20}])
    for row, mask in zip(batch["retrieval_input_ids"], batch["retrieval_attention_mask"], strict=True):
        ids = row[mask.bool()]
        assert ids[0] == 2 and ids[-1] == 501 and len(ids) <= 8
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert ((batch["labels"] == -100) == ((batch["attention_mask"] == 0) | (batch["input_ids"] == 500))).all()


def test_collator_with_suffix_and_odd_concatenation(processor):
    collate = FromageDataCollator(processor, max_length=8, concat_captions_prob=1, caption_suffix="\n")
    examples = [{"pooled_image_features": torch.rand(4), "caption": f"{word} " * 9} for word in ("a", "b", "c")]
    batch = collate(examples)
    assert batch["input_ids"].shape == (2, 2 * (2 + 7)) and batch["pooled_image_features"].shape == (3, 4)
    newline = processor.tokenizer("\n", add_special_tokens=False).input_ids
    assert batch["labels"][0, -1:].tolist() == newline and batch["labels"][1, 8:9].tolist() == newline
    collate.training = False
    assert collate(examples)["input_ids"].shape[0] == 3


def test_a_caption_goes_on_with_its_prefix_in_captioning_alone(processor):
    examples = [{"pooled_image_features": torch.rand(4), "caption": "cat"}]

    def rows(processor):
        batch = FromageDataCollator(processor, caption_prefix="A picture of")(examples)
        return [processor.tokenizer.decode(batch[name][0]) for name in ("input_ids", "retrieval_input_ids")]

    assert rows(processor) == ["<|image|><|image|>A picture of</s>cat", "</s>cat[RET]"]
    processor.bos_text = ""  # as with a tokenizer that adds none
    assert rows(processor) == ["<|image|><|image|>A picture of cat", "cat[RET]"]


def test_concatenation_is_a_function_of_seed_and_tokens(processor):
    def drawn(seed):
        collate = FromageDataCollator(processor, seed=seed)
        pairs = [
            [{"pooled_image_features": torch.zeros(4), "caption": f"a cat {i} {j}"} for j in "ab"] for i in range(60)
        ]
        return [len(collate(pair)["input_ids"]) == 1 for pair in pairs]

    assert drawn(0) == drawn(0) != drawn(1)
    assert 15 < sum(drawn(0)) < 45


def test_collator_bad_input(processor):
    collate = FromageDataCollator(processor)
    for caption, message in [
        ("  ", "Example 1 .*empty"),
        ("a [RET]", r"Example 1 .*\[RET\]"),
        ("<|image|>", "Example 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            collate([{"image": IMAGE, "caption": "a cat"}, {"image": IMAGE, "caption": caption}])
    with pytest.raises(ValueError, match="empty"):
        collate([])
