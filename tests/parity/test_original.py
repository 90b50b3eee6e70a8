"""The original's answers, log-likelihoods and post-processing, by the original-compatible path; and where we differ."""

import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_fromage import UnreadableImageError
from modeling_fromage.interleaved_generation_fromage import InterleavedGeneration
from modeling_fromage.original.inference import (
    original_log_likelihood,
    original_prompt,
    original_segments,
    truncate_caption,
)
from tests.helpers.parity import CASES, LOGITS, Inference, as_golden
from tests.helpers.paths import IMAGES, PARITY

STEPS = 16


@pytest.fixture(scope="module", params=sorted(CASES))
def inference(request):
    return Inference(request.param)


def test_index(inference):
    matrix = inference.tensors["emb_matrix"]
    assert inference.index.ids == [f"img_{i:03d}.png" for i in range(50)]
    ours = inference.index.embeds * inference.model.adapter.logit_scale.exp()
    torch.testing.assert_close(ours, matrix, atol=LOGITS, rtol=0)


def test_prompts_and_greedy_tokens(inference):
    for number, item in enumerate(inference.golden["prompts"]):
        ids, pixels, _ = original_prompt(inference.model, inference.processor, inference.prompt(item["prompt"]))
        assert ids.shape[1] == item["prompt_len"]
        visual = inference.model._visual_tokens(pixels, None)
        expected = inference.tensors[f"p{number}.{item['name']}.prompt_embs"]
        torch.testing.assert_close(inference.model.frozen_lm().embed(ids, visual), expected, atol=LOGITS, rtol=0)
        for short, factor, golden in (
            ("f1", 1.0, item["factor_1"]),
            ("fr", item["ret_factor"], item["with_ret"]),
        ):
            output = inference.model.generate(
                input_ids=ids, pixel_values=pixels, max_new_tokens=STEPS, do_sample=False, ret_scale_factor=factor,
                eos_token_id=inference.model.config.image_token_id, pad_token_id=1, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert output.sequences[0, ids.shape[1] :].tolist() == golden["ids"], item["name"]
            key = f"p{number}.{item['name']}.{short}"
            scores = torch.cat(output.scores[:3])
            scores[:, inference.model.config.image_token_id] = 0  # we never write it
            expected = inference.tensors[f"{key}.logits_first3"].clone()
            expected[:, inference.model.config.image_token_id] = 0
            torch.testing.assert_close(scores, expected, atol=LOGITS * max(1, factor), rtol=1e-5)
            if short == "f1":
                continue
            # The last token's embedding is not among the original's.
            rets = [i for i, position in enumerate(output.ret_positions[0].tolist())
                    if position < output.sequences.shape[1] - 1]  # fmt: skip
            embeds = output.ret_embeds[0][rets]
            torch.testing.assert_close(embeds, inference.tensors[f"{key}.ret_embeddings"], atol=LOGITS, rtol=0)
            found, scores, _ = inference.index.search(embeds, top_k=5)
            assert [[int(image_id[4:7]) for image_id in row] for row in found] == golden["top5_idx"]
            scores = scores * inference.model.adapter.logit_scale.exp()
            torch.testing.assert_close(scores, inference.tensors[f"{key}.top5_scores"], atol=LOGITS, rtol=0)


def test_answers(inference):
    for item in inference.golden["prompts"]:
        prompt, golden = item["prompt"], item["with_ret"]
        factor = {"num_words": STEPS, "ret_scale_factor": item["ret_factor"]}
        assert inference.answer(prompt, num_words=STEPS) == item["factor_1"]["returned"], item["name"]
        assert inference.answer(prompt, **factor) == golden["returned"]["default"], item["name"]
        several = inference.answer(prompt, **factor, max_num_rets=2, max_img_per_ret=3)
        assert several == golden["returned"]["rets2_imgs3"], item["name"]


def test_min_word_tokens(inference):
    for item in inference.golden["prompts"]:
        ids, pixels, _ = original_prompt(inference.model, inference.processor, inference.prompt(item["prompt"]))
        golden = item["with_ret_min_words"]
        found = inference.model.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=STEPS, do_sample=False,
            ret_scale_factor=item["ret_factor"], min_tokens_before_ret=golden["min_word_tokens"],
            eos_token_id=inference.model.config.image_token_id, pad_token_id=1,
        )  # fmt: skip
        assert found[0, ids.shape[1] :].tolist() == golden["ids"], item["name"]


