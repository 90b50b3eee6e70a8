"""What FROMAGe asks of its backbones, and what it refuses: the trials show both sides."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoConfig, AutoModel, ResNetConfig, SwinConfig, ViTMAEConfig

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.backbone_checks_fromage import (
    _decoder_that_gives,
    check_gradient_passes,
    measure_embedding_scale,
    measure_logit_transform,
)
from modeling_fromage.backbone_probes_fromage import ABILITIES, LENGTHS, TRAINING, Trial, has_ability
from modeling_fromage.backbones_fromage import attention_window
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.miniature_fromage import miniature
from modeling_fromage.vision_fromage import check_vision_model
from tests.helpers.backbones import PARITY, VISION_CONFIGS, make_model
from tests.helpers.batches import IMAGE, PAD, RET, interleaved, pad
from tests.helpers.lm_families import make_lm

GEMMA = Path(__file__).parents[1] / "fixtures" / "gemma_34f433a"
TAKES = {"mixtral": {*ABILITIES}, "opt": {*ABILITIES}, "mpt": {*ABILITIES} - {*TRAINING},
         "lfm2": {*ABILITIES} - {*TRAINING}, "bart": {"right padding", "a cache"},
         "minimax": {"right padding", "a cache"}, "rwkv": {"right padding"}}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(TAKES))
def test_abilities(family, dtype):
    """Of small weights and in bf16, too, where a leak moves little."""
    lm = make_lm(family, spread=0.1).to(dtype)
    state = torch.get_rng_state()
    assert {ability for ability in ABILITIES if has_ability(lm, ability)} == TAKES[family]
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_the_trial_shows_both_sides():
    """A mixture of experts moves by rounding; MPT's positions and LFM2's states move hidden states by 1e-2 and more."""

    class Largest(Trial):
        def agree(self, found, expected):
            self.largest = max(getattr(self, "largest", 0.0), ((found - expected).norm() / expected.norm()).item())
            return True

    for family, ability in (("mixtral", "cached prefixes"), ("mpt", "cached prefixes"), ("lfm2", "packed rows")):
        decoder = miniature(make_lm(family))
        embeds = torch.randn(3, max(LENGTHS) + 2, decoder.get_input_embeddings().weight.shape[-1])
        trial = Largest(decoder, embeds, tolerance=0.0, strict=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("modeling_fromage.backbone_probes_fromage.holds_attention_alone", lambda cache: True)
            ABILITIES[ability](trial)
        assert trial.largest < 1e-5 if family == "mixtral" else trial.largest > 1e-2, family


def test_trials_are_out_of_reach_of_autocast():
    lm = make_lm("opt")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert has_ability(lm, "packed rows")


def test_a_window_of_local_attention():
    config = AutoConfig.for_model("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=6)
    assert attention_window(config) == 6
    config = AutoConfig.for_model("gpt_neo", num_layers=2, attention_types=[[["global"], 2]], window_size=6)
    assert attention_window(config) == float("inf")


@pytest.mark.parametrize(
    ("family", "overrides", "scale", "cap"),
    [
        ("opt", {}, 1.0, None),
        ("mpt", {"logit_scale": 0.5}, 1.0, None),  # which the LM does not look at
        ("falcon_h1", {"lm_head_multiplier": 0.05}, 0.05, None),
        ("minicpm3", {}, 0.5, None),
        ("cohere", {}, 0.25, None),
        ("gemma2", {"final_logit_softcapping": 20.0}, 1.0, 20.0),
        ("recurrent_gemma", {"logits_soft_cap": 7.0}, 1.0, 7.0),
        ("xlstm", {}, 1.0, 30.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_transform_is_measured(family, overrides, scale, cap, dtype):
    transform = measure_logit_transform(make_lm(family, spread=0.1, **overrides).to(dtype))
    logits = torch.linspace(-200, 200, 9)
    expected = logits * scale
    expected = cap * torch.tanh(expected / cap) if cap else expected
    torch.testing.assert_close(transform(logits), expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_of_more_than_a_matrix_are_refused(family):
    vision = AutoModel.from_config(VISION_CONFIGS["clip"]())
    lm = make_lm(family)
    config = FromageConfig.from_vision_text_configs(vision.config, lm.config)
    with pytest.raises(ValueError, match=f"{type(lm).__name__} makes its logits in a way"):
        FromageForConditionalGeneration(config, lm, vision)
    with pytest.raises(ValueError, match="makes its logits in a way"):
        FromageForConditionalGeneration(config)


@pytest.mark.parametrize("family", ["gemma", "xglm", "biogpt", "bigbird_pegasus", "minicpm3", "opt"])
def test_embedding_scale_is_measured_and_saved(family, tmp_path):
    lm = make_lm(family)
    expected = {"minicpm3": 12.0, "opt": 1.0}.get(family, 32**0.5)
    assert measure_embedding_scale(lm) == pytest.approx(expected, rel=1e-6)
    vision = AutoModel.from_config(VISION_CONFIGS["clip"]())
    config = FromageConfig.from_vision_text_configs(vision.config, lm.config, image_token_id=96, ret_token_id=97)
    model = FromageForConditionalGeneration(config, lm, vision)
    ids = torch.tensor([[5, 97]])
    embeds = model.frozen_lm().embed(ids)
    torch.testing.assert_close(embeds, lm.get_input_embeddings()(ids))  # `[RET]` starts as the LM's own row 97
    model.save_pretrained(tmp_path)
    again = FromageForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.ret_embedding_scale == model.config.ret_embedding_scale
    torch.testing.assert_close(again.frozen_lm().embed(ids), embeds)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["whole", "trained parts"])
def test_a_gemma_checkpoint_from_before_keeps_its_numbers(kind, tmp_path):
    model = FromageForConditionalGeneration.from_pretrained(GEMMA)
    if kind == "trained parts":
        model.language_model.save_pretrained(tmp_path / "lm")
        model.vision_model.save_pretrained(tmp_path / "vision")
        model.config.text_model_id, model.config.vision_model_id = str(tmp_path / "lm"), str(tmp_path / "vision")
        model.save_pretrained(tmp_path / "model", save_backbones=False)
        saved = json.loads((tmp_path / "model" / "config.json").read_text())
        del saved["ret_embedding_scale"]  # as before
        (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
        model = FromageForConditionalGeneration.from_pretrained(tmp_path / "model")
    expected = load_file(GEMMA / "expected.safetensors")
    inputs = {"input_ids": expected["input_ids"], "pooled_image_features": expected["pooled"]}
    torch.testing.assert_close(model(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.get_text_embeds(**inputs), expected["text_embeds"], rtol=1e-5, atol=1e-6)
    assert model.config.ret_embedding_scale == 1.0


def vit_mae(**kwargs):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModel.from_config(ViTMAEConfig(image_size=32, patch_size=8, **sizes, **kwargs)).eval()


def test_an_encoder_that_masks_at_random_is_refused():
    lm, vision = make_lm("opt"), vit_mae()
    config = FromageConfig.from_vision_text_configs(vision.config, lm.config, vision_pooling="mean")
    with pytest.raises(ValueError, match="ViTMAEModel gives one image other features each time.*mask_ratio=0"):
        FromageForConditionalGeneration(config, lm, vision)
    for pooling in ("mean", "cls"):
        check_vision_model(vit_mae(mask_ratio=0.0), ImageVector(pooling))


def test_what_is_random_in_an_encoder_can_be_switched_off(tmp_path):
    case = PARITY / "case_a_opt_tied"
    folder = tmp_path / "vision"
    vit_mae().save_pretrained(folder)
    preprocessor = (case / "vision_model" / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(preprocessor)
    paths, pixels = (str(folder), str(case / "language_model")), torch.rand(1, 3, 32, 32)
    assemble = FromageForConditionalGeneration.from_vision_text_pretrained
    with pytest.raises(ValueError, match="vision_mask_ratio=0.0"):
        assemble(*paths, vision_pooling="mean")
    model = assemble(*paths, vision_pooling="mean", vision_mask_ratio=0.0)
    model.save_pretrained(tmp_path / "model", save_backbones=False)
    again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model")
    features = model.get_pooled_image_features(pixels)
    torch.testing.assert_close(again.get_pooled_image_features(pixels), features)


class Rounding(nn.Linear):
    """Quantises its input, as torchao's dynamic activations do: rounding has no gradient."""

    def forward(self, inputs):
        return nn.functional.linear((inputs * 16).round() / 16, self.weight, self.bias)


