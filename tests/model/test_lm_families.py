"""FROMAGe over many families of language models, against the LM itself: `[RET]` a row of its own matrices, one text at
a time, no padding, no cache."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.backbones_fromage import decoder_and_head
from tests.helpers.backbones import VISION_CONFIGS
from tests.helpers.batches import pad
from tests.helpers.lm_families import FAMILIES, IMAGE, PAD, RET, make_lm

REFUSED = {"falcon_h1": "more from token ids", "gemma3n_text": "more from token ids", "bert": "makes its logits",
           "roberta": "makes its logits", "rembert": "makes its logits", "gemma4_text": "does not run from embeddings",
           "cpmant": "does not run from embeddings", "xlnet": "is not causal",
           "modernbert-decoder": "output head"}  # fmt: skip
RIGHT = sorted(FAMILIES.keys() - REFUSED)
PACKED = {"opt", "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3_moe", "falcon", "phi", "granite", "cohere",
          "gemma", "gemma2", "gemma3_text", "xglm", "biogpt", "minicpm3", "ctrl", "phimoe"}  # fmt: skip
FP32 = {
    "jamba",
    "granitemoehybrid",
    "minimax",
    "mixtral",
    "phimoe",
    "nemotron_h",
    "qwen3_moe",
    "qwen3_next",
    "xglm",
    "bloom",
    "gemma2",
    "mpt",
}  # fp64 fails in their experts, or in masks that they turn into fp32
CAPTIONS = [[2, 5, 6, 7, 20, 21, 22, 23], [2, 8], [2, 9, 10, 11, 30], [2, 12, 13, 14, 15, 16]]


def make_model(family: str, spread: float = 1.0):
    lm = make_lm(family, spread)
    head = lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias.data[IMAGE:] = 0.0  # `[RET]` has none
    vision = AutoModel.from_config(VISION_CONFIGS["clip"]())
    config = FromageConfig.from_vision_text_configs(
        vision.config, lm.config, image_token_id=IMAGE, ret_token_id=RET, num_image_tokens=2, projection_dim=16,
        tie_ret_embedding=head.weight is lm.get_input_embeddings().weight,
    )  # fmt: skip
    model = FromageForConditionalGeneration(config, lm, vision).train()
    if family not in FP32:
        model.double().adapter.double()
    return model


def by_itself(model, ids=None, embeds=None):
    """The LM's log-probabilities and last hidden states of one text, as it computes them."""
    inputs = {"input_ids": torch.tensor([ids])} if embeds is None else {"inputs_embeds": embeds[None]}
    lm = model.language_model
    copies = {name: tensor.clone() for name, tensor in inputs.items()}  # CTRL scales embeddings in place
    hidden = decoder_and_head(lm)[0](**copies, use_cache=False)[0][0]
    return lm(**inputs, use_cache=False).logits[0].log_softmax(-1), hidden


def truth(model, features):
    """The sum of the losses, with a gradient for the LM's own rows of `[RET]`."""
    adapter, embedding = model.adapter, model.get_input_embeddings()
    visual = adapter.multi_modal_projector(features).unflatten(-1, (2, -1))
    captioning, ret_losses, texts = [], [], []
    for tokens, caption in zip(visual, CAPTIONS, strict=True):
        log_probs, _ = by_itself(model, embeds=torch.cat([tokens, embedding(torch.tensor(caption))]))
        captioning += [-log_probs[t + 1, token] for t, token in enumerate(caption)]
        log_probs, hidden = by_itself(model, [*caption, RET])
        ret_losses += [-log_probs[t, token] for t, token in enumerate([*caption[1:], RET])]
        texts.append(adapter.text_projection[0](hidden[-1]))
    images, texts = (F.normalize(rows, dim=-1) for rows in (adapter.visual_projection(features), torch.stack(texts)))
    similarity, targets = images @ texts.t() * adapter.logit_scale.exp(), torch.arange(len(CAPTIONS))
    contrastive = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2
    return torch.stack(captioning).mean() + torch.stack(ret_losses).mean() + contrastive


