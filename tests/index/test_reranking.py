"""Reranking by the likelihood of captions, against plain passes."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modeling_fromage.index.reranking import caption_log_likelihoods, combined_scores, rerank_by_likelihood
from tests.helpers.backbones import make_model, make_processor

CAPTIONS = ["a red square", "two dogs in the snow of a cold night", "sea"]


def plain(model, processor, caption, features):
    """The mean log-likelihood of a caption's tokens and its suffix, by one pass over the whole sequence."""
    ids = processor.caption_layout.encode(caption).input_ids
    start = len(processor.caption_prompt_ids())
    assert ids[:start] == processor.caption_prompt_ids()
    logits = model(input_ids=torch.tensor([ids]), pooled_image_features=features[None]).logits[0].float()
    return -F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])).item()


@pytest.mark.parametrize(
    "layout", [{}, {"caption_prefix": "A picture of", "caption_suffix": "\n"}], ids=["bare", "laid out"]
)
@pytest.mark.parametrize("name", ["opt_clip", "gpt2_resnet", "llama_clip"])
@torch.no_grad()
def test_likelihoods_are_those_of_plain_passes(name, layout):
    model, processor = make_model(name).eval(), make_processor()
    processor.set_caption_format(**layout)
    features = torch.randn(5, model.config.vision_feature_size)
    captions = [CAPTIONS[i % 3] for i in range(5)]
    expected = [plain(model, processor, *pair) for pair in zip(captions, features, strict=True)]
    for batch_size in (64, 2):
        found = caption_log_likelihoods(model, processor, captions, features, batch_size)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0


@torch.no_grad()
def test_images_of_several_captions():
    model, processor = make_model("opt_clip").eval(), make_processor()
    images = [
        [Image.new("RGB", (32, 32), color) for color in colors] for colors in (("red", "blue", "white"), ("red",))
    ]
    pixels = [processor.image_processor(own, return_tensors="pt")["pixel_values"] for own in images]
    features = [model.get_pooled_image_features(own) for own in pixels]
    expected = [[plain(model, processor, caption, row) for row in own]
                for caption, own in zip(CAPTIONS, features, strict=False)]  # fmt: skip
    found = rerank_by_likelihood(model, processor, CAPTIONS[:2], images, batch_size=3)
    assert [own.tolist() for own in found] == [pytest.approx(own, abs=1e-5) for own in expected]
    cosines = [torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.5])]
    joined = rerank_by_likelihood(model, processor, CAPTIONS[:2], images, cosines, weight=2.0)
    scale = model.adapter.logit_scale.exp()
    for scores, near, own in zip(joined, cosines, found, strict=True):
        torch.testing.assert_close(scores, scale * near + 2 * own)
    assert [own.tolist() for own in rerank_by_likelihood(model, processor, [], [])] == []


def test_what_does_not_fit_is_refused():
    model, processor = make_model("opt_clip").eval(), make_processor()
    features = torch.randn(1, model.config.vision_feature_size)
    for caption in (" ", "a [RET]", "<|image|>"):
        with pytest.raises(ValueError, match=r"A caption has a text, without <\|image\|> and \[RET\]"):
            caption_log_likelihoods(model, processor, [caption], features)
    with pytest.raises(ValueError, match="Got 2 captions and 1 images"):
        caption_log_likelihoods(model, processor, ["a", "b"], features)
    with pytest.raises(ValueError, match="for each of 1 captions, got 0"):
        rerank_by_likelihood(model, processor, ["a"], [])
    with pytest.raises(ValueError, match="`weight` adds the likelihoods to the cosines"):
        combined_scores(model, torch.zeros(2), weight=1.0)
