"""Log-likelihoods of candidate texts after a context that is encoded once: multiple choice, VisDial's answers.

Axes: B contexts of L tokens, C candidates of up to M tokens, T tokens of candidates side by side, H the width of the
LM's head.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .backbones_fromage import context_length
from .frozen_lm_fromage import FrozenLM
from .packing_fromage import additive_mask, tokens_first

TOKENS_AT_A_TIME = 512  # of candidates, side by side in a row: attention within a row costs more with its square


@dataclass
class SideBySide:
    """The tokens of candidates (B, C, M) without their padding, in one row per context.

    Attributes:
        tokens (`torch.Tensor` of shape `(B, T)`): Their ids; 0 for padding, which is at the end.
        position (`torch.Tensor` of shape `(B, T)`): Position within the candidate; -1 for padding.
        candidate (`torch.Tensor` of shape `(B, T)`): Number of the candidate.
    """

    tokens: torch.Tensor
    position: torch.Tensor
    candidate: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor) -> "SideBySide":
        flat = mask.flatten(1)
        order = tokens_first(flat)[:, : int(flat.sum(-1).max())]  # (B, T)
        is_token = flat.gather(-1, order)
        position = (mask.long().cumsum(-1) - 1).flatten(1).gather(-1, order).masked_fill(~is_token, -1)
        return cls(ids.flatten(1).gather(-1, order).masked_fill(~is_token, 0), position, order // ids.shape[2])


def score_candidates(
    lm: FrozenLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    candidate_ids: torch.Tensor,
    candidate_attention_mask: torch.Tensor | None,
    visual_tokens: torch.Tensor | None,
    shift: bool,
) -> torch.Tensor:
    """See [`FromageForConditionalGeneration.score_candidates`].

    The context runs once into a KV cache. Its candidates run against it side by side, blind to each other, and logits
    are taken at their tokens alone.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    ids = candidate_ids.to(input_ids.device)
    candidate_mask = torch.ones_like(ids) if candidate_attention_mask is None else candidate_attention_mask
    candidate_mask = candidate_mask.to(ids.device).bool()
    if ids.dim() == 2:
        ids, candidate_mask = (tensor.expand(len(input_ids), -1, -1) for tensor in (ids, candidate_mask))
    _check_candidates(lm, mask, ids, candidate_mask)
    row = max(ids.shape[2], min(TOKENS_AT_A_TIME, ids.shape[1] * ids.shape[2]))
    can_pack = lm.can_pack(torch.ones(1, mask.shape[1] + row))
    order = mask.bool().long().argsort(dim=-1, stable=True)  # padding goes to the left: candidates follow tokens
    mask, input_ids = mask.gather(-1, order), input_ids.gather(-1, order)
    embeds = lm.embed(input_ids, visual_tokens)
    longest = int((mask.sum(-1)[:, None] + candidate_mask.sum(-1)).max())
    takes_cache = lm.takes("left padding") and longest <= lm.rope_switch
    context = lm.decode(embeds, mask, use_cache=True) if takes_cache else None
    if context is None or not isinstance(context.past_key_values, Cache):
        return _scores_of_whole_texts(lm, embeds, mask, ids, candidate_mask, shift)
    last = context.last_hidden_state[:, -1:]  # (B, 1, H)

    size = max(1, TOKENS_AT_A_TIME // ids.shape[2])
    scores = []
    for piece, piece_mask in zip(ids.split(size, dim=1), candidate_mask.split(size, dim=1), strict=True):
        layout = SideBySide.of(piece, piece_mask)
        if can_pack:
            hidden = _run_side_by_side(lm, context.past_key_values, mask, layout)  # (B, T, H)
        else:
            hidden = _run_in_rows(lm, context.past_key_values, mask, piece, piece_mask, layout)
        if shift:
            hidden = torch.where((layout.position == 0)[..., None], last, hidden.roll(1, dims=1))
        is_token = layout.position >= 0
        losses = lm.token_losses_without_gradient(hidden[is_token], layout.tokens[is_token])
        token_scores = losses.new_zeros(is_token.shape).masked_scatter(is_token, -losses)
        piece_scores = token_scores.new_zeros(piece.shape[:2])
        scores.append(piece_scores.scatter_add(1, layout.candidate, token_scores))
    return torch.cat(scores, dim=1).float()


def _scores_of_whole_texts(
    lm: FrozenLM,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    ids: torch.Tensor,
    candidate_mask: torch.Tensor,
    shift: bool,
) -> torch.Tensor:
    """The scores where the LM does not continue from a cache as from a whole text: each context (B, L, D) runs again
    with each of its candidates (B, C, M)."""
    scores = []
    for piece, piece_mask in zip(ids.unbind(1), candidate_mask.unbind(1), strict=True):  # (B, M) each
        whole_mask = torch.cat([mask.bool(), piece_mask], dim=1)
        whole = torch.cat([embeds, lm.embed(piece.masked_fill(~piece_mask, 0))], dim=1)
        hidden, _ = lm.run_unpadded(whole, whole_mask)
        is_candidate = torch.cat([torch.zeros_like(mask.bool()), piece_mask], dim=1)[whole_mask]  # (T,)
        predictors = is_candidate.nonzero()[:, 0] - int(shift)
        losses = lm.token_losses_without_gradient(hidden[predictors], piece[piece_mask])
        row = piece_mask.nonzero()[:, 0]
        scores.append(losses.new_zeros(len(ids)).index_add(0, row, -losses))
    return torch.stack(scores, dim=1).float()


def _check_candidates(lm: FrozenLM, mask: torch.Tensor, ids: torch.Tensor, candidate_mask: torch.Tensor) -> None:
    if ids.dim() != 3 or len(ids) != len(mask) or ids.shape != candidate_mask.shape:
        raise ValueError(
            f"Expected candidates and their mask ({len(mask)}, C, M) or (C, M), got {tuple(ids.shape)} and "
            f"{tuple(candidate_mask.shape)}."
        )
    empty = (~candidate_mask.any(-1)).nonzero().tolist()
    if empty:
        raise ValueError(f"Candidates (context, candidate) {empty[:10]} have no tokens, so no likelihood.")
    if not bool(mask.any(-1).all()):
        raise ValueError(f"Contexts {(~mask.bool().any(-1)).nonzero().flatten().tolist()} have no tokens.")
    longest, limit = int(mask.sum(-1).max() + candidate_mask.sum(-1).max()), context_length(lm.config.text_config)
    if longest > limit:
        raise ValueError(f"A context and a candidate are {longest} tokens long; the LM's context has {limit}.")
    if bool((ids == lm.config.image_token_id)[candidate_mask].any()):
        raise ValueError("Candidates are texts; an image belongs into the context.")


def _run_side_by_side(lm: FrozenLM, cache: Cache, mask: torch.Tensor, layout: SideBySide) -> torch.Tensor:
    """Hidden states (B, T, H) of the candidates, all in one row behind the context's cache."""
    tokens, position, candidate = layout.tokens, layout.position, layout.candidate
    same = (candidate[:, :, None] == candidate[:, None, :]).tril() & (position >= 0)[:, None, :]
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)  # padding sees itself: no NaN
    context = mask.bool()[:, None, :].expand(-1, tokens.shape[1], -1)
    embeds = lm.embed(tokens)
    output = lm.decode(
        embeds,
        additive_mask(torch.cat([context, same | itself], dim=-1), embeds.dtype),
        mask.sum(-1, keepdim=True) + position.clamp(min=0),
        cache,
        use_cache=True,
    )
    cache.crop(-tokens.shape[1])
    return output.last_hidden_state