@pytest.mark.parametrize("kind", [Rounding, type("Plain", (nn.Linear,), {})])
def test_a_layer_that_loses_the_gradient_is_refused_for_training(kind):
    model = make_model("opt_clip")
    for layer in model.language_model.get_decoder().layers:
        layer.fc1.__class__ = kind
    ids = torch.tensor([[2, 5, 6, RET]])
    batch = {"retrieval_input_ids": ids, "pooled_image_features": torch.randn(1, 24)}
    model(**batch)
    model.get_text_embeds(ids)
    model.train()
    if kind is Rounding:
        with pytest.raises(ValueError, match="Rounding layers of OPTForCausalLM.* lose the gradient"):
            model(**batch)
    else:
        model(**batch).loss.backward()


@torch.no_grad()
def test_images_and_embeddings_together(model):
    rows, images = interleaved(model)
    batch = pad(rows, "right")
    expected = model(**batch, pixel_values=images).logits
    embeds = model.frozen_lm().embed(batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 0))
    found = model(**batch, inputs_embeds=embeds, pixel_values=images).logits
    assert torch.equal(found, expected)
    mask = batch["attention_mask"]
    with pytest.raises(ValueError, match="`inputs_embeds` alone do not tell where the images go"):
        model(inputs_embeds=embeds, attention_mask=mask, pixel_values=images)
    with pytest.raises(ValueError, match="`inputs_embeds` alone do not tell"):
        model.generate(inputs_embeds=embeds, attention_mask=mask, pixel_values=images, max_new_tokens=1)


