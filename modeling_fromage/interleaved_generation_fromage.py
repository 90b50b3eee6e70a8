"""Answers of text and retrieved images, in order: batched generation, retrieval, and images fed back into the context.

Section 3.3 of the paper; feeding a retrieved image back goes beyond it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .backbones_fromage import context_length
from .image_ids_fromage import as_ids
from .images_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError
from .plain_text_fromage import AnswerText

logger = logging.getLogger(__name__)
Segment = dict[str, Any]
MAX_NEW_TOKENS = 64  # where it is not said
_SPARE_IMAGES = 3  # more are looked up than are wanted, in case some cannot be read (as the authors' code)


@dataclass
class _Row:
    """One prompt and what became of it."""

    ids: list[int]  # the context so far
    features: list[torch.Tensor]  # (vision width,) of each of its images
    shown: list[str]  # ids of images that are not to be shown again
    tokens_left: int
    segments: list[Segment] = field(default_factory=list)
    rets: int = 0
    done: bool = False


class InterleavedGeneration:
    """Continues prompts with text and, for each `[RET]` that the model writes, images of an index.

    Args:
        model ([`FromageForConditionalGeneration`]), processor ([`FromageProcessor`]): From one checkpoint.
        index ([`FromageImageIndex`], *optional*): Without it the answers are text, with the marker `[RET]` in it.
        images_per_ret: Images shown for each `[RET]`, fewer where the index has no more.
        feed_images_back: Whether an image that was found goes into the context, so that the model goes on about it.
        max_new_tokens: Tokens of an answer, `[RET]` included. 0 retrieves for the `[RET]`s of the prompts themselves.
        stop_strings: What ends an answer; it and what follows is dropped.
        load_images: Whether to read the images; `False` gives their ids and metadata alone.
        limits: What reading an image may cost.
        where: Of the index's images only those whose metadata has these values, as in its `search`.
        said: What is logged once; share it between objects that are to log it once together.
        generate_kwargs: For `model.generate`: `do_sample`, `num_beams`, `ret_bias`, `max_num_rets`, `streamer`, ...
            `eos_token_id=processor.ret_token_id` ends an answer with the image of its first `[RET]`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        index: Any = None,
        images_per_ret: int = 1,
        feed_images_back: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop_strings: Sequence[str] | None = None,
        load_images: bool = True,
        limits: ImageLimits = DEFAULT_LIMITS,
        where: dict[str, Any] | None = None,
        said: set[Any] | None = None,
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
        if index is not None:
            index.check_model(model)
        self.model, self.processor, self.index = model, processor, index
        self.images_per_ret, self.feed_images_back = images_per_ret, feed_images_back
        self.max_new_tokens = max_new_tokens
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        self.load_images, self.limits, self.where = load_images, limits, where or None
        self._said = set() if said is None else said
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
            texts: Prompts, with `<|image|>` where each image goes. As for the processor, special tokens in them are
                special; [`FromageProcessor.join_parts`] and `apply_chat_template` make prompts whose texts stay text.
            images: The images of each prompt.
            exclude_ids: Ids of images not to be shown, for each prompt: those that it has shown already.

        Returns:
            For each prompt a list of `{"type": "text", "text": ...}` and `{"type": "image", "id": ..., "score": ...
            (cosine), "image": PIL or None, "metadata": {...}, "ret_index": ...}`; images of one `[RET]` have its
            number as their `ret_index`.

        Raises:
            ValueError: A prompt is empty, is too long, or has not as many images as placeholders; or the index is of
                another model.
        """
        images = [[]] * len(texts) if images is None else images
        exclude_ids = [[]] * len(texts) if exclude_ids is None else exclude_ids
        rows = self._rows(texts, images, exclude_ids)
        if self.max_new_tokens == 0:
            self._look_up_prompts(rows)
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
    def _rows(self, texts, images, exclude_ids) -> list[_Row]:
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
        """(N, vision width)."""
        return self.model.get_pooled_image_features(pixels.to(self.model.device, self.model.vision_model.dtype))

    def _inputs(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
        """A left-padded batch of the contexts."""
        padded = self.processor.tokenizer.pad(
            {"input_ids": [row.ids for row in rows]}, padding_side="left", return_tensors="pt"
        )
        inputs = {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        features = [feature for row in rows for feature in row.features]
        return {**inputs, "pooled_image_features": torch.stack(features)} if features else inputs

    # ---- writing --------------------------------------------------------------------------------------------------

    def _may_ret(self, row: _Row) -> bool:
        return self.max_num_rets is None or row.rets < self.max_num_rets

    def _continue(self, rows: list[_Row], may_ret: bool):
        """Generate on; up to the next `[RET]` where its image is to be fed back."""
        tokens_left = max(row.tokens_left for row in rows)
        longest = max(rows, key=lambda row: len(row.ids))
        if len(rows) > 1 and len(longest.ids) + tokens_left > context_length(self.model.config.text_config):
            # Each may fit by itself, but not the longest with the tokens that another has left.
            self._continue([longest], may_ret)
            self._continue([row for row in rows if row is not longest], may_ret)
            return
        inputs = self._inputs(rows)
        options = {"pad_token_id": self.processor.tokenizer.pad_token_id, **self.generate_kwargs}
        eos_ids = self.eos_ids
        if self.feed_images_back and may_ret:
            eos_ids = eos_ids + self._ret_ids()
            if rows[0].rets:
                options["min_tokens_before_ret"] = 0  # there were as many, before the first [RET]
        if self.stop_strings:
            options.update(stop_strings=self.stop_strings, tokenizer=self.processor.tokenizer)
        output = self.model.generate(
            **inputs,
            max_new_tokens=tokens_left,
            max_num_rets=self.max_num_rets if may_ret else 0,
            eos_token_id=eos_ids or self.processor.image_token_id,  # never written: `None` would mean the model's own
            return_dict_in_generate=True,
            **options,
        )
        width = inputs["input_ids"].shape[1]
        for row, sequence, embeds in zip(rows, output.sequences[:, width:].tolist(), output.ret_embeds, strict=True):
            self._take_in(row, sequence, embeds)

    def _ret_ids(self) -> list[int]:
        config = self.model.config
        return list(range(config.ret_token_id, config.ret_token_id + config.num_ret_tokens))

    def _take_in(self, row: _Row, tokens: list[int], embeds: torch.Tensor):
        """Append generated `tokens`, of which the `[RET]`s have `embeds` (R, q), to a row's segments."""
        ret_ids = set(self._ret_ids())
        end = next((i for i, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
        end += end < len(tokens) and tokens[end] in ret_ids  # where [RET] ends an answer, its image is part of it
        tokens = tokens[: min(end, row.tokens_left)]
        if self.feed_images_back:
            tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ret_ids), len(tokens))]
        row.done = not (self.feed_images_back and tokens and tokens[-1] in ret_ids)
        row.tokens_left -= len(tokens)
        row.ids += tokens
        row.done |= row.tokens_left <= 0
        self._append(row, tokens, embeds)

    def _append(self, row: _Row, tokens: list[int], embeds: torch.Tensor, stop_strings: Sequence[str] | None = None):
        """Tokens as text, up to a stop string, and `[RET]`s that wait for their images."""
        stop_strings = self.stop_strings if stop_strings is None else stop_strings
        ret_ids, embeds = set(self._ret_ids()), iter(embeds)
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
                row.segments.append({"type": "ret", "embed": next(embeds)})
            piece = []

    def _look_up_prompts(self, rows: list[_Row]):
        """Let the prompts' own `[RET]`s wait for their images."""
        inputs = self._inputs(rows)
        for row, embeds in zip(rows, self.model.get_ret_embeds(**inputs), strict=True):
            self._append(row, row.ids, embeds, stop_strings=())
            row.done = True

    # ---- retrieving -----------------------------------------------------------------------------------------------

    def _retrieve(self, rows: list[_Row]):
        """Put images in the place of `[RET]`s, the first of every row together: later ones exclude what it shows."""
        while waiting := [row for row in rows if any(segment["type"] == "ret" for segment in row.segments)]:
            places = [next(i for i, s in enumerate(row.segments) if s["type"] == "ret") for row in waiting]
            embeds = [row.segments[place]["embed"] for row, place in zip(waiting, places, strict=True)]
            found = self._look_up(torch.stack(embeds), [row.shown for row in waiting])
            for row, place, segments in zip(waiting, places, found, strict=True):
                for segment in segments:
                    segment["ret_index"] = row.rets
                row.rets += 1
                row.shown += [segment["id"] for segment in segments]
                marker = AnswerText(self.processor.ret_token, rets=(0,))
                row.segments[place : place + 1] = segments or [{"type": "text", "text": marker}]

    def _look_up(self, embeds: torch.Tensor, shown: list[list[str]]) -> list[list[Segment]]:
        """The images for each of `embeds` (Q, q)."""
        if self.index is None:
            self._say_once(
                "no index",
                "The model wrote [RET], but there is no image index, so the text has a marker in its place. Give "
                "`index=`: a FromageImageIndex, its folder, or its repository.",
            )
            return [[] for _ in shown]
        wanted = self.images_per_ret + (_SPARE_IMAGES if self.load_images else 0)
        segments: list[list[Segment]] = [[] for _ in shown]
        for count, rows in self._counts(wanted, shown).items():
            excluded = [shown[i] for i in rows]
            filters = {} if self.where is None else {"where": self.where}
            ids, scores, metadata = self.index.search(embeds[rows], count, excluded, **filters)
            # With `where` a row may have fewer than `count` images, and scores of -inf behind them.
            for i, own_ids, own_scores, facts in zip(rows, ids, scores.tolist(), metadata, strict=True):
                segments[i] = self._images(list(zip(own_ids, own_scores[: len(own_ids)], facts, strict=True)))
        if min(map(len, segments)) < self.images_per_ret:
            self._say_once(
                ("few", self.images_per_ret),
                "The index has %d images to show that were not shown yet, fewer than `images_per_ret=%d`.",
                min(map(len, segments)), self.images_per_ret,
            )  # fmt: skip
        return segments

    def _counts(self, wanted: int, shown: list[list[str]]) -> dict[int, list[int]]:
        """How many images to look up, and for which rows: without `where` no more than are left."""
        if self.where is not None:
            return {wanted: list(range(len(shown)))}
        counts: dict[int, list[int]] = {}
        for row, ids in enumerate(shown):
            left = len(self.index) - sum(image_id in self.index for image_id in set(ids))
            if left:
                counts.setdefault(min(wanted, left), []).append(row)
        return counts

    def _say_once(self, reason: Any, message: str, *values: Any):
        if reason not in self._said:
            self._said.add(reason)
            logger.warning(message, *values)

    def _images(self, hits: list[tuple[str, float, dict[str, Any]]]) -> list[Segment]:
        """Of more hits than wanted the best, readable ones before others."""
        readable: list[Segment] = []
        unreadable: list[Segment] = []
        for image_id, score, facts in hits:
            segment = {"type": "image", "id": image_id, "score": score, "image": None, "metadata": facts}
            if not self.load_images:
                readable.append(segment)
            elif len(readable) < self.images_per_ret:
                try:
                    segment["image"] = self.index.load_image(image_id, self.limits)
                    readable.append(segment)
                except UnreadableImageError as error:
                    self._say_once(image_id, "%s", error)
                    unreadable.append(segment)
        return [*readable, *unreadable][: self.images_per_ret]

    def _feed_back(self, rows: list[_Row]):
        """Put the images of each row's last `[RET]` into its context, if it has room."""
        k, limit = self.model.config.num_image_tokens, context_length(self.model.config.text_config)
        for row in rows:
            last = [s for s in row.segments if s["type"] == "image" and s["ret_index"] == row.rets - 1]
            images = [segment["image"] for segment in last if segment["image"] is not None]
            if images and len(row.ids) + k * len(images) + row.tokens_left <= limit:
                pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    row.features += list(self._encode(pixels))
                row.ids += [self.processor.image_token_id] * (k * len(images))


def _trimmed(segments: list[Segment]) -> list[Segment]:
    """Neighbouring texts joined, the answer's ends without blanks, and no empty texts."""
    joined: list[Segment] = []
    for segment in segments:
        if segment["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1]["text"] = AnswerText.join([joined[-1]["text"], segment["text"]])
        else:
            joined.append(segment)
    for place, segment in enumerate(joined):
        if segment["type"] == "text":
            text = AnswerText.join([segment["text"]])
            segment["text"] = text.stripped(left=place == 0, right=place == len(joined) - 1)
    return [segment for segment in joined if segment["type"] != "text" or segment["text"]]


__all__ = ["InterleavedGeneration", "Segment"]