def test_the_prompts_own_rets(inference):
    for item in inference.golden["zero_words"]:
        assert inference.answer(item["prompt"], **item["kwargs"]) == item["returned"], item["name"]


def test_captions_of_a_batch(inference):
    golden = inference.golden["validate_batch4"]
    info = load_file(PARITY / "case_a_opt_tied" / "inputs.safetensors")
    k, image = inference.processor.num_image_tokens, inference.processor.image_token_id
    found = inference.model.generate(
        input_ids=torch.full((4, k), image), pixel_values=info["batch4.pixel_values"], max_new_tokens=32,
        min_tokens_before_ret=32, do_sample=False, eos_token_id=image, pad_token_id=1,
    )  # fmt: skip
    assert found[:, k:].tolist() == golden["ids"]


def test_sampled_tokens(inference):
    for item in inference.golden["sampling"]:
        prompt = next(p["prompt"] for p in inference.golden["prompts"] if p["name"] == item["prompt"])
        ids, pixels, _ = original_prompt(inference.model, inference.processor, inference.prompt(prompt))
        torch.manual_seed(item["torch_seed"])
        found = inference.model.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=len(item["ids"]), do_sample=True, top_k=0,
            temperature=item["temperature"], top_p=item["top_p"], ret_scale_factor=item["ret_scale_factor"],
            eos_token_id=inference.model.config.image_token_id, pad_token_id=1,
        )  # fmt: skip
        assert found[0, ids.shape[1] :].tolist() == item["ids"]


def test_log_likelihoods(inference):
    for item in inference.golden["loglik"]:
        score = original_log_likelihood(inference.model, inference.processor, inference.prompt(item["prompt"]))
        assert score == pytest.approx(item["score"], abs=LOGITS)
    picture = Image.open(IMAGES / "img_000.png")
    for prompt in ([picture], [""]):
        assert math.isnan(original_log_likelihood(inference.model, inference.processor, prompt))


def test_postprocessing(inference, monkeypatch):
    broken: list[int] = []
    load = inference.index.load_image

    def load_image(image_id, *args):
        if int(image_id[4:7]) in broken:
            raise UnreadableImageError(image_id, "broken")
        return load(image_id, *args)

    monkeypatch.setattr(inference.index, "load_image", load_image)
    differ = []
    for number, item in enumerate(inference.processed):
        broken[:] = item["broken_image_idx"]
        embeddings = inference.processed_tensors[f"{number:02d}.{item['name']}.last_step_embeddings"][0]
        tokens, ret = item["generated_ids"], inference.processor.ret_token_id
        after = embeddings[item["prompt_len"] :]
        after = torch.cat([after, after.new_ones(1, after.shape[1])])  # the last token's, which the original lacks
        newline = inference.processor.tokenizer("\n", add_special_tokens=False).input_ids[0]
        end = tokens.index(newline) if newline in tokens else 0
        tokens = tokens[:end] if end else tokens
        embeds = after[[i for i, token in enumerate(tokens) if token == ret]]
        options = {"max_num_rets": 1, "max_img_per_ret": 1, **item["kwargs"]}
        found = as_golden(original_segments(tokens, embeds, inference.processor, inference.index, **options))
        if "error" in item["returned"]:
            differ.append(item["name"])
            assert any(segment.get("images") for segment in found)
        else:
            assert found == item["returned"], item["name"]
    # Where the original fails we answer: quirk 7, and an index smaller than what is looked up.
    assert differ == ["ret_last", "ret_last_wanted", "too_many_images_asked"]