@torch.no_grad()
def test_assistance_with_images(model):
    rows, images = interleaved(model)
    ids, options = torch.tensor([rows[0]]), {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": PAD}
    expected = model.generate(ids, pixel_values=images[:2], do_sample=False, **options)
    found = model.generate(ids, pixel_values=images[:2], do_sample=False, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="drafts without the images.*prompt_lookup_num_tokens"):
        model.generate(ids, pixel_values=images[:2], assistant_model=model, **options)


@pytest.mark.parametrize("training", [True, False])
def test_labels_that_are_shifted_already(model, training):
    model.train(training)
    rows, images = interleaved(model)
    batch = {**pad(rows, "right"), "pixel_values": images}
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE), -100)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(**batch, labels=labels, shift_labels=shifted).loss, expected)
    shifted[1, -1] = 7  # a target of the last token, as in a part of a longer text
    assert model(**batch, shift_labels=shifted).loss != expected
    with pytest.raises(ValueError, match="Expected one label a token"):
        model(**batch, shift_labels=labels[:, 1:])


@torch.no_grad()
def test_measuring_the_head_disturbs_no_other_thread(tmp_path):
    lm, ids = make_lm("opt"), torch.tensor([[2, 5, 6]])
    expected = lm(ids).logits
    with _decoder_that_gives(lm, torch.zeros(1, 2, 32)), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lm, ids).result().logits, expected)
        assert lm(ids[:, :2]).logits.abs().max() == 0
    assert torch.equal(lm(ids).logits, expected)
    make_model("opt_clip").save_pretrained(tmp_path)
    loaded = FromageForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.traits.logit_transform is not None  # before its first use


def test_trials_know_no_dropout():
    model = make_model("opt_clip")
    target = r"language_model\..*\.(q_proj|v_proj)"
    model.add_adapter(
        LoraConfig(target_modules=target, modules_to_save=["adapter"], lora_dropout=0.5, init_lora_weights=False)
    )
    model.train()
    state, training = torch.get_rng_state(), [module.training for module in model.modules()]
    assert model.frozen_lm().takes("packed rows")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training


def test_trials_do_not_know_the_callers_default_dtype():
    lm = make_lm("opt")
    torch.set_default_dtype(torch.float64)
    try:
        assert {ability for ability in ABILITIES if has_ability(lm, ability)} == TAKES["opt"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_live_backbones_in_training_mode_are_left_as_they_are():
    """A trial in training mode would change batch statistics, and find stochastic depth at random."""
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    swin = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
                      drop_path_rate=0.5)  # fmt: skip
    for vision_config in (resnet, swin):
        lm, vision = make_lm("opt"), AutoModel.from_config(vision_config)
        assert vision.training
        before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
        config = FromageConfig.from_vision_text_configs(vision.config, lm.config, image_token_id=96, ret_token_id=97)
        FromageForConditionalGeneration(config, lm, vision)
        assert all(torch.equal(tensor, before[name]) for name, tensor in vision.state_dict().items())


