"""Models of timm, through transformers' wrapper: timm's own features and its transforms' pixels."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from transformers import TimmWrapperConfig

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.vision_libraries_fromage import load_image_processor
from tests.helpers.checkpoints import assert_equal, outputs, saved_both_ways

# A convolutional one, tokens with a class token and with positions computed anew, and windows of attention.
MODELS = ["test_efficientnet", "test_vit", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]


@pytest.fixture(params=MODELS)
def checkpoint(request, tmp_path):
    """A folder as timm writes it, and the model."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, pretrained=False).eval()
    save_for_hf(model, tmp_path / "backbones/timm", safe_serialization=True)
    return tmp_path / "backbones/timm", model


def test_features_pixels_and_checkpoints(checkpoint, backbones, tmp_path):
    folder, theirs = checkpoint
    names = (str(folder), str(backbones / "language_model"))
    processor = FromageProcessor.from_vision_text_pretrained(*names, num_image_tokens=2)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(*names, processor=processor, projection_dim=16)
    known = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(known), is_training=False)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (301, 333, 3), dtype=np.uint8))
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], transform(image))
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
    found = model.get_pooled_image_features(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    size = pixels.shape[-1]
    for place, again in saved_both_ways(model, processor, tmp_path):
        assert_equal(outputs(again, size), outputs(model, size))
        processed = FromageProcessor.from_pretrained(place).image_processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(processed, pixels)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": 0.9},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"mean": None, "crop_pct": None},
        {"crop_pct": 0},
    ],
)
def test_pixels_are_those_of_timm(change, tmp_path):
    given = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bicubic", **change}
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": given}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = load_image_processor(str(tmp_path))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(dict(given)), is_training=False)
    for shape in ((301, 333), (333, 301), (64, 64), (90, 67)):
        image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (*shape, 3), dtype=np.uint8))
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], transform(image))


@pytest.mark.parametrize("change", [{"crop_mode": "squash"}, {"input_size": [3, 64, 32]}, {"interpolation": "lanczos"}])
def test_transforms_that_are_not_known(change, tmp_path):
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 64, 64], **change}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not known here|are known here"):
        load_image_processor(str(tmp_path))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"pretrained_cfg": None}, "has no `pretrained_cfg`"),
        ({"pretrained_cfg": {"input_size": [64, 64]}}, r"has `input_size` \[64, 64\]"),
        ({"pretrained_cfg": {"input_size": 64}}, "has `input_size` 64"),
        ({"pretrained_cfg": {"crop_pct": "0.9"}}, "has .* and `crop_pct` '0.9'"),
    ],
)
def test_a_configuration_that_does_not_say_how_images_are_prepared(change, problem, tmp_path):
    config = {"model_type": "timm_wrapper", "architecture": "test_vit", "num_classes": 0, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path} {problem}"):
        load_image_processor(str(tmp_path))


def test_a_configuration_of_the_wrapper_alone(tmp_path):
    TimmWrapperConfig(architecture="test_vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no `pretrained_cfg`.*FromageProcessor"):
        load_image_processor(str(tmp_path))


def test_maps_of_several_stages(backbones, tmp_path):
    folder, text = tmp_path / "backbones/timm", str(backbones / "language_model")
    save_for_hf(timm.create_model("test_resnet", pretrained=False), folder, safe_serialization=True)
    processor = FromageProcessor.from_vision_text_pretrained(str(folder), text, num_image_tokens=2)
    options = {"processor": processor, "projection_dim": 16, "vision_model_args": {"features_only": True}}
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        str(folder), text, vision_pooling="mean", **options
    )
    pixels = torch.randn(3, 3, 160, 160)
    with torch.no_grad():
        expected = model.vision_model.timm_model(pixels)[-1].mean((2, 3))
    torch.testing.assert_close(model.get_pooled_image_features(pixels), expected)
    with pytest.raises(ValueError, match="'cls'` needs a sequence of tokens"):
        FromageForConditionalGeneration.from_vision_text_pretrained(str(folder), text, vision_pooling="cls", **options)
    for _, again in saved_both_ways(model, processor, tmp_path):
        assert_equal(outputs(again, 160), outputs(model, 160))
