"""What is asked of a vision encoder: the width of its features, one vector an image, and images that do not mix."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BlipConfig,
    BridgeTowerConfig,
    CLIPConfig,
    CLIPVisionConfig,
    EfficientNetConfig,
    MaskFormerConfig,
    MobileNetV2Config,
    OwlViTConfig,
    PreTrainedModel,
    ResNetConfig,
    Siglip2VisionConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, vision_fromage
from modeling_fromage.backbone_loading_fromage import load_backbone
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.vision_fromage import check_vision_model, dummy_images, vision_feature_size
from tests.helpers.backbones import TEXT_CONFIGS, VISION_CONFIGS, make_model

EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 32}
VIT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
       "patch_size": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("vision_config", "width"),
    [
        (ViTConfig(**VIT), 24),
        (ViTConfig(**VIT, pooler_output_size=10), 10),
        (MobileNetV2Config(depth_multiplier=0.25, image_size=32), 1280),
        (EfficientNetConfig(**EFFICIENTNET), 320),
    ],
    ids=["vit", "vit with a narrow pooler", "mobilenet_v2", "efficientnet"],
)
def test_the_width_is_measured(vision_config, width, tmp_path):
    text = TEXT_CONFIGS["opt"]()
    config = FromageConfig.from_vision_text_configs(vision_config, text, projection_dim=16)
    assert config.vision_feature_size is None
    live = AutoModel.from_config(vision_config)
    model = FromageForConditionalGeneration(
        FromageConfig.from_vision_text_configs(vision_config, text, projection_dim=16),
        make_model("opt_clip").language_model,
        live.eval(),
    )
    assert FromageForConditionalGeneration(config).config.vision_feature_size == width  # of the configuration alone
    assert model.config.vision_feature_size == model.adapter.visual_projection.in_features == width
    pixels = vision_fromage.dummy_images(vision_config, 2)
    model.save_pretrained(tmp_path)
    again = FromageForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(model.get_image_embeds(pixels), again.get_image_embeds(pixels), rtol=1e-4, atol=0)


def test_the_width_is_kept(monkeypatch, tmp_path):
    """Loading runs no encoder; a checkpoint of before the field does once, without weights."""
    model = make_model("opt_resnet")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["vision_feature_size"] == 32
    del saved["vision_feature_size"]
    measure, measured = vision_fromage._measured_feature_size, []
    monkeypatch.setattr(vision_fromage, "_measured_feature_size", lambda *args: measured.append(measure(*args)) or 32)
    FromageForConditionalGeneration.from_pretrained(tmp_path)
    assert measured == []
    path.write_text(json.dumps(saved))
    again = FromageForConditionalGeneration.from_pretrained(tmp_path)
    assert measured == [32] and again.config.vision_feature_size == 32


def test_a_configuration_is_measured_anew_for_another_encoder():
    model = make_model("opt_clip")
    other = AutoModel.from_config(VISION_CONFIGS["resnet"]()).eval()
    again = FromageForConditionalGeneration(model.config, model.language_model, other)
    assert again.config.vision_feature_size == again.adapter.visual_projection.in_features == 32


def test_an_encoder_that_does_not_run_without_weights(monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel for the meta device")

    monkeypatch.setattr(ImageVector, "encode", fail)
    config = FromageConfig(vision_config=ViTConfig(**VIT), text_config=TEXT_CONFIGS["opt"]())
    assert vision_feature_size(config) == 24
    config = FromageConfig(vision_config=EfficientNetConfig(**EFFICIENTNET), text_config=TEXT_CONFIGS["opt"]())
    with pytest.raises(ValueError, match="'efficientnet' encodes no dummy image.*set `vision_feature_size`"):
        vision_feature_size(config)


def test_dummy_images_have_the_size_of_an_encoder_within_and_of_timm():
    backbone = SwinConfig(image_size=48)
    assert dummy_images(MaskFormerConfig(backbone_config=backbone), 1).shape[-2:] == (48, 48)
    for fields in ({"model_args": {"img_size": [40, 56]}}, {"pretrained_cfg": {"input_size": [3, 40, 56]}}):
        assert dummy_images(TimmWrapperConfig(num_classes=2, **fields), 1).shape[-2:] == (40, 56)
    assert dummy_images(ResNetConfig(), 1).shape[-2:] == (224, 224)


class Encoder(PreTrainedModel):
    """Of what a function makes of a linear map of the pixels, (N, 24)."""

    config_class = CLIPVisionConfig

    def __init__(self, make):
        super().__init__(VISION_CONFIGS["clip"]())
        self.linear, self.make = nn.Linear(3 * 32 * 32, 24), make
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        return BaseModelOutputWithPooling(pooler_output=self.make(self.linear(pixel_values.flatten(1))))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda features: features + torch.rand_like(features), "other features each time"),
        (lambda features: features + 1e-3 * features.mean(0), "mixes the images of a batch"),
        (lambda features: features * torch.arange(1, len(features) + 1)[:, None], "mixes the images of a batch"),
        (lambda features: features[:1], r"shape \(1, 24\) for 2 images"),
        (lambda features: features.view(-1, 2, 12), r"has shape \(1, 2, 12\), not a vector for each image"),
        (lambda features: features.view(-1, 7), "does not encode pixel values.*It says: RuntimeError"),
        (lambda features: features / 0, "mixes|other features"),
    ],
    ids=["random", "leak", "by row", "one row", "tokens", "fails", "not finite"],
)
def test_encoders_that_are_refused(make, error):
    with pytest.raises(ValueError, match=error):
        check_vision_model(Encoder(make).eval(), ImageVector())


def test_an_encoder_that_is_right():
    assert check_vision_model(Encoder(lambda features: features[:, :20, None, None]).eval(), ImageVector()) == 20


def test_an_encoder_that_needs_more_than_pixels_is_refused():
    sizes = {name: value for name, value in VIT.items() if name != "image_size"}
    model = AutoModel.from_config(Siglip2VisionConfig(**sizes, num_patches=16)).eval()
    with pytest.raises(ValueError, match="needs `pixel_attention_mask` and `spatial_shapes` beside.*without `naflex`"):
        check_vision_model(model, ImageVector())


def test_feature_maps_are_averaged_over_their_pixels():
    """Whichever axis the channels have, in images that are not square too."""
    hidden, pixels = torch.randn(2, 6, 4, 3), torch.empty(2, 3, 64, 48)
    expected = hidden.mean(dim=(2, 3))
    for given in (hidden, hidden.permute(0, 2, 3, 1)):
        output = BaseModelOutputWithPooling(last_hidden_state=given)
        torch.testing.assert_close(ImageVector("mean").of_output(output, torch.nn.Identity(), pixels), expected)
        with pytest.raises(ValueError, match="needs a sequence of tokens"):
            ImageVector("cls").of_output(output, torch.nn.Identity(), pixels)


# ---- vision halves of image-text models ---------------------------------------------------------------------------


_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "vocab_size": 99}  # fmt: skip
WHOLE = {
    "clip": lambda: CLIPConfig(vision_config=VIT, text_config=_TEXT),
    "blip": lambda: BlipConfig(vision_config=VIT, text_config=_TEXT),  # a class that AutoModel does not know
    "owlvit": lambda: OwlViTConfig(vision_config=VIT, text_config=_TEXT),  # which holds what is within its encoder
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_vision_half_is_taken(kind, tmp_path):
    whole = AutoModel.from_config(WHOLE[kind]()).eval()
    lm, text = make_model("opt_clip").language_model, TEXT_CONFIGS["opt"]()
    pixels = torch.rand(2, 3, 32, 32)
    fields = {"projection_dim": 16, "image_token_id": 500, "ret_token_id": 501}
    config = FromageConfig.from_vision_text_configs(whole.config, text, **fields)
    assert type(config.vision_config) is type(whole.config.vision_config)
    model = FromageForConditionalGeneration(config, lm, whole).eval()
    expected = whole.vision_model(pixels).pooler_output
    assert torch.equal(model.get_pooled_image_features(pixels), expected)
    built = FromageForConditionalGeneration(FromageConfig.from_vision_text_configs(whole.config, text, **fields))
    assert built.vision_model.state_dict().keys() == model.vision_model.state_dict().keys()
    whole.save_pretrained(tmp_path / "whole")
    lm.save_pretrained(tmp_path / "lm")
    processor = SimpleNamespace(image_token_id=500, ret_token_id=501, num_image_tokens=1, num_ret_tokens=1)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "whole"), str(tmp_path / "lm"), processor, projection_dim=16
    )
    torch.testing.assert_close(model.get_pooled_image_features(pixels), expected)
    for save_backbones in (False, True):
        model.save_pretrained(tmp_path / "model", save_backbones=save_backbones)
        again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(again.get_pooled_image_features(pixels), expected)


def test_a_vision_half_that_takes_no_pixel_values_is_refused():
    config = BridgeTowerConfig()
    with pytest.raises(ValueError, match="no encoder of pixel values with a configuration of type BridgeTowerVision"):
        FromageForConditionalGeneration(FromageConfig.from_vision_text_configs(config, TEXT_CONFIGS["opt"]()))


def test_a_vision_half_that_lacks_weights_is_refused(tmp_path):
    whole = AutoModel.from_config(WHOLE["blip"]())
    state = {name: tensor for name, tensor in whole.state_dict().items() if "vision_model.post_layernorm" not in name}
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks weights that are in use: .*post_layernorm"):
        load_backbone("vision", str(tmp_path), {}, "pooler")


@pytest.mark.parametrize(("prefix", "told"), [("text", "language model"), ("vision", "vision model")])
def test_a_weight_file_that_cannot_be_read_is_named(prefix, told, tmp_path):
    """A pointer of Git LFS, say."""
    made = TEXT_CONFIGS["opt"]() if prefix == "text" else VISION_CONFIGS["clip"]()
    made.save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=f"weight file of the {told} .*git lfs pull"):
        load_backbone(prefix, str(tmp_path), {}, "mean")
