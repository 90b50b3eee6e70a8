"""Batching, padding, caching, freezing and bad input, over several pairs of backbones."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, NormalizeRetEmbeddingCallback
from tests.helpers.backbones import TEXT_CONFIGS, VISION_CONFIGS, make_model
from tests.helpers.batches import IMAGE, PAD, RET, interleaved, pad


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_equals_single(model, side):
    rows, images = interleaved(model)
    batch = pad(rows, side)
    logits = model(**batch, pixel_values=images).logits
    embeds = model.get_text_embeds(**batch, pixel_values=images)
    for i, pixels in enumerate([images[:2], images[2:], None]):
        single = {"input_ids": torch.tensor([rows[i]]), "pixel_values": pixels}
        real = batch["attention_mask"][i].bool()
        torch.testing.assert_close(logits[i][real], model(**single).logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(embeds[i : i + 1], model.get_text_embeds(**single), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cached_generation_equals_uncached_and_single(model):
    rows, images = interleaved(model)
    batch = pad(rows, "left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "ret_bias": 0.05}
    cached = model.generate(**batch, pixel_values=images, **options)
    uncached = model.generate(**batch, pixel_values=images, use_cache=False, **options)
    assert torch.equal(cached, uncached)
    ids = batch["input_ids"]
    for _ in range(6):  # by hand
        mask = torch.cat([batch["attention_mask"], torch.ones(3, ids.shape[1] - len(batch["input_ids"][0]))], 1).long()
        scores = model(input_ids=ids, attention_mask=mask, pixel_values=images).logits[:, -1]
        scores[:, IMAGE] = float("-inf")
        scores[:, RET] += 0.05
        eos = model.generation_config.eos_token_id
        if eos is not None:
            scores[:, eos] = float("-inf")
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, ids)
    single = model.generate(input_ids=torch.tensor([rows[0]]), pixel_values=images[:2], **options)
    assert torch.equal(single[0, -6:], cached[0, -6:])


@torch.no_grad()
def test_generated_rets_have_embeddings(model):
    rows, images = interleaved(model)
    batch = pad(rows, "left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": PAD, "return_dict_in_generate": True}
    options.update(ret_bias=1e4, min_tokens_before_ret=2, max_num_rets=2, do_sample=False)
    output = model.generate(**batch, pixel_values=images, num_beams=1, **options)
    width = batch["input_ids"].shape[1]
    for row, positions in enumerate(output.ret_positions):
        assert positions.tolist() == [width + 2, width + 3]
        mask = torch.cat([batch["attention_mask"][row], torch.ones(3, dtype=torch.long)])
        pixels = [images[:2], images[2:], None][row]
        ids = output.sequences[row, : width + 3][mask.bool()[: width + 3]]
        expected = model.get_text_embeds(ids[None], pixel_values=pixels)
        torch.testing.assert_close(output.ret_embeds[row][:1], expected, atol=1e-5, rtol=1e-4)
    last = model.generate(**batch, pixel_values=images, **{**options, "min_tokens_before_ret": 4})
    assert all(positions.tolist() == [width + 4] for positions in last.ret_positions)  # the last token


@torch.no_grad()
def test_beams_keep_each_rows_images(model):
    rows, images = interleaved(model)
    batch = pad(rows, "left")
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": PAD, "min_new_tokens": 4}
    together = model.generate(**batch, pixel_values=images, **options)
    alone = model.generate(input_ids=torch.tensor([rows[0]]), pixel_values=images[:2], **options)
    assert torch.equal(together[0, -4:], alone[0, -4:])
    with pytest.raises(ValueError, match="ret_bias"):
        model.generate(**batch, pixel_values=images, ret_scale_factor=2.0, **options)


def test_exactly_the_adapter_trains_and_backbones_stay_equal(model):
    model.train()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("adapter.")
    }
    assert not any(module.training for module in (*model.language_model.modules(), *model.vision_model.modules()))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows, images = interleaved(model)
    batch = pad([rows[0][: model.config.num_image_tokens] + [2, 5, 6]] * 3, "right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    retrieval = pad([[2, 5, 6, RET], [2, 7, RET], [2, 8, 9, 10, RET]], "right")
    output = model(**batch, labels=labels, pixel_values=images, retrieval_input_ids=retrieval["input_ids"],
                   retrieval_attention_mask=retrieval["attention_mask"])  # fmt: skip
    output.loss.backward()
    optimizer.step()
    NormalizeRetEmbeddingCallback().on_optimizer_step(None, None, None, model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("adapter."), name
    rows = model.get_input_embeddings().weight[: min(RET, len(model.get_input_embeddings().weight))]
    norm = model.adapter.ret_embedding.weight.norm()
    torch.testing.assert_close(norm, rows.norm(dim=-1).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_save_and_load(model, tmp_path):
    rows, images = interleaved(model)
    batch = pad(rows, "right")
    model.generation_config.ret_bias = 1.5
    model.save_pretrained(tmp_path)
    again = FromageForConditionalGeneration.from_pretrained(tmp_path)
    logits = again(**batch, pixel_values=images).logits  # its last bits depend on how the file's tensors are aligned
    torch.testing.assert_close(logits, model(**batch, pixel_values=images).logits, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad == n.startswith("adapter.") for n, p in again.named_parameters())
    assert again.generation_config.ret_bias == 1.5


def test_bad_input(model):
    rows, images = interleaved(model)
    batch = pad(rows, "right")
    with pytest.raises(ValueError, match="6 image placeholder tokens, but 2 images"):
        model(**batch, pixel_values=images[:2])
    with pytest.raises(ValueError, match="0 images"):
        model(**batch)
    with pytest.raises(ValueError, match=r"Rows \[1\] have no \[RET\]"):
        model.get_text_embeds(torch.tensor([[2, 3, RET], [2, 3, 4]]))
    with pytest.raises(ValueError, match="2 texts and 3 images"):
        model(retrieval_input_ids=torch.tensor([[2, 3, RET]] * 2), pixel_values=images)


def test_vision_model_without_pooled_output():
    model = make_model("opt_clip")
    output = model.vision_model(torch.rand(1, 3, 32, 32))
    bare = BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state)
    model.vision_model.forward = lambda *args, **kwargs: bare
    with pytest.raises(ValueError, match="no pooled output.*vision_pooling"):
        model.get_image_embeds(torch.rand(1, 3, 32, 32))
    model.config.vision_pooling = "cls"
    assert model.get_image_embeds(torch.rand(1, 3, 32, 32)).shape == (1, 16)


def test_backbones_without_their_pooler_are_refused(tmp_path):
    from transformers import ViTModel

    from tests.helpers.backbones import PARITY, VISION_CONFIGS

    folder = tmp_path / "vit"
    ViTModel(VISION_CONFIGS["vit"](), add_pooling_layer=False).save_pretrained(folder)
    case = PARITY / "case_a_opt_tied"
    (folder / "preprocessor_config.json").write_text((case / "vision_model" / "preprocessor_config.json").read_text())
    assemble = FromageForConditionalGeneration.from_vision_text_pretrained
    with pytest.raises(ValueError, match="pooler.*vision_pooling='cls'"):
        assemble(str(folder), str(case / "language_model"))
    assert assemble(str(folder), str(case / "language_model"), vision_pooling="mean").config.ret_token_id == 501
    with pytest.raises(ValueError, match="Unknown arguments.*colour"):
        assemble(str(folder), str(case / "language_model"), colour="red")


def test_a_configuration_leaves_the_models_that_it_is_of_alone():
    """transformers unsets the attention of configurations within a new one, and a causal LM then sees what follows."""
    language_model = AutoModelForCausalLM.from_config(TEXT_CONFIGS["llama"]()).eval()
    vision_model = AutoModel.from_config(VISION_CONFIGS["clip"]()).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = language_model(ids).logits
        config = FromageConfig(text_config=language_model.config, vision_config=vision_model.config)
        model = FromageForConditionalGeneration(config, language_model, vision_model).eval()
        assert torch.equal(model.language_model(ids).logits, before)
        torch.testing.assert_close(model(input_ids=ids).logits[..., : before.shape[-1]], before)