@pytest.mark.parametrize("tried_before", [True, False])
@torch.no_grad()
def test_padding_in_compiled_code(tried_before):
    """Bart's decoder takes no padding on the left."""
    lm, vision = make_lm("bart", spread=6.0), AutoModel.from_config(VISION_CONFIGS["clip"]())
    config = FromageConfig.from_vision_text_configs(vision.config, lm.config, image_token_id=96, ret_token_id=97)
    model = FromageForConditionalGeneration(config, lm, vision).eval()
    rows = [[2, 5, 6, 7, 8], [2, 9]]
    expected = model(torch.tensor(rows[1:])).logits
    if tried_before:
        model(**pad(rows, "left"))
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(**pad(rows, "left")).logits[1:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Quantised(nn.Linear):
    """One class for both, as torchao's `Int8Tensor` is."""

    rounds = False

    def forward(self, inputs):
        return Rounding.forward(self, inputs) if self.rounds else super().forward(inputs)


class Router(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).softmax(-1)


class TupleRouter(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).topk(2)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_weights_that_are_no_parameters():
    """Parametrised, pruned and FSDP's flat modules compute the weight that they show."""
    model, ids = make_model("llama_clip"), torch.tensor([[2, 5, 6, RET]])
    backbones = model.language_model, model.vision_model
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        register_parametrization(module, "weight", Doubled())
    model = FromageForConditionalGeneration(model.config, *backbones).eval()
    logits = model(input_ids=ids).logits[..., :IMAGE]
    torch.testing.assert_close(logits[:, :-1], model.language_model(input_ids=ids[:, :-1]).logits)
    row = model.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(model.adapter.ret_embedding.weight[0], row)
    model.normalize_ret_embedding()


class PackedLinear(nn.Module):
    """As torch's dynamically quantised layers: its weight is asked for by a call."""

    def weight(self):
        raise NotImplementedError


def test_a_head_whose_weight_is_packed_is_refused():
    model = make_model("llama_clip")
    model.language_model.set_output_embeddings(PackedLinear())
    with pytest.raises(ValueError, match="PackedLinear'> keeps its weight packed"):
        FromageForConditionalGeneration(model.config, model.language_model, model.vision_model)


def test_every_layer_is_asked_for_its_gradient():
    lm = make_lm("opt")
    first, *_, last = lm.get_decoder().layers
    first.fc1.__class__ = last.fc1.__class__ = Quantised
    lm.get_decoder().routers = nn.ModuleList([Router(32, 4), TupleRouter(32, 4)])  # not linear: let through
    check_gradient_passes(lm)
    first.fc1.rounds = True
    with pytest.raises(ValueError, match="Quantised layers of OPTForCausalLM.* lose the gradient"):
        check_gradient_passes(lm)


def test_texts_beyond_a_window_that_no_trial_reaches():
    """Packed rows have masks without a window: longer texts take the ordinary pass, though the trials went well."""
    lm, vision = make_lm("mistral", spread=6.0, sliding_window=16), AutoModel.from_config(VISION_CONFIGS["clip"]())
    config = FromageConfig.from_vision_text_configs(vision.config, lm.config, image_token_id=96, ret_token_id=97,
                                                    tie_ret_embedding=False)  # fmt: skip
    model = FromageForConditionalGeneration(config, lm, vision).train()
    assert model.frozen_lm().takes("packed rows")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(model(ids, labels=ids).captioning_loss, expected, rtol=1e-5, atol=0)
    texts = torch.cat([ids, torch.tensor([[97]])], dim=1)
    found = model(retrieval_input_ids=texts, pooled_image_features=torch.randn(1, 24)).text_embeds
    torch.testing.assert_close(found, model.get_text_embeds(texts), rtol=1e-4, atol=1e-5)


def test_an_lm_that_takes_no_padding_sees_none():
    model = make_model("opt_clip").train()
    texts = pad([[2, 5, 6, 7, RET], [2, 8, RET], [2, 9, 10, 11, RET]], "right")
    batch = {f"retrieval_{name}": value for name, value in texts.items()}
    batch["pooled_image_features"] = torch.randn(3, 24)
    expected, masks = model(**batch), []
    for ability in ("packed rows", "cached prefixes", "left padding", "right padding"):
        model.traits.abilities["sdpa", ability] = False
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    found = model(**batch)
    assert [tuple(mask.shape) for mask in masks] == [(1, 3), (2, 5)] and all(bool(mask.all()) for mask in masks)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds)


def test_an_adapter_on_trained_layers_is_restored(tmp_path):
    def with_adapter():
        model = make_model("opt_clip")
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "multi_modal_projector"], init_lora_weights=False))
        return model

    model, other = with_adapter(), with_adapter()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    other.restore_adapter(tmp_path)
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(other.adapter.state_dict()[name], tensor), name
