"""Saving and loading: trained parts alone and self-contained checkpoints, their errors, and code that travels along."""

import copy
import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPVisionConfig,
    OPTConfig,
)

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, FromagePipeline, FromageProcessor
from tests.helpers.backbones import PARITY, TEXT_CONFIGS
from tests.helpers.checkpoints import TRAINED_KEYS, assemble, assert_equal, edit, keys_of, outputs, saved_both_ways
from tests.helpers.quantization import ToFp8Config
from tests.helpers.strangers import ask_stranger


@pytest.mark.parametrize("save_backbones", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_round_trip(backbones, tmp_path, save_backbones, dtype, max_shard_size):
    model, _ = assemble(backbones, dtype=dtype)
    model.generation_config.ret_bias = 1.5
    expected = outputs(model)
    folder = tmp_path / "model"
    model.save_pretrained(folder, save_backbones=save_backbones, max_shard_size=max_shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (save_backbones and max_shard_size == "100KB")
    assert (keys_of(folder) == TRAINED_KEYS) != save_backbones
    assert str(tmp_path) not in (folder / "config.json").read_text()  # no path of this machine
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        again = auto_class.from_pretrained(folder)
        assert_equal(outputs(again), expected)
        assert again.adapter.logit_scale.dtype == torch.float32 and again.dtype == dtype
        assert again.generation_config.ret_bias == 1.5 and not again.training
        assert {n for n, p in again.named_parameters() if p.requires_grad} == TRAINED_KEYS
    again.save_pretrained(folder)  # over itself
    assert_equal(outputs(AutoModel.from_pretrained(folder)), expected)


def test_each_backbone_keeps_its_dtype(backbones, tmp_path):
    model, _ = assemble(backbones, text_dtype=torch.bfloat16, vision_dtype=torch.float32)
    expected = outputs(model)
    for folder, whole in ((tmp_path / "parts", False), (tmp_path / "whole", True)):
        model.save_pretrained(folder, save_backbones=whole)
        again = AutoModel.from_pretrained(folder)
        assert (again.language_model.dtype, again.vision_model.dtype) == (torch.bfloat16, torch.float32)
        assert_equal(outputs(again), expected)
        cast = AutoModel.from_pretrained(folder, dtype=torch.float16)
        assert cast.language_model.dtype == cast.vision_model.dtype == torch.float16
        assert cast.adapter.logit_scale.dtype == torch.float32


def test_trained_parts_in_bfloat16(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "model", adapter_dtype="bfloat16")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    again = AutoModel.from_pretrained(tmp_path / "model")
    for name, value in model.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], value.bfloat16().float())
        assert torch.equal(value, model.adapter.state_dict()[name])


def test_size_of_the_papers_trained_parts(tmp_path):
    """OPT-6.7B's and ViT-L/14's widths, without their layers: 5,513,729 trained parameters at k = 1 (section 4)."""
    text = OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=8, num_hidden_layers=1, num_attention_heads=32,
                     vocab_size=64, max_position_embeddings=8)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=8, num_hidden_layers=1, num_attention_heads=16)
    model = FromageForConditionalGeneration(FromageConfig.from_vision_text_configs(vision, text))
    model.config.text_model_id, model.config.vision_model_id = "facebook/opt-6.7b", "openai/clip-vit-large-patch14"
    model.config.text_model_fingerprint = model.config.vision_model_fingerprint = {}
    assert model.num_parameters(only_trainable=True) == 5_513_729
    for dtype, limit in (("bfloat16", 11.1e6), ("float32", 22.1e6)):
        model.save_pretrained(tmp_path, adapter_dtype=dtype)
        assert keys_of(tmp_path) == TRAINED_KEYS
        assert 0.99 * limit < (tmp_path / "model.safetensors").stat().st_size <= limit


def test_placement_and_attention(backbones, tmp_path):
    model, _ = assemble(backbones)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "model")
    decoder = "language_model.model.decoder"
    parts = ("embed_tokens", "embed_positions", "final_layer_norm", "layers.1")
    device_map = {f"{decoder}.{name}": "cpu" for name in parts} | {
        "language_model.lm_head": "cpu",
        "vision_model": "cpu",
    }
    device_map |= {f"{decoder}.layers.0": "disk", f"{decoder}.layers.2": "disk"}
    offloaded = AutoModel.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    assert offloaded.hf_device_map[f"{decoder}.layers.0"] == "disk"
    for name, value in outputs_offloaded(offloaded).items():
        torch.testing.assert_close(value, expected[name])
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model", device_map=device_map)), expected)
    attention = {"text_config": "eager", "vision_config": "sdpa"}
    eager = AutoModel.from_pretrained(tmp_path / "model", attn_implementation=attention)
    assert eager.language_model.config._attn_implementation == "eager"
    assert eager.vision_model.config._attn_implementation == "sdpa"


