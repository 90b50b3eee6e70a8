"""PEFT on the language model beside the trained parts, through peft and through transformers' own `add_adapter`."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Trainer, TrainingArguments

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, NormalizeRetEmbeddingCallback
from modeling_fromage.training_losses_fromage import ordinary_pass, why_not_ret_only
from tests.helpers.checkpoints import assemble, assert_equal, outputs

TARGETS = r"language_model\..*\.(q_proj|v_proj)"


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["adapter"], init_lora_weights="gaussian")


def train(model, processor, tmp_path):
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", remove_unused_columns=False, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=data, data_collator=FromageDataCollator(processor),
            callbacks=[NormalizeRetEmbeddingCallback()]).train()  # fmt: skip


def is_trained(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


@pytest.fixture
def checkpoint(backbones, tmp_path):
    model, processor = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", processor


def test_get_peft_model(checkpoint, tmp_path):
    folder, processor = checkpoint
    peft_model = get_peft_model(FromageForConditionalGeneration.from_pretrained(folder), lora())
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    train(peft_model, processor, tmp_path)
    for name, value in peft_model.state_dict().items():
        assert torch.equal(value, before[name]) != is_trained(name), name
    ret = peft_model.base_model.model.adapter.ret_embedding.weight  # through the wrapper: the trained copy
    assert ret.requires_grad and ret.norm().item() == pytest.approx(
        peft_model.base_model.model.traits.mean_row_norm, rel=1e-5
    )
    expected = outputs(peft_model.eval().base_model.model)
    peft_model.save_pretrained(tmp_path / "lora")
    assert {path.name for path in (tmp_path / "lora").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size < 60_000  # no backbones
    again = PeftModel.from_pretrained(FromageForConditionalGeneration.from_pretrained(folder), tmp_path / "lora")
    assert_equal(outputs(again.base_model.model), expected)
    # An index that was made under PEFT is the merged model's too.
    fingerprint = again.base_model.model.retrieval_fingerprint()
    assert fingerprint == again.merge_and_unload().retrieval_fingerprint()
    assert fingerprint != FromageForConditionalGeneration.from_pretrained(folder).retrieval_fingerprint()
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "lora")), expected)


def test_add_adapter(checkpoint, tmp_path):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    model.add_adapter(lora())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, processor, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != is_trained(name), name
    expected = outputs(model.eval())
    model.save_pretrained(tmp_path / "lora")
    again = FromageForConditionalGeneration.from_pretrained(folder)
    again.load_adapter(tmp_path / "lora")
    assert_equal(outputs(again), expected)
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "lora")), expected)
    with_lora = FromageForConditionalGeneration.from_pretrained(tmp_path / "lora")  # by itself: it names its base
    assert_equal(outputs(with_lora), expected)


def test_the_ordinary_pass_takes_over_under_lora(checkpoint):
    folder, _ = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    model.add_adapter(lora())
    model.train()
    ids = torch.tensor([[2, 5, 6, 501]])
    lm = model.frozen_lm()
    assert why_not_ret_only(lm, ids, torch.ones_like(ids))
    loss, embeds = ordinary_pass(lm, ids, torch.ones_like(ids))
    (loss + embeds.sum()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


KINDS = {
    "lora": lambda **kwargs: LoraConfig(r=2, init_lora_weights="gaussian", lora_dropout=0.5, **kwargs),
    "dora": lambda **kwargs: LoraConfig(r=2, use_dora=True, **kwargs),
    "ia3": lambda **kwargs: IA3Config(feedforward_modules=[], **kwargs),
    "loha": lambda **kwargs: LoHaConfig(r=2, **kwargs),
    "oft": lambda **kwargs: OFTConfig(oft_block_size=4, r=0, **kwargs),
}


def put_in(model, kind: str, way: str) -> torch.nn.Module:
    """`model` with a PEFT adapter of a kind, and what then is to be called."""
    config = KINDS[kind](target_modules=TARGETS, modules_to_save=["adapter"])
    if way == "get_peft_model":
        return get_peft_model(model, config)
    if way == "add_adapter":
        model.add_adapter(config)
    else:
        alone = KINDS[kind](target_modules=["q_proj", "v_proj"])
        model.language_model = get_peft_model(model.language_model, alone)
    return model


def take_steps(whole, processor, count: int = 2):
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(4)]
    batch = FromageDataCollator(processor)(data)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        whole(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "language model alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trains_is_left_to_it(checkpoint, kind, way):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    frozen = {id(p) for p in model.parameters()}  # PEFT copies what it trains, but for `adapter` where it does not
    whole = put_in(model, kind, way)
    expected = {n for n, p in whole.named_parameters() if id(p) not in frozen and p.requires_grad}
    if way == "language model alone":
        expected |= {n for n, p in whole.named_parameters() if n.startswith("adapter.")}
    assert any("adapter." in n for n in expected) and len(expected) >= 14
    model.freeze_backbones()
    assert {n for n, p in whole.named_parameters() if p.requires_grad} == expected
    before = {n: p.clone() for n, p in whole.named_parameters()}
    take_steps(whole.train(), processor)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in expected), name


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "language model alone"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_dropout_fires_and_the_language_models_own_does_not(checkpoint, way, checkpointing):
    folder, _ = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder, text_config={"dropout": 0.5})
    whole = put_in(model, "lora", way)
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.tensor([[2, 5, 6, 7, 501]])

    def draws() -> int:
        return len({model.get_text_embeds(ids).sum().item() for _ in range(4)})

    whole.train()
    assert draws() == 4
    for module in whole.modules():  # the rest of the language model is deterministic
        if isinstance(module, torch.nn.ModuleDict) and "default" in module and "Dropout" in str(module):
            module["default"].p = 0.0
    assert draws() == 1
    whole.eval()
    assert draws() == 1 and not any(module.training for module in whole.modules())
    frozen = put_in(FromageForConditionalGeneration.from_pretrained(folder), "lora", way)
    frozen.requires_grad_(False).train()  # an adapter that is not being trained is as the backbone is
    assert not any(module.training for module in frozen.modules() if type(module).__name__ == "Dropout" and module.p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora", "oft"])
def test_reload_equals_saved(checkpoint, tmp_path, kind, dtype):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    put_in(model, kind, "add_adapter")
    take_steps(model.train(), processor)
    expected = outputs(copy.deepcopy(model.eval()))
    model.save_pretrained(tmp_path / "peft")
    loaded = FromageForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    loaded.load_adapter(tmp_path / "peft")
    for again in (loaded, FromageForConditionalGeneration.from_pretrained(tmp_path / "peft", dtype=dtype)):
        assert_equal(outputs(again), expected)


def test_an_adapter_that_does_not_fit_is_refused(checkpoint, tmp_path):
    folder, _ = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    put_in(model, "lora", "add_adapter")
    model.save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "lora_A" in name)
    tensors["base_model.model.language_model.lora_colour.weight"] = tensors.pop(gone)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="it lacks .*lora_A.* no place for .*lora_colour"):
        FromageForConditionalGeneration.from_pretrained(folder).load_adapter(tmp_path / "peft")
