"""What one prompt of a batch asks for, and how `generate` does it for each row by itself: its end, and its samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .image_search_fromage import ImageSearch, Segment

MAX_NEW_TOKENS = 64
_TAIL = 16  # tokens in which a stop string is looked for, beside one for each of its bytes
_COLDEST = 1e-6  # a temperature below would divide logits to infinities, which are all alike


@dataclass
class AnswerOptions:
    """What one prompt asks for; see [`InterleavedGeneration`].

    `temperature`, `top_k`, `top_p` and `seed` sample this answer by itself: from its seed it is the same whatever else
    is in the batch. A temperature of 0 takes the likeliest tokens.
    """

    images: ImageSearch
    images_per_ret: int = 1
    feed_images_back: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS
    stop_strings: Sequence[str] = ()
    eos_ids: Sequence[int] = ()
    max_num_rets: int | None = None
    min_tokens_before_ret: int = 0
    ret_bias: float = 0.0
    ret_scale_factor: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images_per_ret < 1 or self.max_new_tokens < 0:
            raise ValueError(
                f"`images_per_ret` must be at least 1 and `max_new_tokens` at least 0, got {self.images_per_ret} and "
                f"{self.max_new_tokens}."
            )
        if self.feed_images_back and not (self.images.index is not None and self.images.load_images):
            raise ValueError("`feed_images_back` needs an index, and `load_images`.")
        counts = (self.max_new_tokens, self.min_tokens_before_ret, self.max_num_rets or 0, self.top_k)
        if not all(0 <= count < 1 << 31 for count in counts):
            raise ValueError(
                "`max_new_tokens`, `min_tokens_before_ret`, `max_num_rets` and `top_k` must be from 0 to 2^31 - 1, got "
                f"{str(counts)[:200]}."
            )
        if math.isnan(self.ret_bias) or math.isnan(self.ret_scale_factor):
            raise ValueError(f"`ret_bias` and `ret_scale_factor` are {self.ret_bias} and {self.ret_scale_factor}.")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"`temperature` must be at least 0, and `top_p` above 0 and at most 1; got {self.temperature} and "
                f"{self.top_p}."
            )


@dataclass
class Row:
    """A prompt and its answer so far.

    Args:
        ids: The context: the prompt's tokens, and those of the answer.
        features: (vision width,) of each of its images.
        digests: Of these images, where prefixes are kept.
        shown: Ids of images that must not be shown again.
        on_token: Called with each token that is generated.
        is_cancelled: Asked after each token and search whether the answer is no longer wanted.
        is_isolated: Whether an error of its own search is kept in `error`, and the others' answers go on.
        is_stopped: Whether the answer has come to its end: by itself, or at a stop string.
        is_kept: Whether it is likely to come back longer, so that what is computed for it is kept.
    """

    ids: list[int]
    features: list[torch.Tensor]
    digests: list[bytes]
    shown: list[str]
    options: AnswerOptions
    on_token: Callable[[int], None] | None = None
    is_cancelled: Callable[[], bool] | None = None
    is_isolated: bool = False
    is_kept: bool = True
    error: Exception | None = None
    is_stopped: bool = False
    segments: list[Segment] = field(default_factory=list)
    num_generated: int = 0
    rets: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)
        self.generator = torch.Generator().manual_seed(self.options.seed)

    @property
    def tokens_left(self) -> int:
        return self.options.max_new_tokens - self.num_generated

    @property
    def rets_left(self) -> int | None:
        most = self.options.max_num_rets
        return None if most is None else max(0, most - self.rets)

    def gives_up(self) -> bool:
        """Whether the answer is no longer wanted: then it ends as it is, and nothing more is looked up for it."""
        if self.is_cancelled is None or not self.is_cancelled():
            return False
        self.segments = [segment for segment in self.segments if segment["type"] != "ret"]
        self.done = True
        return True

    def see(self, encoded: Sequence[tuple[torch.Tensor, bytes]]) -> None:
        """Add images: the features and the digest of each."""
        self.features += [features for features, _ in encoded]
        self.digests += [digest for _, digest in encoded]

    def eos_ids(self, ret_ids: Sequence[int]) -> list[int]:
        """What ends a call of `generate`: where images are fed back, the next `[RET]`, too, with its last token."""
        stops_at_ret = self.options.feed_images_back and self.rets_left != 0
        return [*self.options.eos_ids, *(ret_ids[-1:] if stops_at_ret else ())]

    def consume_generated(
        self, tokens: list[int], embeds: torch.Tensor, tokenizer: PreTrainedTokenizerBase, ret_ids: Sequence[int]
    ) -> None:
        """Add generated `tokens`, whose R `[RET]`s have `embeds` (R, q), to the context and the segments; but for a
        `[RET]` at the end that had no room for all of its tokens."""
        options = self.options
        end = next((i for i, token in enumerate(tokens) if token in options.eos_ids), len(tokens))
        self.is_stopped = end < len(tokens)
        end += end < len(tokens) and tokens[end] in ret_ids  # a [RET] that ends an answer is part of it
        tokens = tokens[: min(end, self.tokens_left)]
        if options.feed_images_back:
            tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token == ret_ids[-1]), len(tokens))]
        self.num_generated += len(tokens)
        if tokens and tokens[-1] in ret_ids[:-1]:
            tokens = tokens[: -1 - ret_ids.index(tokens[-1])]
        self.ids += tokens
        goes_on = options.feed_images_back and bool(tokens) and tokens[-1] == ret_ids[-1] and self.tokens_left > 0
        self.done = not goes_on
        self.append(tokens, embeds, tokenizer, ret_ids, options.stop_strings)

    def append(
        self,
        tokens: Sequence[int],
        embeds: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
        ret_ids: Sequence[int],
        stop_strings: Sequence[str],
    ) -> None:
        """Append tokens to the segments: text, up to a stop string, and a queued retrieval for each `[RET]`."""
        ret_embeds, piece = iter(embeds), []
        for token in [*tokens, None]:
            if token in ret_ids[:-1]:
                continue  # its last token stands for it
            if token is not None and token != ret_ids[-1]:
                piece.append(token)
                continue
            text: Any = tokenizer.decode(piece, skip_special_tokens=True)
            self.segments.append({"type": "text", "text": up_to_stop(text, stop_strings)})
            if any(stop in text for stop in stop_strings):
                self.done = self.is_stopped = True
                return
            if token is not None:
                self.segments.append({"type": "ret", "embed": next(ret_embeds)})
            piece = []


def up_to_stop(text: str, stop_strings: Sequence[str]) -> str:
    """`text` before the first of the `stop_strings` in it."""
    return text[: min((text.index(stop) for stop in stop_strings if stop in text), default=len(text))]


def ret_options(rows: Sequence[Row]) -> dict[str, Any]:
    """The options of `[RET]` for `generate`, of each row where they differ."""
    options: dict[str, list[Any]] = {
        "ret_bias": [row.options.ret_bias for row in rows],
        "ret_scale_factor": [row.options.ret_scale_factor for row in rows],
        # Where images are fed back, it is met before the first [RET].
        "min_tokens_before_ret": [0 if row.rets else row.options.min_tokens_before_ret for row in rows],
        "max_num_rets": [row.rets_left for row in rows],
    }
    return {name: own[0] if own.count(own[0]) == len(own) else own for name, own in options.items()}


class RowEnds(StoppingCriteria):
    """Ends each row as its own options say, and tells it of its tokens.

    Args:
        rows: Of the batch, in order.
        tokenizer: For stop strings.
        width (`int`): Columns of the prompts.
        ret_ids: Ids of `[RET]`.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, width: int, ret_ids: Sequence[int]):
        self.rows, self.tokenizer, self.seen = rows, tokenizer, width
        self.eos_ids, self.ret_ids = [set(row.eos_ids(ret_ids)) for row in rows], set(ret_ids)
        longest = [max((len(stop.encode(errors="surrogatepass")) for stop in row.options.stop_strings), default=0)
                   for row in rows]  # fmt: skip
        self.tails = [_TAIL + length for length in longest]
        self.generated: list[list[int]] = [[] for _ in rows]
        self.ended = [False for _ in rows]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for number, new in enumerate(input_ids[:, self.seen :].tolist()):  # several with assistance
            for token in new:
                if not self.ended[number]:
                    self.generated[number].append(token)
                    self.ended[number] = self._ends(number, token)
        self.seen = input_ids.shape[1]
        return torch.tensor(self.ended, device=input_ids.device)

    def _ends(self, number: int, token: int) -> bool:
        row, generated = self.rows[number], self.generated[number]
        if row.on_token is not None:
            row.on_token(token)
        if len(generated) >= row.tokens_left or token in self.eos_ids[number]:
            return True
        if row.is_cancelled is not None and row.is_cancelled():
            return True
        if not row.options.stop_strings:
            return False
        tail = generated[-self.tails[number] :]
        rets = [place for place, each in enumerate(tail, 1) if each in self.ret_ids]
        tail = tail[max(rets, default=0) :]  # no text goes on behind an image
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in row.options.stop_strings)