def outputs_offloaded(model):
    ids = torch.tensor([[500, 500, 2, 5, 6, 501], [2, 7, 500, 500, 8, 501]])
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        return {"logits": model(input_ids=ids, pixel_values=pixels).logits}


@pytest.mark.parametrize("save_backbones", [False, True])
def test_quantization_is_the_language_models_alone(backbones, tmp_path, save_backbones):
    model, _ = assemble(backbones)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "model", save_backbones=save_backbones)
    quantized = AutoModel.from_pretrained(tmp_path / "model", quantization_config=ToFp8Config())
    assert quantized.language_model.is_quantized
    assert not hasattr(quantized, "hf_quantizer")  # for the Trainer, which refuses to train quantised models
    assert {n for n, p in quantized.named_parameters() if p.requires_grad} == TRAINED_KEYS
    weight = quantized.language_model.model.decoder.layers[0].fc1.weight
    assert torch.equal(weight, model.language_model.model.decoder.layers[0].fc1.weight.to(torch.float8_e4m3fn).float())
    found = outputs(quantized)
    assert torch.equal(found["image_embeds"], expected["image_embeds"])
    assert not torch.equal(found["text_embeds"], expected["text_embeds"])
    if not save_backbones:
        quantized.save_pretrained(tmp_path / "again")
        assert "quantization" not in (tmp_path / "again" / "config.json").read_text()
        assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "again")), expected)


