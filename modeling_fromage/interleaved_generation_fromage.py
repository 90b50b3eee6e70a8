"""Answers of text and retrieved images, in order: batched generation, retrieval, and images fed back into the context.

Section 3.3 of the paper; feeding a retrieved image back goes beyond it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .backbones_fromage import context_length
from .image_ids_fromage import as_ids
from .image_search_fromage import ImageIndex, ImageSearch, Segment
from .images_fromage import DEFAULT_LIMITS, ImageLimits
from .plain_text_fromage import AnswerText

if TYPE_CHECKING:
    from .modeling_fromage import FromageForConditionalGeneration
    from .processing_fromage import FromageProcessor

MAX_NEW_TOKENS = 64


@dataclass
class _Row:
    """A prompt and its answer so far."""

    ids: list[int]  # the context so far
    features: list[torch.Tensor]  # (vision width,) of each of its images
    shown: list[str]  # ids of images that must not be shown again
    tokens_left: int
    segments: list[Segment] = field(default_factory=list)
    rets: int = 0
    done: bool = False


class InterleavedGeneration:
    """Continues prompts with text and, for each `[RET]` that the model generates, images of an index.

    Args:
        model ([`FromageForConditionalGeneration`]), processor ([`FromageProcessor`]): From one checkpoint.
        index ([`ImageIndex`], *optional*): Without it the answers are text, with the marker `[RET]` in it.
        images_per_ret (`int`, defaults to 1): Images shown for each `[RET]`, fewer where the index has no more.
        feed_images_back (`bool`, defaults to `False`): Whether a retrieved image enters the context, so that the model
            continues from it.
        max_new_tokens (`int`, defaults to 64): Tokens of an answer, `[RET]` included. 0 retrieves for the `[RET]`s of
            the prompts themselves.
        stop_strings (`str` or `list[str]`, *optional*): Strings that end an answer and are not part of it.
        load_images (`bool`, defaults to `True`): Whether to read the images; `False` gives ids and metadata only.
        limits ([`ImageLimits`]): What reading an image may cost.
        where (`dict`, *optional*): Only images whose metadata has these values, as in the index's `search`.
        logged (`set`, *optional*): What was logged already; share it between objects that log things once together.
        generate_kwargs: For `model.generate`: `do_sample`, `num_beams`, `ret_bias`, `max_num_rets`, `streamer`, ...
            `eos_token_id=processor.ret_token_id` ends an answer with the image of its first `[RET]`.

    Raises:
        ValueError: An option is out of range or does not apply, or model, processor and index do not belong together.
    """

    def __init__(
        self,
        model: "FromageForConditionalGeneration",
        processor: "FromageProcessor",
        index: ImageIndex | None = None,
        images_per_ret: int = 1,
        feed_images_back: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop_strings: Sequence[str] | str | None = None,
        load_images: bool = True,
        limits: ImageLimits = DEFAULT_LIMITS,
        where: dict[str, Any] | None = None,
        logged: set[Any] | None = None,
        **generate_kwargs: Any,
    ):
        if images_per_ret < 1 or max_new_tokens < 0:
            raise ValueError(
                f"`images_per_ret` must be at least 1 and `max_new_tokens` at least 0, got {images_per_ret} and "
                f"{max_new_tokens}."
            )
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("An answer is one sequence a prompt: leave `num_return_sequences` out.")
        if refused := {"generation_config", "max_length"} & generate_kwargs.keys():
            raise ValueError(f"Give the options of {sorted(refused)} one by one, and the length as `max_new_tokens`.")
        if feed_images_back and not (index is not None and load_images):
            raise ValueError("`feed_images_back` needs an index, and `load_images`.")
        processor.check_config(model.config)
        self.model, self.processor = model, processor
        self.images = ImageSearch(index, model, load_images, where, limits, logged)
        self.images_per_ret, self.feed_images_back = images_per_ret, feed_images_back
        self.max_new_tokens = max_new_tokens
        text_config: Any = model.config.text_config
        self.context_length = context_length(text_config)
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        self.max_num_rets = generate_kwargs.pop("max_num_rets", getattr(model.generation_config, "max_num_rets", None))
        eos = generate_kwargs.pop("eos_token_id", model.generation_config.eos_token_id)
        self.eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.generate_kwargs = generate_kwargs

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        exclude_ids: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Segment]]:
        """Answer prompts.

        Args:
            texts: Prompts, with one `<|image|>` for each image. As in the processor, special tokens in them are tokens;
                [`FromageProcessor.join_parts`] and `apply_chat_template` make prompts whose texts stay text.
            images: The images of each prompt.
            exclude_ids: For each prompt, ids of images that must not be shown, such as those that it has shown.

        Returns:
            For each prompt a list of `{"type": "text", "text": ...}` and `{"type": "image", "id": ..., "score": ...
            (cosine), "image": PIL or None, "metadata": {...}, "ret_index": ...}`. Images of one `[RET]` have its number
            as their `ret_index`.

        Raises:
            ValueError: A prompt is empty or too long, or its images and placeholders differ in number.
        """
        images = [[]] * len(texts) if images is None else images
        exclude_ids = [[]] * len(texts) if exclude_ids is None else exclude_ids
        rows = self._rows(texts, images, exclude_ids)
        if self.max_new_tokens == 0:
            self._queue_prompt_rets(rows)
            self._retrieve(rows)
        while active := [row for row in rows if not row.done]:
            for may_ret in (True, False):
                some = [row for row in active if self._may_ret(row) == may_ret]
                if some:
                    self._continue(some, may_ret)
            self._retrieve(active)
            if self.feed_images_back:
                self._feed_back([row for row in active if not row.done])
        return [_trimmed(row.segments) for row in rows]

    @torch.no_grad()
    def _rows(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        exclude_ids: Sequence[Sequence[str]],
    ) -> list[_Row]:
        rows, pixels = [], []
        for number, (text, own, excluded) in enumerate(zip(texts, images, exclude_ids, strict=True)):
            if not text:
                raise ValueError(f"Prompt {number} is empty. Give it a text or an image.")
            inputs = self.processor(text=[text], images=list(own) or None, return_tensors="pt")
            count = text.count(self.processor.image_token)
            if count != len(own):
                raise ValueError(f"Prompt {number} has {count} image placeholders and {len(own)} images.")
            if own:
                pixels.append(inputs["pixel_values"])
            ids = inputs["input_ids"][0].tolist()
            rows.append(_Row(ids, [], as_ids(excluded), self.max_new_tokens))
        if pixels:
            features = iter(self._encode(torch.cat(pixels)))
            for row, own in zip(rows, images, strict=True):
                row.features = [next(features) for _ in own]
        return rows

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, vision width)."""
        return self.model.get_pooled_image_features(pixels.to(self.model.device, self.model.vision_model.dtype))

    def _inputs(self, rows: list[_Row]) -> dict[str, Any]:
        """A left-padded batch of the rows' contexts."""
        padded = self.processor.tokenizer.pad(
            {"input_ids": [row.ids for row in rows]}, padding_side="left", return_tensors="pt"
        )
        inputs = {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        features = [feature for row in rows for feature in row.features]
        return {**inputs, "pooled_image_features": torch.stack(features)} if features else inputs

    # ---- generation ------------------------------------------------------------------------------------------------

    def _may_ret(self, row: _Row) -> bool:
        return self.max_num_rets is None or row.rets < self.max_num_rets

    def _continue(self, rows: list[_Row], may_ret: bool) -> None:
        """Generate; where images are fed back, up to the next `[RET]`."""
        tokens_left = max(row.tokens_left for row in rows)
        longest = max(rows, key=lambda row: len(row.ids))
        if len(rows) > 1 and len(longest.ids) + tokens_left > self.context_length:
            # Each may fit on its own, but not the longest context with the tokens that another row has left.
            self._continue([longest], may_ret)
            self._continue([row for row in rows if row is not longest], may_ret)
            return
        inputs = self._inputs(rows)
        options = {"pad_token_id": self.processor.tokenizer.pad_token_id, **self.generate_kwargs}
        eos_ids = self.eos_ids
        if self.feed_images_back and may_ret:
            eos_ids = eos_ids + self._ret_ids()
            if rows[0].rets:
                options["min_tokens_before_ret"] = 0  # met before the first [RET]
        if self.stop_strings:
            options.update(stop_strings=self.stop_strings, tokenizer=self.processor.tokenizer)
        output: Any = self.model.generate(
            **inputs,
            max_new_tokens=tokens_left,
            max_num_rets=self.max_num_rets if may_ret else 0,
            eos_token_id=eos_ids or self.processor.image_token_id,  # never generated; `None` means the model's own
            return_dict_in_generate=True,
            **options,
        )
        width = inputs["input_ids"].shape[1]
        for row, sequence, embeds in zip(rows, output.sequences[:, width:].tolist(), output.ret_embeds, strict=True):
            self._consume_generated(row, sequence, embeds)

    def _ret_ids(self) -> list[int]:
        config: Any = self.model.config
        return list(range(config.ret_token_id, config.ret_token_id + config.num_ret_tokens))

    def _consume_generated(self, row: _Row, tokens: list[int], embeds: torch.Tensor) -> None:
        """Add generated `tokens`, whose R `[RET]`s have `embeds` (R, q), to a row's context and segments."""
        ret_ids = set(self._ret_ids())
        end = next((i for i, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
        end += end < len(tokens) and tokens[end] in ret_ids  # a [RET] that ends an answer is part of it
        tokens = tokens[: min(end, row.tokens_left)]
        if self.feed_images_back:
            tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ret_ids), len(tokens))]
        row.done = not (self.feed_images_back and tokens and tokens[-1] in ret_ids)
        row.tokens_left -= len(tokens)
        row.ids += tokens
        row.done |= row.tokens_left <= 0
        self._append(row, tokens, embeds, self.stop_strings)

    def _append(self, row: _Row, tokens: list[int], embeds: torch.Tensor, stop_strings: Sequence[str]) -> None:
        """Append tokens to a row's segments: text, up to a stop string, and a queued retrieval for each `[RET]`."""
        ret_ids, ret_embeds = set(self._ret_ids()), iter(embeds)
        piece: list[int] = []
        for token in [*tokens, None]:
            if token is not None and token not in ret_ids:
                piece.append(token)
                continue
            text = self.processor.tokenizer.decode(piece, skip_special_tokens=True)
            ends = [text.index(stop) for stop in stop_strings if stop in text]
            row.segments.append({"type": "text", "text": text[: min(ends, default=len(text))]})
            if ends:
                row.done = True
                return
            if token is not None:
                row.segments.append({"type": "ret", "embed": next(ret_embeds)})
            piece = []

    def _queue_prompt_rets(self, rows: list[_Row]) -> None:
        """Queue a retrieval for each `[RET]` in the prompts."""
        inputs = self._inputs(rows)
        for row, embeds in zip(rows, self.model.get_ret_embeds(**inputs), strict=True):
            self._append(row, row.ids, embeds, stop_strings=())
            row.done = True

    # ---- retrieval -------------------------------------------------------------------------------------------------

    def _retrieve(self, rows: list[_Row]) -> None:
        """Replace queued retrievals by images, the first of each row in one batch: later ones exclude its images."""
        while waiting := [row for row in rows if any(segment["type"] == "ret" for segment in row.segments)]:
            places = [next(i for i, s in enumerate(row.segments) if s["type"] == "ret") for row in waiting]
            embeds = [row.segments[place]["embed"] for row, place in zip(waiting, places, strict=True)]
            found = self.images.retrieve(torch.stack(embeds), self.images_per_ret, [row.shown for row in waiting])
            for row, place, segments in zip(waiting, places, found, strict=True):
                for segment in segments:
                    segment["ret_index"] = row.rets
                row.rets += 1
                row.shown += [segment["id"] for segment in segments]
                marker = AnswerText(self.processor.ret_token, rets=(0,))
                row.segments[place : place + 1] = segments or [{"type": "text", "text": marker}]

    def _feed_back(self, rows: list[_Row]) -> None:
        """Add the images of each row's last `[RET]` to its context, if it has room."""
        k = self.processor.num_image_tokens
        for row in rows:
            last = [s for s in row.segments if s["type"] == "image" and s["ret_index"] == row.rets - 1]
            images = [segment["image"] for segment in last if segment["image"] is not None]
            if images and len(row.ids) + k * len(images) + row.tokens_left <= self.context_length:
                pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    row.features += list(self._encode(pixels))
                row.ids += [self.processor.image_token_id] * (k * len(images))


def _trimmed(segments: list[Segment]) -> list[Segment]:
    """Segments with adjacent texts joined, no white space at the answer's ends, and no empty texts."""
    joined: list[Segment] = []
    for segment in segments:
        if segment["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1]["text"] = AnswerText.concatenate([joined[-1]["text"], segment["text"]])
        else:
            joined.append(segment)
    for place, segment in enumerate(joined):
        if segment["type"] == "text":
            text = AnswerText.concatenate([segment["text"]])
            segment["text"] = text.stripped(left=place == 0, right=place == len(joined) - 1)
    return [segment for segment in joined if segment["type"] != "text" or segment["text"]]


__all__ = ["InterleavedGeneration", "Segment"]
