"""Generation as transformers' GenerationTesterMixin asks for it, over several backbones: every strategy against a plain
forward pass, cached and uncached, from ids and from embeddings."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig

from tests.helpers.backbones import BACKBONES, make_model
from tests.helpers.batches import IMAGE, PAD, RET, interleaved, pad

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}


def batch_of(model):
    rows, images = interleaved(model)
    return {**pad(rows, "left"), "pixel_values": images}


@torch.no_grad()
def test_greedy_is_the_argmax_of_forward(model):
    batch = batch_of(model)
    output = model.generate(**batch, **OPTIONS, return_dict_in_generate=True, output_logits=True, output_scores=True)
    width = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    logits = model(input_ids=output.sequences, attention_mask=mask, pixel_values=batch["pixel_values"]).logits
    for step in range(5):
        torch.testing.assert_close(output.logits[step], logits[:, width + step - 1], atol=1e-4, rtol=1e-4)
        assert torch.equal(output.sequences[:, width + step], output.scores[step].argmax(-1))
        assert (output.scores[step][:, IMAGE] == -torch.inf).all()  # the placeholder is never written
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert scores.shape == (3, 5) and (scores < 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"past_key_values": "dynamic"},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: next(iter(options)),
)
@torch.no_grad()
def test_caches_and_prefills_agree(model, options):
    batch = batch_of(model)
    expected = model.generate(**batch, **OPTIONS)
    if "past_key_values" in options:
        options = {"past_key_values": DynamicCache(config=model.config.get_text_config())}
    if "prompt_lookup_num_tokens" in options:  # one row at a time, in transformers
        expected = model.generate(batch["input_ids"][2:], attention_mask=batch["attention_mask"][2:], **OPTIONS)
        found = model.generate(batch["input_ids"][2:], attention_mask=batch["attention_mask"][2:], **OPTIONS, **options)
    else:
        found = model.generate(**batch, **OPTIONS, **options)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_from_embeddings(model):
    batch = batch_of(model)
    expected = model.generate(**batch, **OPTIONS)
    width = batch["input_ids"].shape[1]
    pooled = model.get_pooled_image_features(batch["pixel_values"])
    embeds = model.frozen_lm().embed(batch["input_ids"], model.adapter.visual_tokens(pooled))
    found = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **OPTIONS)
    assert torch.equal(found, expected[:, width:])
    logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(logits, model(**batch).logits)


@torch.no_grad()
def test_sampling_and_several_sequences(model):
    batch = batch_of(model)
    sampling = {**OPTIONS, "do_sample": True, "num_return_sequences": 3, "ret_bias": -1e4}
    torch.manual_seed(0)
    first = model.generate(**batch, **sampling)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(**batch, **sampling))
    width = batch["input_ids"].shape[1]
    assert first.shape == (9, width + 5)
    assert torch.equal(first[:, :width], batch["input_ids"].repeat_interleave(3, dim=0))
    assert not (first[:, width:] == RET).any()
    cold = model.generate(**batch, **{**sampling, "temperature": 1e-6, "ret_bias": 0.0})
    assert torch.equal(cold, model.generate(**batch, **OPTIONS).repeat_interleave(3, dim=0))


@torch.no_grad()
def test_beams_find_what_exhaustive_search_finds(model):
    """With as many beams as tokens, two steps are searched whole."""
    rows, images = interleaved(model)
    ids = torch.tensor([rows[0]])
    width = model.config.logit_width
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": PAD, "num_beams": width}
    found = model.generate(ids, pixel_values=images[:2], **options, length_penalty=0.0)[0, -2:]
    forbidden = [IMAGE, *torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist()]
    first = model(input_ids=ids, pixel_values=images[:2]).logits[0, -1].log_softmax(-1)
    first[forbidden] = -torch.inf
    nexts = torch.cat([ids.expand(width, -1), torch.arange(width)[:, None]], dim=1)
    nexts[IMAGE, -1] = 0  # has no place for an image
    second = model(input_ids=nexts, pixel_values=images[:2].repeat(width, 1, 1, 1)).logits[:, -1].log_softmax(-1)
    second[:, forbidden] = -torch.inf
    best = (first[:, None] + second).flatten().argmax().item()
    assert found.tolist() == [best // width, best % width]


@torch.no_grad()
def test_compiled_static_cache():
    model = make_model("llama_clip")
    batch = batch_of(model)
    expected = model.generate(**batch, **OPTIONS)
    compile_config = CompileConfig(backend="eager")
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only
    found = model.generate(**batch, **OPTIONS, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, expected)


def test_unknown_options_are_refused():
    model = make_model("opt_clip")
    with pytest.raises(ValueError, match="ret_boost"):
        model.generate(torch.tensor([[2, 5]]), ret_boost=1.0)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_options_of_a_saved_generation_config_are_used(name, tmp_path):
    model = make_model(name)
    model.generation_config.ret_bias = 1e4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert isinstance(again.generation_config, GenerationConfig) and again.generation_config.ret_bias == 1e4
    assert again.generate(torch.tensor([[2, 5]]), max_new_tokens=2, pad_token_id=PAD)[0, -2:].tolist() == [RET, RET]


def test_a_prompt_beyond_the_context_is_refused():
    model = make_model("opt_clip")
    for length, new in ((128, 1), (120, 9)):
        with pytest.raises(ValueError, match=f"{length} tokens and {new} new ones exceed .* context of 128"):
            model.generate(torch.full((1, length), 5), max_new_tokens=new)
    assert model.generate(torch.full((1, 120), 5), max_new_tokens=8, min_new_tokens=8, pad_token_id=PAD).shape == (
        1,
        128,
    )


@torch.no_grad()
def test_padding_is_found_without_a_mask():
    model = make_model("opt_clip")
    batch = pad([[2, 5, 6, 7, 8, 9], [2, 5]], "left")
    options = {"max_new_tokens": 3, "ret_bias": 1e4, "pad_token_id": PAD, "return_dict_in_generate": True}
    expected = model.generate(**batch, **options)
    found = model.generate(batch["input_ids"], **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.ret_embeds, expected.ret_embeds, strict=True):
        assert torch.equal(ours, theirs)


def test_texts_beyond_the_context_are_refused():
    model = make_model("opt_clip")
    ids = torch.full((1, 129), RET)
    for method in (model.get_text_embeds, model.get_ret_embeds):
        with pytest.raises(ValueError, match="129 tokens long.*has 128"):
            method(ids)


@torch.no_grad()
def test_images_are_encoded_once(model, monkeypatch):
    """For the prompt, and for the embeddings of what was written; `[RET]` in the prompt and last included."""
    batch, calls = batch_of(model), []
    forward = model.vision_model.forward
    monkeypatch.setattr(
        model.vision_model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    output = model.generate(
        **batch, **{**OPTIONS, "ret_bias": 1e4}, return_dict_in_generate=True, num_return_sequences=1
    )
    assert len(calls) == 1
    monkeypatch.undo()
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    embeds = model.get_ret_embeds(output.sequences, mask, batch["pixel_values"])
    in_prompt = (batch["input_ids"] == RET).sum(-1).tolist()
    for ours, whole, count in zip(output.ret_embeds, embeds, in_prompt, strict=True):
        torch.testing.assert_close(ours, whole[count:], atol=1e-5, rtol=1e-4)
    pooled = model.get_pooled_image_features(batch.pop("pixel_values"))
    again = model.generate(**batch, pooled_image_features=pooled, **{**OPTIONS, "ret_bias": 1e4})
    assert torch.equal(again, output.sequences)
