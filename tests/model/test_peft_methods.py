"""Every method of PEFT: trained, saved, loaded and merged beside the trained parts, or refused by name."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, Trainer, TrainingArguments

from modeling_fromage import (
    FromageConfig,
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageTrainer,
    NormalizeRetEmbeddingCallback,
)
from tests.helpers.checkpoints import assemble, assert_equal, outputs
from tests.helpers.peft_methods import METHODS, PROMPTS, WITHIN_LM


@pytest.fixture
def checkpoint(backbones, tmp_path):
    model, processor = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", processor


def train(model, processor, tmp_path, trainer_class=FromageTrainer):
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", remove_unused_columns=False, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    plain = {"data_collator": FromageDataCollator(processor), "callbacks": [NormalizeRetEmbeddingCallback()]}
    options = {"processing_class": processor} if trainer_class is FromageTrainer else plain
    trainer_class(model=model, args=args, train_dataset=data, **options).train()


def assert_trains_all(whole, *args):
    """Train `whole`: all that requires gradient moves, in the trained parts and of PEFT, and nothing else."""
    trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    train(whole, *args)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name
    assert any(".adapter." in f".{name}" for name in trained) and any("language_model." in name for name in trained)
    whole.eval()


def assert_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("trainer_class", [FromageTrainer, Trainer])
@pytest.mark.parametrize("method", METHODS)
def test_get_peft_model(checkpoint, tmp_path, method, trainer_class):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    whole = get_peft_model(model, METHODS[method](target_modules=WITHIN_LM, modules_to_save=["adapter"]))
    assert_trains_all(whole, processor, tmp_path, trainer_class)
    expected = outputs(model)
    whole.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(FromageForConditionalGeneration.from_pretrained(folder), tmp_path / "peft")
    assert_equal(outputs(again.base_model.model), expected)
    if method == "vera":
        with pytest.raises(ValueError, match="does not support PeftType.VERA.* use `get_peft_model`"):
            AutoModel.from_pretrained(tmp_path / "peft")
    else:
        assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "peft")), expected)
    merged = whole.merge_and_unload()
    assert_close(outputs(merged), expected)
    expected = outputs(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("method", METHODS)
def test_add_adapter(checkpoint, tmp_path, method):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    config = METHODS[method](target_modules=WITHIN_LM, modules_to_save=["adapter"])
    if method == "vera":
        with pytest.raises(ValueError, match="does not support PeftType.VERA.* use `get_peft_model`"):
            model.add_adapter(config)
        return
    model.add_adapter(config)
    assert_trains_all(model, processor, tmp_path)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "peft")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "peft")), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_language_model_alone(checkpoint, tmp_path, method):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    config = METHODS[method](target_modules=["q_proj", "v_proj"])
    model.language_model = get_peft_model(model.language_model, config)
    assert_trains_all(model, processor, tmp_path)
    expected = outputs(model)
    with pytest.raises(ValueError, match="it would be lost. Save the PEFT model, or merge the adapter first"):
        model.save_pretrained(tmp_path / "merged")
    model.language_model = model.language_model.merge_and_unload()
    assert_close(outputs(model), expected)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "merged")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_equals_whole_passes(checkpoint, method):
    model = FromageForConditionalGeneration.from_pretrained(checkpoint[0])
    get_peft_model(model, METHODS[method](target_modules=WITHIN_LM, modules_to_save=["adapter"])).eval()
    for parameter in model.language_model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    found = model.generate(torch.tensor([[2, 5, 6, 7]]), max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        whole = model(input_ids=found).logits[0, 3:-1]
    assert torch.equal(whole.argmax(-1), found[0, 4:])


@pytest.mark.parametrize("trainer_class", [FromageTrainer, Trainer])
@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_are_refused(checkpoint, tmp_path, method, trainer_class):
    folder, processor = checkpoint
    message = f"{method.replace(' ', '_').replace('-', '_').upper()} does not work with FROMAGe.* changes layers"
    model = FromageForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        train(get_peft_model(model, PROMPTS[method]()), processor, tmp_path, trainer_class)
    model = FromageForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="does not support prompt learning"):
        model.add_adapter(PROMPTS[method]())
    model.language_model = get_peft_model(model.language_model, PROMPTS[method]())
    with pytest.raises(ValueError, match=message):
        train(model, processor, tmp_path, trainer_class)
    for run in (model.generate, model.get_text_embeds):
        with pytest.raises(ValueError, match=message):
            run(torch.tensor([[2, 5, 501]]))


def test_a_prefix_is_refused_without_a_trainer(checkpoint):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    whole = get_peft_model(model, PROMPTS["prefix tuning"]()).train()
    batch = FromageDataCollator(processor)([{"pooled_image_features": torch.rand(32), "caption": "a cat"}])
    with pytest.raises(ValueError, match="takes no `past_key_values`, as PEFT's prefix tuning gives"):
        whole(**batch)


def test_a_wrapped_language_model_is_refused_at_assembly(backbones):
    model, _ = assemble(backbones)
    wrapped = get_peft_model(model.language_model, METHODS["lora"](target_modules=["q_proj"]))
    config = FromageConfig.from_vision_text_configs(model.vision_model.config, wrapped.config)
    with pytest.raises(ValueError, match="must be a PreTrainedModel, got PeftModel. Assemble .* then put PEFT into it"):
        FromageForConditionalGeneration(config, wrapped, model.vision_model)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r"vision_model\..*\.q_proj"])
def test_layers_of_the_vision_model_are_refused(checkpoint, tmp_path, targets):
    folder, processor = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder)
    whole = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["adapter"]))
    with pytest.raises(ValueError, match="runs without gradient.* name layers of the language model alone"):
        train(whole, processor, tmp_path)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_what_was_trained_in_fp32_beside_bf16_is_loaded_in_fp32(checkpoint, tmp_path, method):
    folder, _ = checkpoint
    model = FromageForConditionalGeneration.from_pretrained(folder, dtype="bfloat16")
    whole = get_peft_model(model, METHODS[method](target_modules=WITHIN_LM, modules_to_save=["adapter"])).eval()
    for parameter in model.language_model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            torch.nn.init.normal_(parameter, std=0.2)
    expected = outputs(model)
    whole.save_pretrained(tmp_path / "peft")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "peft", dtype="bfloat16")), expected)