@pytest.mark.parametrize(
    ("caption", "kept"),
    [("\na b.\nc", "a b.\n"), ("3.5 m", "3."), ("no end", "no end"), ("", ""), ("a. b. c", "a."), ("\n\n", "")],
)
def test_truncate_caption(caption, kept):
    assert truncate_caption(caption) == kept


# ---- where we differ on purpose (docs/differences.md) ----


def test_quirk_5_text_after_a_full_stop_or_a_ret_is_kept(inference):
    """The pipeline ends an answer at its stop strings alone, and keeps what follows a `[RET]`."""
    item = inference.golden["prompts"][4]  # has two [RET]s and text behind them
    generation = InterleavedGeneration(
        inference.model, inference.processor, inference.index, max_new_tokens=STEPS, load_images=False,
        ret_scale_factor=item["ret_factor"], eos_token_id=None,
    )  # fmt: skip
    text = "".join(value if kind == "text" else inference.processor.image_token for kind, value in item["prompt"])
    images = [part for part in inference.prompt(item["prompt"]) if not isinstance(part, str)]
    answer = generation([text], [images])[0]
    kinds = [segment["type"] for segment in answer]
    rets = item["with_ret"]["ret_positions"]
    if inference.processor.num_image_tokens == 1:
        assert rets == [6, 7] and kinds == ["text", "image", "image", "text"]
    assert kinds.count("image") == len([i for i in item["with_ret"]["ids"] if i == inference.processor.ret_token_id])
    assert kinds[-1] == "text" and not answer[-1]["text"].endswith(inference.processor.ret_token)


def test_quirk_6_a_bias_works_whatever_the_sign_of_the_logit(inference):
    item = next(item for item in inference.golden["prompts"] if item["name"] == "text_only")
    ids, _, _ = original_prompt(inference.model, inference.processor, inference.prompt(item["prompt"]))
    ret = inference.processor.ret_token_id
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "output_scores": True,
               "return_dict_in_generate": True}  # fmt: skip
    inference.model.adapter.ret_embedding.weight.data.neg_()  # so that one of the two signs is negative
    try:
        for sign in (1, -1):
            inference.model.adapter.ret_embedding.weight.data.mul_(sign)
            logit = inference.model.generate(ids, **options).scores[0][0, ret].item()
            scaled = inference.model.generate(ids, ret_scale_factor=2.0, **options).scores[0][0, ret].item()
            biased = inference.model.generate(ids, ret_bias=2.0, **options).scores[0][0, ret].item()
            assert scaled == pytest.approx(2 * logit, rel=1e-5) and biased == pytest.approx(logit + 2, rel=1e-5)
            assert (scaled > logit) == (logit > 0)
    finally:
        trained = load_file(PARITY / _name(inference) / "train.safetensors")
        inference.model.adapter.ret_embedding.weight.data.copy_(trained["final.ret_input_embeddings.weight"])


def _name(inference):
    return "case_a_opt_tied" if inference.processor.num_image_tokens == 1 else "case_c_layers_1_2"


def test_quirk_7_the_last_ret_has_an_embedding(inference):
    ids = torch.tensor([[2, 68, 440]])
    output = inference.model.generate(ids, max_new_tokens=1, ret_bias=1e4, pad_token_id=1, return_dict_in_generate=True)
    whole = inference.model.get_text_embeds(output.sequences)
    assert output.sequences[0, -1] == inference.processor.ret_token_id
    torch.testing.assert_close(output.ret_embeds[0], whole, atol=1e-5, rtol=0)


def test_quirk_10_scores_are_cosines(inference):
    """The original's are exp(logit_scale) times as large, which ranks alike."""
    item = inference.golden["prompts"][0]
    key = f"p0.{item['name']}.fr"
    embeds = inference.tensors[f"{key}.ret_embeddings"]
    scores = inference.index.search(embeds, top_k=5)[1]
    assert scores.abs().max() <= 1
    scale = inference.model.adapter.logit_scale.exp()
    torch.testing.assert_close(scores * scale, inference.tensors[f"{key}.top5_scores"], atol=LOGITS, rtol=0)
