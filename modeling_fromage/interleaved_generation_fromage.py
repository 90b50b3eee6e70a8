"""Answers of text and retrieved images, in order: batched generation, retrieval, and images fed back into the context.

Section 3.3 of the paper; feeding a retrieved image back goes beyond it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from .answer_rows_fromage import MAX_NEW_TOKENS, AnswerOptions, Row, RowEnds, SeededSampling, ret_options
from .backbones_fromage import context_length, room_for, rope_switch
from .contexts_fromage import Contexts
from .generation_fromage import RET_GENERATION_DEFAULTS
from .image_search_fromage import ImageIndex, ImageSearch, Segment
from .images_fromage import DEFAULT_LIMITS, ImageLimits
from .plain_text_fromage import AnswerText
from .prefix_cache_fromage import PrefixCache
from .ret_runs_fromage import after_whole_rets

if TYPE_CHECKING:
    from .modeling_fromage import FromageForConditionalGeneration
    from .processing_fromage import FromageProcessor


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
        prefix_cache ([`PrefixCache`], *optional*): What is known of texts that these prompts may begin with.
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
        prefix_cache: PrefixCache | None = None,
        **generate_kwargs: Any,
    ):
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("An answer is one sequence a prompt: leave `num_return_sequences` out.")
        if refused := {"generation_config", "max_length"} & generate_kwargs.keys():
            raise ValueError(f"Give the options of {sorted(refused)} one by one, and the length as `max_new_tokens`.")
        processor.check_config(model.config)
        self.model, self.processor = model, processor
        self.contexts = Contexts(model, processor, prefix_cache)
        self.logged: set[Any] = set() if logged is None else logged
        text_config: Any = model.config.text_config
        self.context_length, self.rope_switch = context_length(text_config), rope_switch(text_config)
        self.defaults: dict[str, Any] = {
            "index": index,
            "images_per_ret": images_per_ret,
            "feed_images_back": feed_images_back,
            "max_new_tokens": max_new_tokens,
            "stop_strings": stop_strings,
            "load_images": load_images,
            "limits": limits,
            "where": where,
            "eos_token_id": generate_kwargs.pop("eos_token_id", model.generation_config.eos_token_id),
        }
        for name in RET_GENERATION_DEFAULTS:
            default = getattr(model.generation_config, name, RET_GENERATION_DEFAULTS[name])
            self.defaults[name] = generate_kwargs.pop(name, default)
        self.generate_kwargs = generate_kwargs
        self.is_beam_search = (generate_kwargs.get("num_beams") or model.generation_config.num_beams or 1) > 1
        # Beams and assistants rearrange their caches; other kinds of caches cannot begin in the middle.
        others = ("use_cache", "past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens")
        own_cache = any(generate_kwargs.get(name) not in (None, True) for name in others)
        defaults = model.generation_config
        is_default = defaults.use_cache is not False and defaults.cache_implementation is None
        self._uses_prefixes = is_default and not (self.is_beam_search or own_cache)
        self._is_cached = generate_kwargs.get("use_cache", defaults.use_cache) is not False
        self._default_options = self.options()  # wrong ones are refused now

    def options(self, **own: Any) -> AnswerOptions:
        """One prompt's options: its own, and of the others those of all prompts.

        Args:
            own: Any of this class's own options, `eos_token_id`, those of `[RET]`, `temperature`, `top_k`, `top_p` and
                `seed`.

        Raises:
            ValueError: One is unknown, out of range, or does not apply.
        """
        known = {**self.defaults, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
        if unknown := own.keys() - known.keys():
            raise ValueError(f"{sorted(unknown)} are no options of one prompt. There are {sorted(known)}.")
        if self.is_beam_search and any(value != known[name] for name, value in own.items() if name != "seed"):
            raise ValueError("Beams take one set of options for all prompts of a batch.")
        values = {**known, **own}
        eos, stops = after_whole_rets(values.pop("eos_token_id"), self.model.config), values.pop("stop_strings")
        index, load, where, limits = (values.pop(name) for name in ("index", "load_images", "where", "limits"))
        images = ImageSearch(index, self.model, load, where, limits, self.logged)
        return AnswerOptions(
            images,
            eos_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
            stop_strings=[stops] if isinstance(stops, str) else list(stops or []),
            **values,
        )

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
        self.contexts.begin()
        rows = self.contexts.rows(texts, images, exclude_ids, [self._default_options] * len(texts))
        self.run(rows)
        return [trimmed(row.segments) for row in rows]

    def run(self, rows: Sequence[Row]) -> None:
        """Answer prompts, into their `segments`; [`trimmed`] they are an answer.

        One that is cancelled ends after its next token or search, without the images that were not looked up by then.
        """
        from_prompt = [row for row in rows if row.options.max_new_tokens == 0]
        if from_prompt:
            self._queue_prompt_rets(from_prompt)
            self._retrieve(from_prompt)
        while active := [row for row in rows if not row.done]:
            for group in self._groups(active):
                self._continue(group)
            self._retrieve(active)
            self._feed_back([row for row in active if row.options.feed_images_back and not row.done])

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that can run together: beams must all end alike."""
        if not self.is_beam_search:
            return [rows]
        parts = [[row for row in rows if (row.rets_left == 0) == none_left] for none_left in (False, True)]
        return [part for part in parts if part]

    # ---- generation ------------------------------------------------------------------------------------------------

    def _continue(self, rows: list[Row]) -> None:
        """Generate; where images are fed back, up to the next `[RET]`."""
        tokens_left = max(row.tokens_left for row in rows)
        if len(rows) > 1 and not _fit_together(rows, self.context_length, self.rope_switch):
            longest = max(rows, key=lambda row: len(row.ids))
            self._continue([longest])
            self._continue([row for row in rows if row is not longest])
            return
        inputs = self.contexts.batch(rows)
        width = inputs["input_ids"].shape[1]
        ends = None if self.is_beam_search else RowEnds(rows, self.processor.tokenizer, width, self._ret_ids())
        output: Any = self.model.generate(
            **inputs,
            **(self.contexts.known(rows, tokens_left) if self._uses_prefixes else {}),
            max_new_tokens=tokens_left,
            return_dict_in_generate=True,
            **{
                "pad_token_id": self.processor.tokenizer.pad_token_id,
                **self.generate_kwargs,
                **ret_options(rows),
                **self._ends(rows, ends),
            },
        )
        starts = [width - len(row.ids) for row in rows]
        sequences = output.sequences[:, width:].tolist() if ends is None else ends.generated
        for row, sequence, embeds in zip(rows, sequences, output.ret_embeds, strict=True):
            row.consume_generated(sequence, embeds, self.processor.tokenizer, self._ret_ids())
        if self._uses_prefixes:
            self.contexts.keep(rows, starts, width, output.get("past_key_values"))

    def _ends(self, rows: list[Row], ends: RowEnds | None) -> dict[str, Any]:
        """What ends answers, and samples of each row's own."""
        eos_ids = [row.eos_ids(self._ret_ids()) for row in rows]
        common = [token for token in eos_ids[0] if all(token in own for own in eos_ids)]
        # One is needed: `None` would be the model's.
        options: dict[str, Any] = {"eos_token_id": common or self.processor.image_token_id}
        if ends is None:
            if rows[0].options.stop_strings:
                options.update(stop_strings=rows[0].options.stop_strings, tokenizer=self.processor.tokenizer)
            return options
        criteria = self.generate_kwargs.get("stopping_criteria") or []
        options["stopping_criteria"] = StoppingCriteriaList([*criteria, ends])
        if any(row.options.temperature for row in rows):
            given = self.generate_kwargs.get("logits_processor") or []
            options["logits_processor"] = LogitsProcessorList([*given, SeededSampling(rows, ends)])
            options["do_sample"] = False  # the noise is in the scores
        return options

    def _ret_ids(self) -> list[int]:
        config: Any = self.model.config
        return list(range(config.ret_token_id, config.ret_token_id + config.num_ret_tokens))

    def _queue_prompt_rets(self, rows: list[Row]) -> None:
        """Queue a retrieval for each `[RET]` in the prompts."""
        inputs = self.contexts.batch(rows)
        for row, embeds in zip(rows, self.model.get_ret_embeds(**inputs), strict=True):
            row.append(row.ids, embeds, self.processor.tokenizer, self._ret_ids(), stop_strings=())
            row.done = True

    # ---- retrieval -------------------------------------------------------------------------------------------------

    def _retrieve(self, rows: list[Row]) -> None:
        """Replace queued retrievals by images, the first of each row in one batch: later ones exclude its images."""
        while waiting := [row for row in rows if not row.gives_up() and any(s["type"] == "ret" for s in row.segments)]:
            for search, count in {(row.options.images, row.options.images_per_ret) for row in waiting}:
                alike = [row for row in waiting if (row.options.images, row.options.images_per_ret) == (search, count)]
                try:
                    self._retrieve_next(alike, search, count)
                except Exception as error:  # of an index, which may be anybody's
                    if not all(row.is_isolated for row in alike):
                        raise
                    for row in alike:
                        row.segments, row.error, row.done = [], error, True

    def _retrieve_next(self, rows: list[Row], search: ImageSearch, count: int) -> None:
        places = [next(i for i, s in enumerate(row.segments) if s["type"] == "ret") for row in rows]
        embeds = [row.segments[place]["embed"] for row, place in zip(rows, places, strict=True)]
        found = search.retrieve(torch.stack(embeds), count, [row.shown for row in rows])
        for row, place, segments in zip(rows, places, found, strict=True):
            for segment in segments:
                segment["ret_index"] = row.rets
            row.rets += 1
            row.shown += [segment["id"] for segment in segments]
            marker = AnswerText(self.processor.ret_token, rets=(0,))
            row.segments[place : place + 1] = segments or [{"type": "text", "text": marker}]

    def _feed_back(self, rows: list[Row]) -> None:
        """Add the images of each row's last `[RET]` to its context, if it has room."""
        k, text_config = self.processor.num_image_tokens, self.model.config.text_config
        for row in rows:
            last = [s for s in row.segments if s["type"] == "image" and s["ret_index"] == row.rets - 1]
            images = [segment["image"] for segment in last if segment["image"] is not None]
            length = len(row.ids) + k * len(images)
            if images and length + row.tokens_left <= room_for(length, text_config, self._is_cached):
                self.contexts.append_images(row, images)


def _fit_together(rows: Sequence[Row], context: float, switch: float) -> bool:
    """Whether rows fit `context` padded to the longest, each with as many tokens as another has left, and lie on one
    side of the [`rope_switch`]."""
    lengths = [len(row.ids) for row in rows]
    most = max(lengths) + max(row.tokens_left for row in rows)
    return most <= context and (most <= switch or min(lengths) > switch)


def trimmed(segments: list[Segment]) -> list[Segment]:
    """Segments with adjacent texts joined, no white space at the answer's ends, and no empty texts."""
    joined: list[Segment] = []
    for segment in segments:
        if segment["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1]["text"] = AnswerText.concatenate([joined[-1]["text"], segment["text"]])
        else:
            joined.append(dict(segment))
    for place, segment in enumerate(joined):
        if segment["type"] == "text":
            text = AnswerText.concatenate([segment["text"]])
            segment["text"] = text.stripped(left=place == 0, right=place == len(joined) - 1)
    return [segment for segment in joined if segment["type"] != "text" or segment["text"]]


__all__ = ["MAX_NEW_TOKENS", "InterleavedGeneration", "Segment", "trimmed"]
