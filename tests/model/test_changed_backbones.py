"""Backbones that are no longer as their files: merged LoRA, trained or edited weights. Written whole, or refused."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.helpers.checkpoints import TRAINED_KEYS, assemble, assert_equal, edit, keys_of, outputs
from tests.helpers.quantization import ToFp8Config

TARGETS = r"language_model\..*\.(q_proj|v_proj)"


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("modeling_fromage")]


def merge_lora(model, **kwargs):
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **kwargs))
    assert peft_model.merge_and_unload() is model


def merge_tokens(model):
    name = "language_model.model.decoder.embed_tokens"
    config = LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices={name: [7]})
    peft_model = get_peft_model(model, config)
    deltas = [p for n, p in peft_model.named_parameters() if "trainable_tokens_delta" in n]
    deltas[0].data += 0.5
    peft_model.merge_and_unload()


def train_a_step(model):
    weight = model.language_model.model.decoder.layers[0].fc1.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    model.get_text_embeds(torch.tensor([[2, 5, 6, 501]])).sum().backward()
    optimizer.step()
    weight.requires_grad_(False)


def edit_one_row(model):
    model.get_input_embeddings().weight.data[5] = 0  # leaves no trace in `_version`


def edit_one_vision_weight(model):
    model.vision_model.state_dict()["embeddings.class_embedding"].data[3] += 0.25


def fc1(model) -> torch.Tensor:
    return model.language_model.model.decoder.layers[0].fc1.weight.data


def swap_rows(model):
    fc1(model)[[3, 5]] = fc1(model)[[5, 3]]


def negate_a_column(model):
    fc1(model)[:, 3].neg_()


CHANGES = {
    "swap": swap_rows,
    "signs": negate_a_column,
    "lora": merge_lora,
    "dora": lambda model: merge_lora(model, use_dora=True),
    "tokens": merge_tokens,
    "step": train_a_step,
    "row": edit_one_row,
    "vision": edit_one_vision_weight,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_written(backbones, tmp_path, caplog, change, dtype):
    model, _ = assemble(backbones, dtype=dtype)
    model.save_pretrained(tmp_path / "before")
    assert keys_of(tmp_path / "before") == TRAINED_KEYS and not warnings(caplog)
    CHANGES[change](model)
    role = "vision model" if change == "vision" else "language model"
    with pytest.raises(ValueError, match=f"the {role} has other weights than .*save_backbones=True"):
        model.save_pretrained(tmp_path / "model", save_backbones=False)
    expected = outputs(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "model")
    assert f"The {role} has other weights" in caplog.text
    assert keys_of(tmp_path / "model") > TRAINED_KEYS
    shutil.rmtree(backbones)  # it stands by itself
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model")), expected)


def test_a_change_before_the_first_save_is_noticed(backbones, tmp_path):
    model, _ = assemble(backbones)
    merge_lora(model)
    model.save_pretrained(tmp_path / "model")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model")), outputs(model))


def test_an_adapter_that_is_merged_for_a_while_is_not_saved_twice(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    expected = outputs(copy.deepcopy(model).eval())
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.merge(safe_merge=True)
    with pytest.raises(ValueError, match="merged into the weights that they wrap.*unmerge"):
        model.save_pretrained(tmp_path / "model")
    for layer in layers:
        layer.unmerge()
    model.save_pretrained(tmp_path / "model")
    for name, value in outputs(AutoModel.from_pretrained(tmp_path / "model")).items():
        assert torch.allclose(value, expected[name], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_false_alarm_where_files_hold_several_dtypes(backbones, tmp_path, caplog, dtype):
    def mix(tensors):
        for i, (name, tensor) in enumerate(sorted(tensors.items())):
            tensors[name] = tensor.bfloat16() if i % 2 else tensor + 1e-5

    edit(backbones / "language_model" / "model.safetensors", mix)
    path = backbones / "language_model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    model, _ = assemble(backbones, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    assert keys_of(tmp_path / "model") == TRAINED_KEYS and not warnings(caplog)
    fc1(model)[3, 3] += 0.25
    model.save_pretrained(tmp_path / "model")
    assert keys_of(tmp_path / "model") > TRAINED_KEYS


def test_weights_that_require_gradient_are_written(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.language_model.model.decoder.layers[0].requires_grad_(True)
    with pytest.raises(ValueError, match="language model is being trained: 16 of its parameters"):
        model.save_pretrained(tmp_path / "model", save_backbones=False)
    model.save_pretrained(tmp_path / "model")
    assert keys_of(tmp_path / "model") > TRAINED_KEYS


UNCHANGED = {
    "as loaded": lambda model: model,
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "bfloat16, then half": lambda model: model.bfloat16().half(),
    "to": lambda model: model.to("cpu", torch.float16),
    "tied again": lambda model: model.tie_weights() or model,
    "copied": lambda model: copy.deepcopy(model),
    "in memory of its own": lambda model: outputs(model) and model,
    "trained beside": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("use", UNCHANGED)
def test_no_false_alarm(backbones, tmp_path, caplog, use):
    pooling = "cls" if use == "as loaded" else "pooler"  # with which the encoder's own pooler is not in use
    model, _ = assemble(backbones, vision_pooling=pooling)
    model = UNCHANGED[use](model)
    state = torch.random.get_rng_state()
    model.save_pretrained(tmp_path / "model", save_backbones=False)
    assert torch.equal(torch.random.get_rng_state(), state)  # saving must not change what a run draws next
    AutoModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert keys_of(tmp_path / "again") == TRAINED_KEYS and not warnings(caplog)


def test_no_false_alarm_where_weights_are_offloaded_or_quantized(backbones, tmp_path, caplog):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    device_map = {"language_model": "cpu", "vision_model": "disk"}
    offloaded = AutoModel.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    offloaded.save_pretrained(tmp_path / "offloaded")
    quantized = AutoModel.from_pretrained(tmp_path / "model", quantization_config=ToFp8Config())
    quantized.save_pretrained(tmp_path / "quantized")
    assert keys_of(tmp_path / "offloaded") == keys_of(tmp_path / "quantized") == TRAINED_KEYS and not warnings(caplog)
    merge_lora(quantized)
    with pytest.raises(ValueError, match="has other weights than when it was loaded"):
        quantized.save_pretrained(tmp_path / "quantized", save_backbones=False)
    quantized.language_model.model.decoder.layers[0].fc1.weight.data = torch.zeros(64, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="neither by reference nor whole"):
        quantized.save_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize("saved_before", [False, True])
@pytest.mark.parametrize("fate", ["gone", "other contents"])
def test_files_that_are_no_longer_those_that_were_loaded(backbones, tmp_path, fate, saved_before):
    model, _ = assemble(backbones)
    expected = outputs(model)
    if saved_before:
        model.save_pretrained(tmp_path / "model")
    folder = backbones / "language_model"
    tensors = load_file(folder / "model.safetensors")
    shutil.rmtree(folder) if fate == "gone" else save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="the language model .*save_backbones=True"):
        model.save_pretrained(tmp_path / "model", save_backbones=False)
    model.save_pretrained(tmp_path / "model")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model")), expected)


def test_lora_that_save_pretrained_cannot_write_is_refused(backbones, tmp_path):
    model, _ = assemble(backbones)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.language_model = get_peft_model(model.language_model, config)
    with pytest.raises(ValueError, match="it would be lost.*merge_and_unload"):
        model.save_pretrained(tmp_path / "model")
    expected = outputs(copy.deepcopy(model))
    model.language_model = model.language_model.merge_and_unload()
    model.save_pretrained(tmp_path / "model")
    found = outputs(AutoModel.from_pretrained(tmp_path / "model"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("backbone_too", [False, True])
def test_add_adapter_without_a_copy_of_the_trained_parts(backbones, tmp_path, backbone_too):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.freeze_backbones()  # LoRA and the trained parts are trained side by side
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    if backbone_too:
        edit_one_row(model)
    expected = outputs(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "lora")
    assert (keys_of(tmp_path / "lora") & {"language_model.model.decoder.embed_tokens.weight"} != set()) == backbone_too
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "lora")), expected)
