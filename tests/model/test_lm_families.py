"""FROMAGe over a few families of language models, against the LM itself. tests/backbones has all of them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from tests.helpers import lm_stages
from tests.helpers.backbones import VISION_CONFIGS
from tests.helpers.lm_families import IMAGE, RET, make_lm, tiny_config
from tests.helpers.lm_stages import (
    assemble,
    check_folders,
    check_generation,
    check_only_the_adapter_moves,
    check_step,
    check_texts_and_scores,
)

FAMILIES = ["opt", "gpt2", "llama", "gemma3_text", "mamba"]


@pytest.mark.parametrize(
    ("spread", "side"), [(1.0, "right"), (6.0, "left")], ids=["small weights, right", "large weights, left"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_step(family, spread, side):
    model = assemble(make_lm(family, spread))
    check_step(model, side)
    check_only_the_adapter_moves(model)
    assert model.frozen_lm().takes("packed rows") == (family != "mamba")


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_scores_and_generation(family):
    model = assemble(make_lm(family, spread=6.0)).eval()
    check_texts_and_scores(model)
    check_generation(model)


@pytest.mark.parametrize("family", [*FAMILIES, "falcon_h1"])
def test_folders(family, tmp_path):
    """Falcon-H1 has buffers that no checkpoint holds and that another module fills."""
    check_folders(assemble(make_lm(family, spread=6.0)), tmp_path)


@pytest.mark.parametrize("family", ["gemma3", "llava", "llama4", "mllama"])
def test_the_language_model_of_a_multimodal_one(family, tmp_path):
    whole = make_lm(family)
    ids = torch.tensor([[2, 5, 6, 7]])
    expected = whole(input_ids=ids).logits
    model = assemble(whole).float().eval()
    assert model.config.text_config is model.language_model.config
    torch.testing.assert_close(model.language_model(input_ids=ids).logits, expected)
    assert model.get_input_embeddings().weight is whole.get_input_embeddings().weight  # shared
    check_folders(model, tmp_path, whole)


@pytest.mark.parametrize(("family", "decoder"), [("gemma3", "model.language_model"), ("llama", "model")])
def test_layers_of_the_language_model_may_be_offloaded(family, decoder, tmp_path):
    make_lm(family, spread=6.0).save_pretrained(tmp_path / "text")
    AutoModel.from_config(VISION_CONFIGS["clip"]()).save_pretrained(tmp_path / "vision")
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.1")
    rest = ("lm_head", "model.vision_tower", "model.multi_modal_projector") if family == "gemma3" else ("lm_head",)
    device_map = dict.fromkeys([f"{decoder}.{part}" for part in parts] + list(rest), "cpu")

    def load(device_map=None):
        torch.manual_seed(0)
        options = {"text_device_map": device_map, "text_offload_folder": tmp_path / "off"} if device_map else {}
        processor = SimpleNamespace(image_token_id=IMAGE, ret_token_id=RET, num_image_tokens=2, num_ret_tokens=1)
        return FromageForConditionalGeneration.from_vision_text_pretrained(
            str(tmp_path / "vision"), str(tmp_path / "text"), processor, **options
        )

    ids = torch.tensor([[2, 5, 6, 7, RET]])
    expected = load()(input_ids=ids).logits
    offloaded = load({**device_map, f"{decoder}.layers.0": "disk"})
    assert offloaded.language_model.model.layers[0].mlp.up_proj.weight.is_meta
    assert offloaded.hf_device_map["language_model.lm_head"] == offloaded.hf_device_map["adapter"] == "cpu"
    assert "disk" in offloaded.hf_device_map.values()
    assert torch.equal(offloaded(input_ids=ids).logits, expected)
    offloaded.save_pretrained(tmp_path / "whole", save_backbones=True)
    again = FromageForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="reads the rows of the embedding and head of .*ForCausalLM"):
        load({"": "disk"})


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen2_vl", "'qwen2_vl', whose text part is of type 'qwen2_vl_text', has no causal language model"),
        ("aya_vision", "AyaVisionForConditionalGeneration does not hold the Cohere2ForCausalLM .* a text differ"),
    ],
)
def test_a_multimodal_model_without_a_language_model_by_itself_is_refused(family, message):
    whole = AutoModelForMultimodalLM.from_config(tiny_config(family))
    with pytest.raises(ValueError, match=message):
        assemble(whole)


def test_a_configuration_without_layers_is_refused():
    with pytest.raises(ValueError, match="type 'blt' names no `num_hidden_layers`"):
        FromageConfig(text_config=tiny_config("blt"))


def test_an_lm_that_multiplies_the_embeddings_of_ids():
    model = assemble(make_lm("falcon_h1", embedding_multiplier=3.5))
    assert model.config.text_embedding_scale == model.config.ret_embedding_scale == 3.5
    assert assemble(make_lm("opt")).config.text_embedding_scale == 1.0


def test_texts_beyond_the_window_that_an_lm_keeps_are_refused():
    """Doge's attention chooses what to keep among what follows, too: it is causal up to there."""
    model = assemble(make_lm("doge", keep_window_size=8)).eval()
    texts = torch.arange(3, 13)[None]
    with pytest.raises(ValueError, match="10 tokens long.*context has 8"):
        model.get_text_embeds(torch.cat([texts[:, :9], torch.tensor([[97]])], dim=1))
    with pytest.raises(ValueError, match="context of 8"):
        model.generate(texts[:, :5], max_new_tokens=4)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("doge", {"keep_window_size": 8}),
        ("llama", {"max_position_embeddings": 8,
                   "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)  # fmt: skip
def test_long_texts_that_depend_on_what_stands_beside_them_are_refused(family, fields, monkeypatch):
    model = assemble(make_lm(family, spread=3.0, **fields))
    monkeypatch.setattr(lm_stages, "CAPTIONS", [[2, *range(5, 9)], [2, 8], [2, 9, 10]])
    check_step(model, "right")  # within it
    ids = torch.arange(3, 13)[None]
    with pytest.raises(ValueError, match="tokens.*Beyond 8"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="10 tokens long.*context has 8"):
        model(input_ids=ids, labels=ids)


def test_a_text_part_is_rebuilt_from_its_own_configuration():
    """transformers has Mllama's causal LM under the name of the whole alone."""
    lm = AutoModelForCausalLM.from_config(tiny_config("mllama"))
    model = assemble(lm)
    assert type(FromageForConditionalGeneration(model.config).language_model) is type(lm)


LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
                        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
}  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("phi3", {"original_max_position_embeddings": 12})])
def test_rotary_frequencies_of_long_texts(family, fields, monkeypatch):
    """Those of longrope change for all that is in a pass, and for what a cache holds, with the longest text in it."""
    captions = [[2, *range(5, 28)], [2, 8], [2, 9, 10, 11, 30], [2, *range(12, 21)]]  # the last one crosses with [RET]
    monkeypatch.setattr(lm_stages, "CAPTIONS", captions)
    model = assemble(make_lm(family, spread=3.0, **LONGROPE, **fields))
    for side in ("left", "right"):
        check_step(model, side)
    model.eval()
    for texts in ([captions[0]], captions[1:3]):
        monkeypatch.setattr(lm_stages, "CAPTIONS", texts)
        check_texts_and_scores(model)
    ids, mask = torch.tensor([[2] * 24 + [RET], [2] * 25]), torch.ones(2, 25, dtype=torch.long)
    ids[1, 3:], mask[1, 4:] = RET, 0
    with pytest.raises(ValueError, match="longrope.* more than 12 tokens.*up to 4 tokens get beside 25"):
        model.get_text_embeds(ids, mask)
    with pytest.raises(ValueError, match="10 tokens and 6 new ones go beyond 12.*use_cache=False"):
        model.generate(torch.tensor([captions[3]]), max_new_tokens=6)
    options = {"do_sample": False, "max_new_tokens": 6, "max_num_rets": 0}
    found = model.generate(torch.tensor([captions[3]]), **options, use_cache=False)[0, -6:].tolist()
    text = list(captions[3])
    for _ in range(6):
        log_probs, _ = lm_stages.by_itself(model, text)
        log_probs[:, [IMAGE, RET]] = -torch.inf
        text.append(log_probs[-1].argmax().item())
    assert found == text[-6:]
