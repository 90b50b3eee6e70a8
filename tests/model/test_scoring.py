"""Candidate scoring against one whole forward pass per context and candidate."""

import pytest
import torch

from modeling_fromage import scoring_fromage
from modeling_fromage.frozen_lm_fromage import FrozenLM
from tests.helpers.backbones import BACKBONES, make_model
from tests.helpers.batches import IMAGE, RET, interleaved, pad

CANDIDATES = [[2, 7], [9], [2, 11, 12, 13, RET], [14, 15, 16]]


def candidates_for(count, side):
    """Candidates (count, 4, 5), other tokens for each context."""
    rows = [pad([[t if t in (2, RET) else t + 20 * i for t in c] for c in CANDIDATES], side) for i in range(count)]
    return tuple(torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask"))


def by_hand(model, context, candidate, pixels, shift):
    ids = torch.cat([context, candidate])[None]
    log_probs = model(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
    places = torch.arange(len(candidate)) + len(context)
    return log_probs[places - int(shift), candidate].sum()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*sorted(BACKBONES), "mistral_clip"])
@torch.no_grad()
def test_scores_are_those_of_whole_passes(name, side, shift, monkeypatch):
    monkeypatch.setattr(scoring_fromage, "TOKENS_AT_A_TIME", 10)  # pieces of two candidates
    model = make_model(name)
    rows, images = interleaved(model)
    if name != "gemma2_vit":  # its attention is fp32's in any case
        model.double().adapter.double()
        images = images.double()
    contexts, (ids, mask) = pad(rows, side), candidates_for(len(rows), side)
    scores = model.score_candidates(**contexts, candidate_ids=ids, candidate_attention_mask=mask, pixel_values=images,
                                    shift=shift)  # fmt: skip
    assert scores.shape == (3, 4)
    for i, pixels in enumerate([images[:2], images[2:], None]):
        for j in range(4):
            expected = by_hand(model, torch.tensor(rows[i]), ids[i, j][mask[i, j].bool()], pixels, shift)
            torch.testing.assert_close(scores[i, j].to(expected), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_ways_of_running_candidates_agree(monkeypatch):
    model = make_model("llama_clip")
    rows, images = interleaved(model)
    batch = {**pad(rows, "left"), "pixel_values": images}
    ids, mask = candidates_for(1, "right")
    assert model.frozen_lm().can_pack(torch.ones(1, 12))
    together = model.score_candidates(**batch, candidate_ids=ids[0], candidate_attention_mask=mask[0])
    monkeypatch.setattr(FrozenLM, "can_pack", lambda lm, mask: False)
    apart = model.score_candidates(**batch, candidate_ids=ids[0], candidate_attention_mask=mask[0])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [20, 24, 64])
@torch.no_grad()
def test_candidates_that_fill_a_sliding_window_together(window):
    """One fits into it behind the context, and all side by side do not."""
    model = make_model("mistral_clip")
    for layer in (model.config.text_config, model.language_model.config):
        layer.sliding_window = window
    context, candidates = torch.arange(2, 18)[None], torch.arange(20, 80).view(30, 2)
    scores = model.score_candidates(context, None, candidates)[0]
    for candidate, score in zip(candidates, scores, strict=True):
        torch.testing.assert_close(score, by_hand(model, context[0], candidate, None, True), rtol=1e-5, atol=1e-5)


def test_bad_candidates():
    model = make_model("opt_clip")
    ids = torch.tensor([[2, 5, 6]])
    with pytest.raises(ValueError, match=r"\[\[0, 1\]\] have no tokens"):
        model.score_candidates(ids, None, torch.tensor([[4, 5], [6, 7]]), torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="Expected candidates"):
        model.score_candidates(ids, None, torch.ones(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="Contexts \\[0\\] have no tokens"):
        model.score_candidates(ids, torch.zeros_like(ids), torch.tensor([[4]]))
    with pytest.raises(ValueError, match="has 128"):
        model.score_candidates(torch.full((1, 125), 5), None, torch.full((1, 4), 5))
    with pytest.raises(ValueError, match="image belongs into the context"):
        model.score_candidates(ids, None, torch.tensor([[IMAGE]]))
