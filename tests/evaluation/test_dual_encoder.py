"""The baseline: transformers' own CLIP, and what its embeddings are compared with."""

import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from tests.helpers.backbones import PARITY
from tests.helpers.evaluation import FakeDualEncoder
from tests.helpers.paths import IMAGES
from training.evaluation import answers, dialogues, vist
from training.evaluation.dual_encoder import DualEncoder


def test_baselines_by_hand():
    e = torch.eye(4)
    encoder = FakeDualEncoder(**{"one two three four five": e[0], "five": e[3]})
    story = vist.Story("s", ["one", "two", "three", "four", "five"], list("abcab"))
    photos = vist.EncodedImages(list("abc"), torch.zeros(3, 2), torch.stack([e[1], e[2], e[0]]), {})
    # The joined captions and four images: a twice, b and c once.
    mean = e[0] + 2 * e[1] + e[2] + e[0]
    expected = (mean / mean.norm()) @ photos.dual_embeds.t()
    torch.testing.assert_close(vist.score_dual(encoder, [story], photos, "5 captions + 4 images")[0], expected)
    assert vist.score_dual(encoder, [story], photos, "5 captions")[0].tolist() == [0, 0, 1]
    assert vist.score_dual(encoder, [story], photos, "1 caption")[0].tolist() == [0, 0, 0]

    turns = [dialogues.Turn("one", "yes"), dialogues.Turn("two", "no", ["no", "yes"], 0)]
    encoder = FakeDualEncoder(**{"Q: two? A: no": e[1], "Q: two? A: yes": -e[0]})
    (row,) = answers.score_answers_dual(encoder, dialogues.Dialogue("1", turns), [1], e[1] * 0.6 + e[0] * 0.8)
    assert row.tolist() == pytest.approx([0.6, -0.8])


def test_a_tower_without_a_text_half(tmp_path):
    with pytest.raises(ValueError, match="vision_model, which has no text encoder.*Leave --dual-encoder out"):
        DualEncoder.from_pretrained(str(PARITY / "case_a_opt_tied" / "vision_model"))


def test_dual_encoder_is_transformers_own(checkpoint):
    dual_encoder = DualEncoder.from_pretrained(str(checkpoint[1]))
    clip = CLIPModel.from_pretrained(checkpoint[1])
    images = [Image.open(IMAGES / f"img_{i:03d}.png").convert("RGB") for i in range(3)]
    texts = ["a cat", "two dogs run in the park"]
    pixels = torch.stack([dual_encoder.pixels(image) for image in images])
    inputs = dual_encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(pixel_values=pixels, **inputs).logits_per_image / clip.logit_scale.exp()
    cosines = dual_encoder.image_embeds(pixels) @ dual_encoder.text_embeds(texts).t()
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)
