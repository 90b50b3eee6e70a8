"""Quantised language models, by torchao and bitsandbytes: trained beside, run, saved and loaded."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, TrainingArguments

from modeling_fromage import FromageDataCollator, FromageTrainer
from tests.helpers.backbones import TEXT_CONFIGS
from tests.helpers.checkpoints import TRAINED_KEYS, assemble, assert_equal, keys_of, outputs

pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

INT4 = {"weight_dtype": torch.int4, "granularity": torchao.PerGroup(32)}
WEIGHT_ONLY = {
    "torchao_int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao_int4": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(**INT4)),
    "bitsandbytes_int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes_nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
    ),
    "bitsandbytes_nf4_twice": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
}
DYNAMIC = {
    "int8": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
    "int4": lambda: torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, **{
        "weight_granularity": torchao.PerGroup(32)
    }),
    "one kind of layer": lambda: torchao.FqnToConfig({
        "re:.*v_proj": torchao.Int8DynamicActivationInt8WeightConfig(), "_default": torchao.Int8WeightOnlyConfig(),
    }),
}  # fmt: skip
# bitsandbytes rounds what it multiplies by int8 weights to int8 too, row by row; 1 % of it.
TOLERANCE = {"bitsandbytes_int8": 2e-2}


@pytest.fixture(params=["llama", "gemma2", "opt_350m", "gpt2"])
def folders(request, backbones):
    """Folders of backbones, with another language model."""
    return with_language_model(backbones, request.param)


@pytest.fixture
def llama(backbones):
    return with_language_model(backbones, "llama")


def with_language_model(backbones, name):
    for file in (backbones / "language_model").glob("*.safetensors"):
        file.unlink()
    AutoModelForCausalLM.from_config(TEXT_CONFIGS[name]()).save_pretrained(backbones / "language_model")
    return backbones


def some_batch(model, processor, count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    width = model.adapter.visual_projection.in_features
    rows = [
        {"pooled_image_features": torch.rand(width, generator=generator), "caption": f"a {'very ' * i}old cat"}
        for i in range(count)
    ]
    return FromageDataCollator(processor)(rows)


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dequantized(model):
    """A copy with the same weights, unpacked into ordinary layers."""
    plain = copy.deepcopy(model)
    for module in list(plain.language_model.modules()):
        for name, child in module.named_children():
            weight = getattr(child, "weight", None)
            if hasattr(weight, "dequantize") and type(weight.data) is not torch.Tensor:
                values = weight.dequantize()
            elif type(child).__name__ == "Linear4bit":
                from bitsandbytes.functional import dequantize_4bit

                values = dequantize_4bit(weight.data, weight.quant_state)
            elif type(child).__name__ == "Linear8bitLt":
                codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (weight.data, child.state.SCB)
                values = codes.float() * scales[:, None] / 127
            else:
                continue
            linear = torch.nn.Linear(values.shape[1], values.shape[0], bias=child.bias is not None)
            linear.weight.data = values.detach().clone().float()
            if child.bias is not None:
                linear.bias.data = child.bias.data.clone()
            setattr(module, name, linear)
    return plain.freeze_backbones()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_training_moves_the_adapter_alone_by_the_gradient_of_the_dequantised_model(folders, kind):
    if kind == "torchao_int4" and "opt" in (folders / "language_model" / "config.json").read_text():
        pytest.skip("Groups of 32 do not fit into OPT-350m's projections of 16.")
    unquantised, _ = assemble(folders)
    model, processor = assemble(folders, text_quantization_config=WEIGHT_ONLY[kind]())
    model.adapter.load_state_dict(unquantised.adapter.state_dict())
    batch = some_batch(model, processor)
    loss, gradients = loss_and_gradients(model, batch)
    assert gradients.keys() == TRAINED_KEYS and all(g.isfinite().all() for g in gradients.values())
    expected_loss, expected = loss_and_gradients(dequantized(model), batch)
    tolerance = TOLERANCE.get(kind, 1e-5)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 10 * tolerance, name
    assert loss == pytest.approx(loss_and_gradients(unquantised, batch)[0], rel=5e-2)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    for name, value in model.state_dict().items():
        same = torch.equal(_plain(value), _plain(before[name]))
        assert same != (name in TRAINED_KEYS), name


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_generation_and_scores_are_those_of_whole_passes(llama, kind):
    model, processor = assemble(llama, text_quantization_config=WEIGHT_ONLY[kind]())
    tolerance = TOLERANCE.get(kind, 1e-5)
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]]), "attention_mask": torch.ones(2, 4).long()}
    found = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        whole = model(input_ids=found.sequences).logits.log_softmax(-1)
    steps = torch.stack(found.logits, 1).log_softmax(-1)
    columns = slice(0, model.config.image_token_id)
    assert relative(steps[..., columns].exp(), whole[:, 3:-1, columns].exp()) < 10 * tolerance
    candidates = found.sequences[:, None, 4:]
    scores = model.score_candidates(**inputs, candidate_ids=candidates, candidate_attention_mask=None)
    expected = whole[:, 3:-1].gather(-1, candidates[:, 0, :, None]).sum((1, 2))
    assert relative(scores[:, 0], expected) < tolerance


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_reload_equals_saved(folders, tmp_path, kind):
    if kind == "torchao_int4" and "opt" in (folders / "language_model" / "config.json").read_text():
        pytest.skip("Groups of 32 do not fit into OPT-350m's projections of 16.")
    model, _ = assemble(folders, text_quantization_config=WEIGHT_ONLY[kind]())
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    assert keys_of(tmp_path / "adapter") == TRAINED_KEYS
    again = AutoModel.from_pretrained(tmp_path / "adapter", quantization_config=WEIGHT_ONLY[kind]())
    assert_equal(outputs(again), expected)
    assert torch.equal(
        again.get_image_embeds(torch.ones(1, 3, 32, 32)), model.get_image_embeds(torch.ones(1, 3, 32, 32))
    )

    again.save_pretrained(tmp_path / "whole", save_backbones=True, max_shard_size="40KB")
    assert not hasattr(again, "hf_quantizer")
    shutil.rmtree(folders)  # it stands by itself
    whole = AutoModel.from_pretrained(tmp_path / "whole")
    assert_equal(outputs(whole), expected)
    assert {n for n, p in whole.named_parameters() if p.requires_grad} == TRAINED_KEYS
    same = AutoModel.from_pretrained(tmp_path / "whole", quantization_config=WEIGHT_ONLY[kind]())
    assert_equal(outputs(same), expected)
    whole.save_pretrained(tmp_path / "again")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("kind", ["torchao_int8", "bitsandbytes_int8", "bitsandbytes_nf4"])
def test_a_repository_that_is_stored_quantised(llama, tmp_path, kind):
    model, _ = assemble(llama, text_quantization_config=WEIGHT_ONLY[kind]())
    expected = outputs(model)
    model.language_model.save_pretrained(llama / "language_model")
    stored, _ = assemble(llama, text_quantization_config=None)
    stored.adapter.load_state_dict(model.adapter.state_dict())
    assert_equal(outputs(stored), expected)
    stored.save_pretrained(tmp_path / "model")
    assert keys_of(tmp_path / "model") == TRAINED_KEYS
    for config in (None, WEIGHT_ONLY[kind]()):
        assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model", quantization_config=config)), expected)


@pytest.mark.parametrize("kind", ["torchao_int8", "bitsandbytes_int8", "bitsandbytes_nf4"])
def test_a_self_contained_checkpoint_is_quantised_when_loaded(llama, tmp_path, kind):
    plain, _ = assemble(llama)
    plain.save_pretrained(tmp_path / "plain", save_backbones=True)
    model = AutoModel.from_pretrained(tmp_path / "plain", quantization_config=WEIGHT_ONLY[kind]())
    expected = outputs(model)
    model.save_pretrained(tmp_path / "model")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model")), expected)


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights="gaussian", **kwargs)


WITHIN = {"target_modules": r"language_model\..*\.(q_proj|v_proj)", "modules_to_save": ["adapter"]}


@pytest.mark.parametrize("kind", ["torchao_int8", "torchao_int4", "bitsandbytes_int8", "bitsandbytes_nf4"])
def test_lora_on_a_quantised_model(llama, tmp_path, kind):
    model, processor = assemble(llama, text_quantization_config=WEIGHT_ONLY[kind]())
    model.add_adapter(lora(**WITHIN))
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    FromageTrainer(model=model, args=arguments, train_dataset=data, processing_class=processor).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert any("lora_A" in name for name in before) and any("ret_embedding" in name for name in before)
    expected = outputs(model.eval())
    model.save_pretrained(tmp_path / "beside")
    beside = AutoModel.from_pretrained(tmp_path / "beside", quantization_config=WEIGHT_ONLY[kind]())
    assert_equal(outputs(beside), expected)
    model.save_pretrained(tmp_path / "whole", save_backbones=True)
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "whole")), expected)


@pytest.mark.parametrize("kind", ["torchao_int8", "torchao_int4", "bitsandbytes_int8", "bitsandbytes_nf4"])
def test_lora_is_merged_into_quantised_weights_and_saved(llama, tmp_path, kind):
    model, processor = assemble(llama, text_quantization_config=WEIGHT_ONLY[kind]())
    model.language_model = get_peft_model(model.language_model, lora(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    expected = outputs(model.eval())
    model.language_model = model.language_model.merge_and_unload()
    merged = outputs(model)
    # Merged weights are quantised anew, in as coarse steps as before.
    tolerance = 0.2 if "4" in kind.replace("torchao_int8", "") else 0.02
    assert relative(merged["text_embeds"], expected["text_embeds"]) < tolerance
    with pytest.raises(ValueError, match="has other weights than when it was loaded"):
        model.save_pretrained(tmp_path / "model", save_backbones=False)
    model.save_pretrained(tmp_path / "model")
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model")), merged)


@pytest.mark.parametrize("kind", ["bitsandbytes_int8", "bitsandbytes_nf4"])
def test_get_peft_model_puts_in_the_layers_of_bitsandbytes(llama, kind):
    model, _ = assemble(llama, text_quantization_config=WEIGHT_ONLY[kind]())
    assert model.num_parameters() == assemble(llama)[0].num_parameters()
    peft_model = get_peft_model(model, lora(**WITHIN))
    assert sum(type(module).__module__ == "peft.tuners.lora.bnb" for module in model.modules()) == 4
    expected = outputs(model.eval())
    assert relative(outputs(peft_model.merge_and_unload())["text_embeds"], expected["text_embeds"]) < 0.1


def test_get_peft_model_on_torchao_says_that_it_does_not_merge(llama):
    model, _ = assemble(llama, text_quantization_config=WEIGHT_ONLY["torchao_int8"]())
    with pytest.warns(UserWarning, match="merge.* will raise an error"):
        peft_model = get_peft_model(model, lora(**WITHIN))
    with pytest.raises(ValueError, match="required to re-quantize the base layer"):
        peft_model.merge_and_unload()


@pytest.mark.parametrize("kind", DYNAMIC)
def test_quantised_activations_are_refused_in_training_and_run_otherwise(llama, tmp_path, kind):
    model, processor = assemble(llama, text_quantization_config=TorchAoConfig(DYNAMIC[kind]()))
    expected = outputs(model)
    with pytest.raises(ValueError, match="lose the gradient.* quantise weights alone"):
        model.train()(**some_batch(model, processor))
    model.eval().save_pretrained(tmp_path / "model", save_backbones=True)
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path / "model")), expected)


@pytest.mark.parametrize("is_nested", [False, True])
def test_bitsandbytes_does_not_repack_weights_for_a_processor(llama, monkeypatch, is_nested):
    """As it does in eval mode on processors with AVX512-BF16, after which there is no gradient any more."""
    from bitsandbytes import functional, nn

    monkeypatch.setattr(nn.modules, "has_avx512bf16", lambda: True)
    kind = "bitsandbytes_nf4_twice" if is_nested else "bitsandbytes_nf4"
    model, processor = assemble(llama, text_quantization_config=WEIGHT_ONLY[kind]())
    batch = some_batch(model, processor)
    _, expected = loss_and_gradients(model, batch)
    with torch.no_grad():
        model.eval()(**batch)
    _, found = loss_and_gradients(model, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    layer = nn.LinearNF4(64, 64, compress_statistics=is_nested).to("cpu")
    values = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    model.language_model.before = layer.eval()  # a model that ran before it was joined
    model.eval()
    again = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert relative(again, values) < 1e-2
    assert layer(torch.ones(1, 64, requires_grad=True)).requires_grad


@pytest.mark.parametrize("text", ["llama", "opt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_is_refused_unless_it_runs(backbones, bits, text):
    folders = with_language_model(backbones, text)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=[])
    if (text, bits) == ("llama", 8):
        model, processor = assemble(folders, text_quantization_config=config)
        assert loss_and_gradients(model, some_batch(model, processor))[1].keys() == TRAINED_KEYS
    else:
        with pytest.raises(ValueError, match="Leave .*embeddings out of the quantisation"):
            assemble(folders, text_quantization_config=config)


def test_packed_embeddings_are_not_saved_whole(llama, tmp_path):
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    model, _ = assemble(llama, text_quantization_config=config)
    with pytest.raises(ValueError, match="packed with its embeddings .*save_backbones=False"):
        model.save_pretrained(tmp_path / "model", save_backbones=True)


def test_a_quantised_vision_model_is_refused(backbones):
    with pytest.raises(ValueError, match="Quantise the language model alone"):
        assemble(backbones, vision_quantization_config=WEIGHT_ONLY["torchao_int8"]())
