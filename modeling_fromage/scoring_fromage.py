"""Log-likelihoods of candidate texts after a context that is encoded once: multiple choice, VisDial's answers.

Axes: B contexts of L tokens, C candidates of up to M tokens, T tokens of a piece of the candidates side by side.
"""

import copy

import torch

from .backbone_probes_fromage import holds_attention_alone
from .backbones_fromage import context_length
from .packing_fromage import additive_mask, tokens_first

TOKENS_AT_A_TIME = 512  # of candidates, side by side in a row: attention within a row costs more with its square


class FromageScoringMixin:
    """Candidate scoring of [`FromageForConditionalGeneration`]."""

    @torch.no_grad()
    def score_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        candidate_ids: torch.LongTensor,
        candidate_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pooled_image_features: torch.Tensor | None = None,
        shift: bool = True,
    ) -> torch.Tensor:
        """Summed log-likelihood of each candidate's tokens given its context.

        The context runs once into a KV cache; its candidates run against it side by side, blind to each other, and
        logits are taken at their tokens alone.

        Args:
            input_ids, attention_mask (B, L): The contexts, padded on either side.
            candidate_ids, candidate_attention_mask (B, C, M), or (C, M) for all contexts alike: Texts without images,
                padded on either side, without BOS unless it is to be scored.
            pixel_values or pooled_image_features (N, ...): Images of the contexts.
            shift: Whether a token is predicted from the one before it. `False` scores each token with the logits of its
                own place, as the authors' VisDial script does (the paper's protocol).

        Returns:
            (B, C) in fp32; higher is likelier.

        Raises:
            ValueError: Shapes disagree, a candidate or a context is empty, or both exceed the LM's context.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        ids = candidate_ids.to(input_ids.device)
        candidate_mask = torch.ones_like(ids) if candidate_attention_mask is None else candidate_attention_mask
        candidate_mask = candidate_mask.to(ids.device).bool()
        if ids.dim() == 2:
            ids, candidate_mask = (tensor.expand(len(input_ids), -1, -1) for tensor in (ids, candidate_mask))
        self._check_candidates(mask, ids, candidate_mask)
        row = max(ids.shape[2], min(TOKENS_AT_A_TIME, ids.shape[1] * ids.shape[2]))
        side_by_side = self._packs_rows(torch.ones(1, mask.shape[1] + row))
        order = mask.bool().long().argsort(dim=-1, stable=True)  # padding goes to the left: candidates follow tokens
        mask, input_ids = mask.gather(-1, order), input_ids.gather(-1, order)
        embeds = self._embed(input_ids, self._pooled_or_none(pixel_values, pooled_image_features))
        context = self._decode(embeds, mask, use_cache=True) if self._takes("left padding") else None
        if context is None or not holds_attention_alone(context.past_key_values):
            return self._scores_of_whole_texts(embeds, mask, ids, candidate_mask, shift)
        last = context.last_hidden_state[:, -1:]  # (B, 1, H)

        size = max(1, TOKENS_AT_A_TIME // ids.shape[2])
        run = self._side_by_side if side_by_side else self._one_by_one
        scores = []
        for piece, piece_mask in zip(ids.split(size, dim=1), candidate_mask.split(size, dim=1), strict=True):
            tokens, place, candidate = side_by_side_layout(piece, piece_mask)
            hidden = run(context.past_key_values, mask, piece, piece_mask, (tokens, place, candidate))  # (B, T, H)
            if shift:
                before = hidden.roll(1, dims=1)
                hidden = torch.where((place == 0)[..., None], last, before)
            is_token = place >= 0
            losses = self._constant_token_losses(hidden[is_token], tokens[is_token])
            token_scores = losses.new_zeros(is_token.shape).masked_scatter(is_token, -losses)
            piece_scores = token_scores.new_zeros(piece.shape[:2])
            scores.append(piece_scores.scatter_add(1, candidate, token_scores))
        return torch.cat(scores, dim=1).float()

    def _scores_of_whole_texts(self, embeds, mask, ids, candidate_mask, shift) -> torch.Tensor:
        """`score_candidates` for an LM that does not continue from a cache as from a whole text: each context's
        embeddings (B, L, D) run again with each of its candidates (B, C, M)."""
        scores = []
        for piece, piece_mask in zip(ids.unbind(1), candidate_mask.unbind(1), strict=True):  # (B, M) each
            whole_mask = torch.cat([mask.bool(), piece_mask], dim=1)
            whole = torch.cat([embeds, self._embed(piece.masked_fill(~piece_mask, 0), None)], dim=1)
            hidden, _ = self._hidden_at_tokens(whole, whole_mask)
            is_candidate = torch.cat([torch.zeros_like(mask.bool()), piece_mask], dim=1)[whole_mask]  # (T,)
            places = is_candidate.nonzero()[:, 0] - int(shift)
            losses = self._constant_token_losses(hidden[places], piece[piece_mask])
            row = piece_mask.nonzero()[:, 0]
            scores.append(losses.new_zeros(len(ids)).index_add(0, row, -losses))
        return torch.stack(scores, dim=1).float()

    def _check_candidates(self, mask, ids, candidate_mask):
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
        longest, limit = int(mask.sum(-1).max() + candidate_mask.sum(-1).max()), context_length(self.config.text_config)
        if longest > limit:
            raise ValueError(f"A context and a candidate are {longest} tokens long; the LM's context has {limit}.")
        if bool((ids == self.config.image_token_id)[candidate_mask].any()):
            raise ValueError("Candidates are texts; an image belongs into the context.")

    def _side_by_side(self, cache, mask, ids, candidate_mask, layout) -> torch.Tensor:
        """Hidden states (B, T, H) of the candidates, all in one row behind the context's cache."""
        tokens, place, candidate = layout
        same = (candidate[:, :, None] == candidate[:, None, :]).tril() & (place >= 0)[:, None, :]
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)  # padding sees itself: no NaN
        context = mask.bool()[:, None, :].expand(-1, tokens.shape[1], -1)
        embeds = self._embed(tokens, None)
        output = self._decode(
            embeds,
            additive_mask(torch.cat([context, same | itself], dim=-1), embeds.dtype),
            mask.sum(-1, keepdim=True) + place.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-tokens.shape[1])
        return output.last_hidden_state

    def _one_by_one(self, cache, mask, ids, candidate_mask, layout) -> torch.Tensor:
        """[`_side_by_side`] for an LM that takes no packed rows: each candidate in a row with a copy of the cache."""
        order = tokens_first(candidate_mask)
        candidate_mask, ids = candidate_mask.gather(-1, order), ids.gather(-1, order)
        count, length = ids.shape[1:]
        copies = copy.deepcopy(cache)
        copies.batch_repeat_interleave(count)
        full_mask = torch.cat([mask.repeat_interleave(count, dim=0), candidate_mask.flatten(0, 1).to(mask)], dim=1)
        output = self._decode(
            self._embed(ids.flatten(0, 1).masked_fill(~candidate_mask.flatten(0, 1), 0), None),
            full_mask,
            past_key_values=copies,
            use_cache=True,
        )
        hidden = output.last_hidden_state.unflatten(0, (-1, count))  # (B, C, M, H)
        _, place, candidate = layout
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return hidden[rows, candidate, place.clamp(min=0, max=length - 1)]


def side_by_side_layout(ids: torch.LongTensor, mask: torch.BoolTensor) -> tuple[torch.Tensor, ...]:
    """The tokens of candidates (B, C, M) without their padding, in one row for each context.

    Returns:
        Tokens, places in their candidates (-1 for padding, at the end), and numbers of their candidates, (B, T) each.
    """
    flat = mask.flatten(1)
    order = tokens_first(flat)[:, : int(flat.sum(-1).max())]  # (B, T)
    is_token = flat.gather(-1, order)
    place = (mask.long().cumsum(-1) - 1).flatten(1).gather(-1, order).masked_fill(~is_token, -1)
    candidate = order // ids.shape[2]
    return ids.flatten(1).gather(-1, order).masked_fill(~is_token, 0), place, candidate
