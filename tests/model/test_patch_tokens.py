"""What stands for an image beside its pooled vector: patch tokens, from any layer of the encoder."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2WithRegistersConfig,
    HieraConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    YolosConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.vision_fromage import check_vision_model, vision_feature_size
from tests.helpers.backbones import TEXT_CONFIGS, VISION_CONFIGS, make_model
from tests.helpers.checkpoints import assemble

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8}  # fmt: skip
ENCODERS = {  # configuration, tokens before those of patches
    "clip": (VISION_CONFIGS["clip"], 1),
    "siglip": (lambda: SiglipVisionConfig(**SIZES), 0),
    "dinov2": (lambda: Dinov2WithRegistersConfig(**{**SIZES, "num_register_tokens": 4}, mlp_ratio=2), 5),
    "vit": (lambda: ViTConfig(**SIZES), 1),
}
MAPS = {
    "resnet": VISION_CONFIGS["resnet"],
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64),
}


def encoder_of(config) -> nn.Module:
    torch.manual_seed(3)
    return AutoModel.from_config(config).eval()


@torch.no_grad()
def features_of(encoder, pixels, *options) -> torch.Tensor:
    return ImageVector(*options).encode(encoder, pixels)[1]


# ---- what the encoder gives ----


@pytest.mark.parametrize("layer", [-1, 1, -3])
@pytest.mark.parametrize("name", ENCODERS)
def test_patch_tokens_are_means_over_squares_of_the_grid(name, layer):
    make, before = ENCODERS[name]
    encoder, pixels = encoder_of(make()), torch.rand(3, 3, 32, 48)
    if name in ("clip", "siglip", "vit"):  # which take images of their size alone
        pixels = pixels[..., :32]
    with torch.no_grad():
        output = encoder(pixels, output_hidden_states=True)
    tokens = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    rows, columns = 4, pixels.shape[-1] // 8
    assert tokens.shape[1] == before + rows * columns
    found = features_of(encoder, pixels, "mean", layer, 4).unflatten(1, (5, 24))
    torch.testing.assert_close(found[:, 0], tokens.mean(1))
    grid = tokens[:, before:].reshape(3, rows, columns, 24)
    for row in range(2):
        for column in range(2):
            across = slice(column * columns // 2, (column + 1) * columns // 2)
            square = grid[:, row * 2 : row * 2 + 2, across].flatten(1, 2)
            torch.testing.assert_close(found[:, 1 + 2 * row + column], square.mean(1))


@pytest.mark.parametrize("name", MAPS)
def test_patch_tokens_of_a_feature_map(name):
    encoder, pixels = encoder_of(MAPS[name]()), torch.rand(2, 3, 64, 64)
    feature_map = encoder(pixels).last_hidden_state.detach()  # (2, 32, 2, 2)
    found = features_of(encoder, pixels, "pooler", -1, 4)
    assert found.shape == (2, 5 * 32) and torch.equal(found[:, :32], features_of(encoder, pixels, "pooler"))
    torch.testing.assert_close(found[:, 32:].reshape(2, 2, 2, 32), feature_map.permute(0, 2, 3, 1))


def test_patch_tokens_of_the_last_of_swins_stages():
    encoder = encoder_of(SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4))
    pixels = torch.rand(2, 3, 64, 64)
    output = encoder(pixels)
    found = features_of(encoder, pixels, "mean", -1, 4).reshape(2, 5, 16)[:, 1:]
    by_hand = output.last_hidden_state.reshape(2, 8, 8, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.mT.reshape(2, 16, 2, 2), F.adaptive_avg_pool2d(by_hand, 2))
    with pytest.raises(ValueError, match="SwinModel .*`vision_feature_layer=0`.*not known to be a grid of patches"):
        features_of(encoder, pixels, "mean", 0, 4)


@pytest.mark.parametrize("layer", [0, 1, 2, -2])
def test_pooling_of_a_layer(layer):
    encoder, pixels = encoder_of(VISION_CONFIGS["clip"]()), torch.rand(2, 3, 32, 32)
    states = encoder(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(features_of(encoder, pixels, "cls", layer), states[:, 0])
    torch.testing.assert_close(features_of(encoder, pixels, "mean", layer), states.mean(1))


def test_half_precision_and_a_width_that_is_measured():
    for dtype in (torch.float16, torch.bfloat16):
        model = make_model("opt_clip", vision_patch_tokens=4, projector_type="resampler").to(dtype)
        pooled = model.get_pooled_image_features(torch.rand(2, 3, 32, 32))
        assert pooled.dtype == dtype and pooled.shape == (2, 5 * 24)
        assert {parameter.dtype for parameter in model.adapter.parameters()} == {torch.float32}
        assert model.adapter.visual_tokens(pooled).isfinite().all()
    config = FromageConfig(
        vision_config=VISION_CONFIGS["clip"](), text_config=TEXT_CONFIGS["opt"](), vision_patch_tokens=4,
        vision_feature_layer=-2,
    )  # fmt: skip
    assert vision_feature_size(config) == 5 * 24  # without weights


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (VISION_CONFIGS["clip"], ("pooler", -1, 25), "CLIPVisionModel has 4 x 4 patches.*to 16 at most"),
        (VISION_CONFIGS["clip"], ("mean", 7, 0), "`vision_feature_layer` is 7, but CLIPVisionModel has .* -3..2"),
        (lambda: ViTConfig(**SIZES, pooler_output_size=10), ("pooler", -1, 4),
         "pooled vector of ViTModel .*has 10 entries.*have 24.*`vision_pooling='mean'` or 'cls'"),
        (lambda: YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3,
                             use_mid_position_embeddings=False), ("mean", -1, 4),
         "The 20 tokens of YolosModel .*not known to be a grid"),
        (lambda: DeiTConfig(**SIZES), ("mean", -1, 4), "The 18 tokens of DeiTModel .*Set `vision_patch_tokens=0`"),
        (lambda: HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_query_pool=1,
                             masked_unit_size=[8, 8]), ("mean", 0, 4), "HieraModel .*not known to be a grid"),
        (lambda: HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], num_query_pool=1,
                             masked_unit_size=[8, 8]), ("mean", -1, 4), "HieraModel .*not known to be a grid"),
    ],
    ids=["too many", "no such layer", "narrow pooler", "detection tokens", "a second token", "another order",
         "units"],
)  # fmt: skip
def test_what_an_encoder_has_not_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        check_vision_model(encoder_of(make()), ImageVector(*options))


def test_refusals_reach_a_model_that_is_assembled(backbones):
    with pytest.raises(ValueError, match="`vision_feature_layer` is 9, but"):
        assemble(backbones, vision_pooling="cls", vision_feature_layer=9)


def test_an_encoder_without_tokens_is_refused():
    pixels = torch.rand(1, 3, 32, 32)
    encoder = encoder_of(VISION_CONFIGS["clip"]())
    bare = BaseModelOutputWithPooling(pooler_output=encoder(pixels).pooler_output)
    with pytest.raises(ValueError, match="`vision_patch_tokens` need the hidden states.*Set `vision_patch_tokens=0`"):
        ImageVector("pooler", -1, 4).of_output(bare, encoder, pixels)
    with pytest.raises(ValueError, match="gives no hidden states of its layers. Leave `vision_feature_layer` out"):
        ImageVector("mean", -2).of_output(bare, encoder, pixels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_patch_tokens": 5}, "must be 0 or a square number .*got 5"),
        ({"vision_patch_tokens": -4}, "must be 0 or a square number .*got -4"),
        ({"vision_feature_layer": -2}, "`vision_pooling='pooler'` reads no hidden state"),
        ({"projector_type": "resampler"}, "attends to patch tokens, and `vision_patch_tokens` is 0"),
        ({"resampler_num_layers": 3}, "must be 1 or 2, got 3"),
        ({"resampler_num_layers": 2, "projector_type": "mlp"}, "`projector_type='mlp'` has no such layers"),
        ({"vision_patch_tokens": 4, "num_image_tokens": 5}, "4 patch tokens .* make no 5 visual tokens"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FromageConfig(**fields)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`vision_feature_size` is 24, which is no multiple of 5"):
        FromageForConditionalGeneration(
            FromageConfig(
                vision_config=VISION_CONFIGS["clip"](), text_config=TEXT_CONFIGS["opt"](), vision_patch_tokens=4,
                vision_feature_size=24,
            )
        )  # fmt: skip
    model = make_model("opt_clip", vision_patch_tokens=4)
    for ask in (model.adapter.visual_tokens, model.adapter.image_embeds):
        with pytest.raises(ValueError, match="has 24 entries an image, and this model's images have 5 vectors of 24"):
            ask(torch.rand(2, 24))