def gradients(model, loss):
    """Of the trained parts, `[RET]`'s taken from the LM's matrices where those have one."""
    matrices = {"ret_embedding.weight": model.get_input_embeddings().weight}
    if model.adapter.ret_lm_head is not None:
        matrices["ret_lm_head.weight"] = model.get_output_embeddings().weight
    names, parameters = zip(*model.adapter.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True))
    for name, matrix in matrices.items():
        if matrix.requires_grad:
            found[name] = torch.autograd.grad(loss, matrix, retain_graph=True)[0][RET : RET + 1]
    return found


@pytest.mark.parametrize(
    ("spread", "side"), [(1.0, "right"), (6.0, "left")], ids=["small weights, right", "large weights, left"]
)
@pytest.mark.parametrize("family", RIGHT)
def test_step(family, spread, side):
    model = make_model(family, spread)
    features = torch.randn(len(CAPTIONS), 24, dtype=model.adapter.logit_scale.dtype)
    captions = pad([[IMAGE] * 2 + caption for caption in CAPTIONS], side)
    retrieval = pad([[*caption, RET] for caption in CAPTIONS], side)
    is_target = (captions["input_ids"] != IMAGE) & captions["attention_mask"].bool()
    loss = model(
        **captions,
        labels=captions["input_ids"].masked_fill(~is_target, -100),
        pooled_image_features=features,
        retrieval_input_ids=retrieval["input_ids"],
        retrieval_attention_mask=retrieval["attention_mask"],
    ).loss
    found = gradients(model, loss)
    model.get_input_embeddings().weight.requires_grad_(True)
    model.get_output_embeddings().weight.requires_grad_(True)
    expected = truth(model, features)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
    for name, theirs in gradients(model, expected).items():
        difference = ((found[name] - theirs).norm() / theirs.norm()).item()
        assert difference < 1e-4, f"{name} is off by {difference:.1e}"
    packs = model.traits.abilities.get((model.language_model.config._attn_implementation, "packed rows"), False)
    assert packs == (family in PACKED)


@pytest.mark.parametrize("family", RIGHT)
@torch.no_grad()
def test_texts_and_scores(family):
    model = make_model(family, spread=6.0).eval()
    rows, candidates = [[*caption, RET] for caption in CAPTIONS], [[40, 41, 42], [43], [44, 45]]
    for side in ("left", "right"):
        batch = pad(rows, side)
        embeds, logits = model.get_text_embeds(**batch), model(**batch).logits
        padded = pad(candidates, side)
        scores = model.score_candidates(**batch, candidate_ids=padded["input_ids"],
                                        candidate_attention_mask=padded["attention_mask"])  # fmt: skip
        for i, row in enumerate(rows):
            log_probs, hidden = by_itself(model, row)
            expected = F.normalize(model.adapter.text_projection[0](hidden[-1]), dim=-1)
            torch.testing.assert_close(embeds[i], expected, rtol=1e-4, atol=1e-5)
            ours = logits[i][batch["attention_mask"][i].bool()].log_softmax(-1)
            torch.testing.assert_close(ours.double(), log_probs.double(), rtol=1e-4, atol=1e-4)
            for j, candidate in enumerate(candidates):
                log_probs, _ = by_itself(model, row + candidate)
                expected = sum(log_probs[len(row) + t - 1, token] for t, token in enumerate(candidate)).double()
                torch.testing.assert_close(scores[i, j].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", RIGHT)
@torch.no_grad()
def test_generation(family):
    model = make_model(family, spread=6.0).eval()
    batch = pad(CAPTIONS, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    together = model.generate(**batch, **options, max_num_rets=0)
    for row, caption in zip(together, CAPTIONS, strict=True):
        ids = list(caption)
        for _ in range(6):
            log_probs, _ = by_itself(model, ids)
            log_probs[:, [IMAGE, RET]] = -torch.inf
            ids.append(log_probs[-1].argmax().item())
        assert row[-6:].tolist() == ids[-6:]
    alone = model.generate(torch.tensor([CAPTIONS[0]]), **options, max_num_rets=0)
    assert torch.equal(alone[0, -6:], together[0, -6:])
    if family != "xlstm":  # fails by itself at this size
        theirs = model.language_model.generate(torch.tensor([CAPTIONS[0]]), **options, suppress_tokens=[IMAGE, RET])
        assert torch.equal(theirs[0, -6:], together[0, -6:])


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused(family):
    with pytest.raises(ValueError, match=f"ForCausalLM|LMHeadModel.*{REFUSED[family]}"):
        make_model(family)