def test_configuration_overrides(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model", contrastive_loss_weight=0.5)
    assert again.config.contrastive_loss_weight == 0.5
    again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model", text_config={"attention_dropout": 0.5})
    assert again.language_model.config.attention_dropout == 0.5
    with pytest.raises(ValueError, match="unknown arguments.*colour"):
        FromageForConditionalGeneration.from_pretrained(tmp_path / "model", colour="red")


@pytest.mark.parametrize("save_backbones", [False, True])
def test_trained_tensors_must_be_the_models_own(backbones, tmp_path, save_backbones):
    folder = tmp_path / "model"
    name = "adapter.visual_projection.bias"
    cases = [
        (lambda tensors: tensors.pop(name), f"{name}"),
        (lambda tensors: tensors.update({"adapter.colour": torch.ones(1)}), "adapter.colour"),
        (lambda tensors: tensors.update({name: torch.ones(3)}), rf"{name} .*\(3,\), not \(16,\)"),
    ]
    for change, message in cases:
        assemble(backbones)[0].save_pretrained(folder, save_backbones=save_backbones)
        edit(folder / "model.safetensors", change)
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("save_backbones", [False, True])
def test_trained_tensors_must_be_finite(backbones, tmp_path, save_backbones, value):
    folder = tmp_path / "model"
    assemble(backbones)[0].save_pretrained(folder, save_backbones=save_backbones)
    name = "adapter.visual_projection.bias"
    edit(folder / "model.safetensors", lambda tensors: tensors[name].__setitem__(3, value))
    with pytest.raises(ValueError, match=f"{folder} hold NaN or infinite values: {name}"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_file_modes_are_the_users(backbones, tmp_path, umask):
    model, processor = assemble(backbones)
    with_peft = copy.deepcopy(model)
    with_peft.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["adapter"]))
    previous = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "parts")
        model.save_pretrained(tmp_path / "whole", save_backbones=True, max_shard_size="100KB")
        with_peft.save_pretrained(tmp_path / "peft")
        FromagePipeline(model=model, processor=processor).save_pretrained(tmp_path / "pipeline")
    finally:
        os.umask(previous)
    for folder in ("parts", "whole", "peft", "pipeline"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert any(name.endswith(".safetensors") for name in modes)
        assert set(modes.values()) == {0o666 & ~umask}, modes


def test_missing_backbone_weights_are_refused(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "whole", save_backbones=True)
    key = "language_model.model.decoder.layers.0.fc1.weight"
    edit(tmp_path / "whole" / "model.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match="lacks.*layers.0.fc1.weight"):
        AutoModel.from_pretrained(tmp_path / "whole")


def test_another_backbone_under_the_same_name_is_refused(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    weights = backbones / "language_model" / "model.safetensors"
    original = weights.read_bytes()

    edit(weights, lambda tensors: tensors["model.decoder.layers.1.fc1.weight"].mul_(2))
    with pytest.raises(ValueError, match="language model.*other contents.*text_model_fingerprint"):
        AutoModel.from_pretrained(tmp_path / "model")
    AutoModel.from_pretrained(tmp_path / "model", text_model_fingerprint={})  # by one who knows

    weights.write_bytes(original)
    AutoModel.from_pretrained(tmp_path / "model")
    config = TEXT_CONFIGS["opt"]()
    config.vocab_size = 600
    AutoModelForCausalLM.from_config(config).save_pretrained(backbones / "language_model")
    with pytest.raises(ValueError, match="vocab_size is 600, not 512.*text_model_id"):
        AutoModel.from_pretrained(tmp_path / "model")

    shutil.rmtree(backbones / "language_model")
    with pytest.raises(ValueError, match="needs the language model in the folder ../backbones/language_model"):
        AutoModel.from_pretrained(tmp_path / "model")
    moved = shutil.copytree(PARITY / "case_a_opt_tied" / "language_model", tmp_path / "moved")
    AutoModel.from_pretrained(tmp_path / "model", text_model_id=str(moved))


@pytest.mark.parametrize("folder", ["language_model/checkpoint", ".cache/model", ".", "language_model/runs/1"])
def test_backbones_above_below_and_in_hidden_folders(backbones, tmp_path, folder):
    """Paths such as "..", "./.hidden" and "." are paths, and not names of repositories."""
    hidden = shutil.copytree(backbones / "vision_model", backbones / ".cache" / "model" / ".vision")
    names = str(hidden), str(backbones / "language_model")
    processor = FromageProcessor.from_vision_text_pretrained(*names, num_image_tokens=2)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(*names, processor=processor)
    model.save_pretrained(backbones / folder, save_backbones=False)
    assert keys_of(backbones / folder) == TRAINED_KEYS
    assert_equal(outputs(AutoModel.from_pretrained(backbones / folder)), outputs(model))


def test_far_backbones_are_saved_too_unless_told(backbones, tmp_path, caplog):
    model, _ = assemble(backbones)
    near, far = tmp_path / "run" / "checkpoint-10", tmp_path / "a" / "b" / "c"
    model.save_pretrained(near)
    assert keys_of(near) == TRAINED_KEYS
    model.save_pretrained(far)
    assert keys_of(far) > TRAINED_KEYS and "does not lie beside" in caplog.text
    model.save_pretrained(far, save_backbones=False)
    assert keys_of(far) == TRAINED_KEYS
    assert json.loads((far / "config.json").read_text())["text_model_id"] == "../../../backbones/language_model"
    assert_equal(outputs(AutoModel.from_pretrained(far)), outputs(model))
    model.config.text_model_id = None
    model.save_pretrained(near)
    assert keys_of(near) > TRAINED_KEYS
    with pytest.raises(ValueError, match="not known where the language model came from"):
        model.save_pretrained(near, save_backbones=False)
    with pytest.raises(ValueError, match="not on the Hub"):
        model.push_to_hub("org/fromage")


def test_a_failed_save_leaves_the_old_checkpoint(backbones, tmp_path, monkeypatch):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model.adapter.logit_scale.data += 1

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert model.config.text_model_id == str(backbones / "language_model")  # the live model is as it was


@pytest.mark.parametrize("save_backbones", [False, True])
def test_loads_where_the_package_is_not_installed(backbones, tmp_path, save_backbones):
    from PIL import Image

    model, processor = assemble(backbones)
    model.save_pretrained(tmp_path / "model", save_backbones=save_backbones)
    processor.save_pretrained(tmp_path / "model")
    outputs(model)  # aligns its weights
    image = Image.new("RGB", (40, 30), "red")
    inputs = AutoProcessor.from_pretrained(tmp_path / "model")(
        text="<|image|>a cat[RET]", images=image, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs).logits, model.get_text_embeds(**inputs)
    for logits, embeds in ask_stranger(tmp_path / "model", tmp_path):
        assert torch.equal(logits, expected[0]) and torch.equal(embeds, expected[1])
    again = ask_stranger(tmp_path / "model-again", tmp_path)  # saved by the stranger
    assert torch.equal(again[0][0], expected[0])
    assert AutoConfig.from_pretrained(tmp_path / "model-again").model_type == "fromage"


@pytest.mark.parametrize("part", ["adapter", "language_model", "vision_model"])
def test_a_part_that_is_compiled(backbones, tmp_path, part):
    model, processor = assemble(backbones)
    expected, state = outputs(model), copy.deepcopy(model.state_dict())
    setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
    for _, again in saved_both_ways(model, processor, tmp_path):
        assert_equal(outputs(again), expected)
    torch.nn.init.zeros_(model.adapter.ret_embedding.weight)
    model.load_state_dict({name: value for name, value in state.items() if name in TRAINED_KEYS}, strict=False)
    assert_equal({"found": model.adapter.ret_embedding.weight}, {"found": again.adapter.ret_embedding.weight})
    model.load_state_dict(model.state_dict())