class SeededSampling(LogitsProcessor):
    """Samples each row by its own temperature, `top_k`, `top_p` and generator, for a `generate` that takes the largest
    score: Gumbel noise on log-probabilities is largest where a sample would have fallen.

    A row's noise is drawn from its own generator, and none once it has ended, so that its answer does not depend on
    what else is in the batch.
    """

    def __init__(self, rows: Sequence[Row], ends: RowEnds):
        self.rows, self.ends = rows, ends
        self.warpers = [_warpers(row.options) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for number, (row, warpers) in enumerate(zip(self.rows, self.warpers, strict=True)):
            if not row.options.temperature or self.ends.ended[number]:
                continue
            here = slice(number, number + 1)
            for warper in warpers:
                scores[here] = warper(input_ids[here], scores[here])
            noise = torch.empty(scores.shape[1]).exponential_(generator=row.generator).log()  # minus a Gumbel sample
            scores[here] -= noise.to(scores)
        return scores


def _warpers(options: AnswerOptions) -> list[LogitsProcessor]:
    if not options.temperature:
        return []
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(max(_COLDEST, float(options.temperature)))]
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return warpers


__all__ = ["MAX_NEW_TOKENS", "AnswerOptions", "Row", "RowEnds", "SeededSampling", "ret_options", "up_to_stop"]
