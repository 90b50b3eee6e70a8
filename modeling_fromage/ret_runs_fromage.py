"""`[RET]` of several tokens: where its runs stand in token ids, and how generation completes one that it has begun.

Axes: B rows of text, L tokens, r tokens of a `[RET]`.
"""

import math
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from .configuration_fromage import FromageConfig

_BEFORE_THE_END = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")


def last_ret_token_id(config: FromageConfig) -> int:
    """Id of the last of the `[RET]` tokens, whose state completes a query."""
    return config.logit_width - 1


def ends_of_rets(input_ids: torch.Tensor, config: FromageConfig) -> torch.Tensor:
    """(B, L), True at the last token of each whole run `[RET]`, `[RET2]`, ..., where its query is complete."""
    found = input_ids == last_ret_token_id(config)
    for back in range(1, config.num_ret_tokens):
        before = torch.nn.functional.pad(input_ids, (back, 0), value=-1)[:, : input_ids.shape[1]]
        found = found & (before == last_ret_token_id(config) - back)
    return found


def offsets_of_tokens(config: FromageConfig, device: torch.device) -> torch.Tensor:
    """(r,), what leads from a run's last token to each of its tokens: 1 - r, ..., -1, 0."""
    return torch.arange(1 - config.num_ret_tokens, 1, device=device)


def last_rets(input_ids: torch.Tensor, config: FromageConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, 1) and columns (B, r) of the last `[RET]` of every row, all of its tokens.

    Raises:
        ValueError: A row has none, or not all tokens of one.
    """
    ends = ends_of_rets(input_ids, config)
    if not bool(ends.any(-1).all()):
        without = (~ends.any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"Rows {without} have no [RET] token ({_told(config)}); end each text with it.")
    refuse_torn_rets(input_ids, config)
    columns = input_ids.shape[-1] - 1 - ends.flip(-1).int().argmax(-1)
    rows = torch.arange(len(columns), device=columns.device)
    return rows[:, None], columns[:, None] + offsets_of_tokens(config, columns.device)


def refuse_torn_rets(
    input_ids: torch.Tensor | None, config: FromageConfig, ret_targets: torch.Tensor | None = None
) -> None:
    """Raise a `ValueError` where `input_ids` (B, L) have some of several `[RET]` tokens without the others, or
    `ret_targets` (B, L) name an image elsewhere than at the last of them."""
    if config.num_ret_tokens == 1:
        return
    if input_ids is None:
        raise ValueError("`ret_targets` need `input_ids` where [RET] is several tokens: these tell where it stands.")
    ends = ends_of_rets(input_ids, config)
    is_ret = (input_ids >= config.ret_token_id) & (input_ids <= last_ret_token_id(config))
    if bool((is_ret.sum(-1) != ends.sum(-1) * config.num_ret_tokens).any()):
        raise ValueError(
            f"[RET] is {config.num_ret_tokens} tokens in a row here, {_told(config)}, and a text has some of them "
            "without the others. Write [RET], which FromageProcessor expands."
        )
    if ret_targets is not None and bool(((ret_targets != -100) & ~ends).any()):
        raise ValueError(
            f"`ret_targets` name an image at another token than the last of a [RET], id {last_ret_token_id(config)}. "
            "Let FromageDataCollator lay documents out."
        )


def _told(config: FromageConfig) -> str:
    several = f"ids {config.ret_token_id} to {last_ret_token_id(config)}"
    return f"id {config.ret_token_id}" if config.num_ret_tokens == 1 else several


# ---- generation -----------------------------------------------------------------------------------------------------


class RetRunLogitsProcessor(LogitsProcessor):
    """Let the other `[RET]` tokens follow the first, whatever else is asked of the scores: to be the last of all
    processors.

    Args:
        config: A `FromageConfig`, for the token ids.
        prompt_length (`int`): Number of columns of the prompt; what follows is generated.
    """

    def __init__(self, config: FromageConfig, prompt_length: int):
        self.first, self.last, self.prompt_length = config.ret_token_id, last_ret_token_id(config), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] <= self.prompt_length:
            return scores
        token = input_ids[:, -1:]
        goes_on = (token >= self.first) & (token < self.last)
        following = torch.full_like(scores, -math.inf).scatter(1, (token + 1).clamp(max=self.last), 0.0)
        return torch.where(goes_on, following, scores)


def after_whole_rets(eos_token_id: Any, config: FromageConfig) -> Any:
    """`eos_token_id`, one or several, by which a `[RET]` ends a text with the last of its tokens."""
    if eos_token_id is None or config.num_ret_tokens == 1:
        return eos_token_id
    ids = torch.as_tensor(eos_token_id).flatten().tolist()
    return [last_ret_token_id(config) if token == config.ret_token_id else token for token in ids]


def end_after_whole_rets(generation_config: GenerationConfig, config: FromageConfig) -> None:
    """[`after_whole_rets`] of a generation's `eos_token_id`.

    Raises:
        ValueError: `[RET]` ends texts, and another option acts on the token that does.
    """
    eos = after_whole_rets(generation_config.eos_token_id, config)
    ends_at_ret = config.num_ret_tokens > 1 and last_ret_token_id(config) in (eos or ())
    if ends_at_ret and (asked := [name for name in _BEFORE_THE_END if getattr(generation_config, name)]):
        raise ValueError(
            f"`{asked[0]}` acts on the token that ends a text, here the last of {config.num_ret_tokens} [RET] tokens, "
            "which follows the first in any case. Use `min_tokens_before_ret` and `ret_bias`."
        )
    generation_config.eos_token_id = eos


__all__ = ["RetRunLogitsProcessor", "after_whole_rets", "end_after_whole_rets", "ends_of_rets", "last_rets",
           "offsets_of_tokens", "refuse_torn_rets"]  # fmt: skip