def _run_in_rows(
    lm: FrozenLM,
    cache: Cache,
    mask: torch.Tensor,
    ids: torch.Tensor,
    candidate_mask: torch.Tensor,
    layout: SideBySide,
) -> torch.Tensor:
    """[`_run_side_by_side`] for an LM that takes no packed rows: each candidate has a row and a copy of the cache."""
    order = tokens_first(candidate_mask)
    candidate_mask, ids = candidate_mask.gather(-1, order), ids.gather(-1, order)
    count, length = ids.shape[1:]
    copies: Any = copy.deepcopy(cache)
    rows = torch.arange(len(ids), device=ids.device)
    copies.reorder_cache(rows.repeat_interleave(count))  # states beside keys and values, too
    full_mask = torch.cat([mask.repeat_interleave(count, dim=0), candidate_mask.flatten(0, 1).to(mask)], dim=1)
    embeds, context = lm.embed(ids.flatten(0, 1).masked_fill(~candidate_mask.flatten(0, 1), 0)), mask.shape[1]
    size = length if lm.takes("several tokens behind a cache") else 1
    outputs = [
        lm.decode(
            embeds[:, start : start + size],
            full_mask[:, : context + start + size],
            past_key_values=copies,
            use_cache=True,
        ).last_hidden_state
        for start in range(0, length, size)
    ]
    hidden = torch.cat(outputs, dim=1).unflatten(0, (-1, count))  # (B, C, M, H)
    return hidden[rows[:, None], layout.candidate, layout.position.clamp(min=0, max=length - 1)]


__all__ = ["score_candidates"]
