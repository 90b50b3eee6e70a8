"""LoRA on the language model beside the trained parts, through peft and through transformers' own `add_adapter`."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, Trainer, TrainingArguments

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, NormalizeRetEmbeddingCallback
from tests.test_checkpoints import assemble, assert_equal, backbones, outputs  # noqa: F401 (a fixture)

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
def checkpoint(backbones, tmp_path):  # noqa: F811
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
        peft_model.base_model.model._ret_norm_target, rel=1e-5
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
    assert not model._only_ret_needs_gradient(ids, torch.ones_like(ids))
    loss, embeds = model._text_branch(ids, torch.ones_like(ids))
    (loss + embeds.sum()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
