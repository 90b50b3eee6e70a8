"""The pipeline "interleaved-generation": chats and interleaved prompts in, texts and retrieved images out."""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Pipeline
from transformers.utils.chat_template_utils import Chat

from .backbones_fromage import context_length
from .image_ids_fromage import as_ids
from .images_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError, is_url, load_rgb_image
from .interleaved_generation_fromage import MAX_NEW_TOKENS, InterleavedGeneration, Segment
from .processing_fromage import FromageProcessor

logger = logging.getLogger(__name__)
TASK = "interleaved-generation"
_ONE_PART = (str, Image.Image, Path, dict)


@dataclass
class _Interleaved:
    """An interleaved prompt, which transformers would take for a batch if it were a list."""

    parts: list[Any]


class FromagePipeline(Pipeline):
    """Answers prompts with text and images, in the order in which the model gives them.

    Args:
        model, processor: As for every pipeline: objects, or found by the model's name.
        index ([`FromageImageIndex`] or `str`, *optional*): An index, its folder, or its repository. Without it a
            `[RET]` of the model stays a marker in the text.
        image_root (`str`, *optional*): Where `index` is a folder or repository, the folder below which its images are.
        kwargs: Defaults of [`__call__`]'s.

    Example:

        pipe = pipeline("interleaved-generation", model="org/fromage", index="org/index")
        pipe([photo, "What goes well with this?"])
        # [{"type": "text", "text": "a glass of"}, {"type": "image", "id": "wine.jpg", "score": 0.71, "image": ...}]
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = False  # it sets lengths and stops that InterleavedGeneration sets itself

    def __call__(self, inputs: Any, **kwargs: Any) -> list[Segment] | list[list[Segment]]:
        """
        Args:
            inputs: A chat (messages with roles), an interleaved prompt (a list of texts and PIL images, or one text),
                or a list of either. Datasets and generators of prompts give an iterator. Images alone ask for a
                caption, in the format that the processor has from training.
                A message's content is a text or a list of parts, as in transformers; an answer of this pipeline goes
                in as `{"role": "assistant", "content": answer}`, and its images are not shown again. What a text says
                is text: a `<|image|>`, `[RET]` or `</s>` in it is not the token. A part `{"type": "ret"}` is a `[RET]`;
                with `max_new_tokens=0`, which shows the images of a prompt's own `[RET]`s, those in the texts of an
                interleaved prompt are meant too.
            batch_size: Prompts at a time.
            index, images_per_ret, feed_images_back, max_new_tokens, stop_strings, load_images, limits, where:
                See [`InterleavedGeneration`]. `stop_strings` defaults to a newline, which ends captions and the
                default template's answers; where the LM has a chat template of its own, chats end as it says.
            exclude_ids: Ids of images (or a single id) that are not to be shown, besides those that a prompt has shown.
            image_root: Where `index` is given as a folder or repository, the folder below which its images are.
            allow_local_files: Whether a message may name files of this machine. Off, because messages often come from
                others: then an image is a PIL image, a `pathlib.Path` object, a URL, or bytes (`{"bytes": ...}`).
            kwargs: Any option of `generate`.

        Returns:
            A list of segments a prompt: `{"type": "text", "text": ...}` and `{"type": "image", "id": ..., "score": ...,
            "image": PIL or None, "metadata": {...}, "ret_index": ...}`.

        Raises:
            ValueError: A prompt is empty, too long, or of no known kind; an image cannot be read or is refused.
        """
        if isinstance(inputs, (list, tuple)) and inputs and all(isinstance(item, (list, tuple)) for item in inputs):
            inputs = [_wrap(item) for item in inputs]
        elif isinstance(inputs, (list, tuple, *_ONE_PART)):
            inputs = _wrap(inputs)
        return super().__call__(inputs, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any):
        self._said: set[Any] = set()
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("FromagePipeline needs a processor. Give `processor=`, from the model's checkpoint.")
        self.processor.check_config(self.model.config)

    def _sanitize_parameters(
        self,
        index: Any = None,
        image_root: str | os.PathLike | None = None,
        limits: ImageLimits | None = None,
        allow_local_files: bool | None = None,
        exclude_ids: Sequence[str] | str | None = None,
        feed_images_back: bool | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if max_new_tokens is None:
            max_new_tokens = (generate_kwargs or {}).get("max_new_tokens")
        preprocess_params = {
            "limits": limits,
            "allow_local_files": allow_local_files,
            "exclude_ids": None if exclude_ids is None else as_ids(exclude_ids),
            "feed_images_back": feed_images_back,
            "rets_in_text": None if max_new_tokens is None else max_new_tokens == 0,
        }
        if isinstance(index, (str, os.PathLike)):
            index = _open_index(index, image_root)
        elif image_root is not None:
            raise ValueError(
                f"`image_root` goes with an index that is given as a folder or repository, got {type(index)}. Set it "
                "on the index itself, as `FromageImageIndex.from_pretrained(..., image_root=...)` does."
            )
        forward_params = {
            "index": index,
            "limits": limits,
            "feed_images_back": feed_images_back,
            "max_new_tokens": max_new_tokens,
        }
        preprocess_params, forward_params = (
            {name: value for name, value in params.items() if value is not None}
            for params in (preprocess_params, forward_params)
        )
        return preprocess_params, {**forward_params, **(generate_kwargs or {}), **kwargs}, {}

    def preprocess(
        self,
        prompt: Any,
        limits: ImageLimits = DEFAULT_LIMITS,
        allow_local_files: bool = False,
        exclude_ids: Sequence[str] = (),
        feed_images_back: bool = False,
        rets_in_text: bool = False,
    ) -> dict[str, Any]:
        """A prompt as text with placeholders, its images, and the ids of those that it has shown."""
        text, parts, stops = self._as_text(_wrap(prompt), feed_images_back, rets_in_text)
        images = [_read_image(part, limits, allow_local_files) for part in self.processor.shown_images(parts)]
        shown = _shown_ids(parts)
        return {"text": text, "images": images, "shown": [*shown, *exclude_ids], "stops": stops}

    def _as_text(
        self, prompt: Chat | _Interleaved, feed_images_back: bool, rets_in_text: bool = False
    ) -> tuple[str, list[dict[str, Any]], list[str]]:
        """A prompt as text with placeholders, its parts, and what ends its answer."""
        if isinstance(prompt, Chat):
            messages = [_with_parts(message, feed_images_back) for message in prompt.messages]
            parts = [part for message in messages for part in message["content"]]
            goes_on = messages[-1]["role"] == "assistant"
            text = self.processor.apply_chat_template(
                messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False
            )
            return text, parts, self.processor.chat_stop_strings
        parts = _parts(prompt.parts, feed_images_back)
        text, stops = self.processor.join_parts(parts, rets_in_text), ["\n"]
        is_formatted = self.processor.caption_prefix or self.processor.caption_suffix
        if is_formatted and len(self.processor.shown_images(parts)) == len(parts):
            # Images alone ask for a caption, which the model learnt to write in this format.
            text += self.processor.caption_start
            stops = self.processor.caption_stop_strings
        return text, parts, stops

    def tokens_left(self, prompt: Any, **kwargs: Any) -> float:
        """How many tokens of the language model's context a prompt and `max_new_tokens` leave, with `kwargs` as for
        [`__call__`]: negative where they do not fit, infinite where the context has no end."""
        kwargs.pop("index", None)  # it does not matter, and opening one takes time
        preprocess_params, forward_params, _ = self._sanitize_parameters(**{**kwargs, "image_root": None})
        options = {**self._preprocess_params, **self._forward_params, **preprocess_params, **forward_params}
        feed_images_back, rets_in_text = (options.get(name, False) for name in ("feed_images_back", "rets_in_text"))
        text = self._as_text(_wrap(prompt), feed_images_back, rets_in_text)[0]
        used = self.processor.count_tokens(text) + options.get("max_new_tokens", MAX_NEW_TOKENS)
        return context_length(self.model.config.text_config) - used

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, list]:
        is_batch = isinstance(model_inputs["text"], list)
        rows = model_inputs if is_batch else {name: [value] for name, value in model_inputs.items()}
        segments: list[list[Segment]] = [[] for _ in rows["text"]]
        for stops in {tuple(stops) for stops in rows["stops"]}:
            places = [i for i, own in enumerate(rows["stops"]) if tuple(own) == stops]
            defaults = {"stop_strings": stops, "said": self._said}
            generation = InterleavedGeneration(self.model, self.processor, **{**defaults, **options})
            answers = generation(*([rows[name][i] for i in places] for name in ("text", "images", "shown")))
            for place, answer in zip(places, answers, strict=True):
                segments[place] = answer
        return {"segments": segments if is_batch else segments[0]}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Segment]:
        return model_outputs["segments"]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any):
        """Save the model, the processor and this pipeline's code, so that `pipeline(model=...)` finds it. The index
        goes to a folder or repository of its own."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


class FromageChat:
    """A conversation with a [`FromagePipeline`]: remembers what was said and shown.

    Where it grows beyond the language model's context, its oldest turns are forgotten: a message of the user and what
    was answered. System messages stay, and images that were shown are not shown again.

    Args:
        pipe ([`FromagePipeline`]): The pipeline that answers.
        system (`str`, *optional*): A system message to begin with.
        kwargs: For every call of the pipeline.
    """

    def __init__(self, pipe: FromagePipeline, system: str | None = None, **kwargs: Any):
        self.pipe, self.kwargs = pipe, kwargs
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._forgotten_ids: list[str] = []  # of the images shown in turns that were forgotten
        self._forgets = False

    def send(self, *content: Any, **kwargs: Any) -> list[Segment]:
        """Say texts and show images, in order; returns the answer. A turn that fails is not remembered.

        Raises:
            ValueError: As [`FromagePipeline.__call__`]; this message alone is too long, say.
        """
        options = {**self.kwargs, **kwargs}
        messages = [*self.messages, {"role": "user", "content": [_as_part(part) for part in content]}]
        messages, forgotten = self._fitting(messages, options)
        shown = [_shown_ids(_with_parts(message, False)["content"]) for message in forgotten]
        forgotten_ids = sum(shown, self._forgotten_ids)
        if forgotten_ids:
            excluded = options.get("exclude_ids", self.pipe._preprocess_params.get("exclude_ids"))
            options["exclude_ids"] = [*as_ids(excluded or ()), *forgotten_ids]
        answer = self.pipe(messages, **options)
        if forgotten and not self._forgets:
            self._forgets = True
            logger.warning("The chat exceeds the language model's context, so its oldest turns are forgotten.")
        self.messages, self._forgotten_ids = [*messages, {"role": "assistant", "content": answer}], forgotten_ids
        return answer

    def _fitting(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[list, list]:
        """The messages that are left when as many of the oldest turns are forgotten as must be; and those."""
        start = next(i for i, message in enumerate(messages) if message["role"] in ("user", "assistant"))
        kept, forgotten = messages, []
        while self.pipe.tokens_left(kept, **options) < 0:
            turns = [i for i, message in enumerate(kept) if message["role"] == "user" and i > start]
            if not turns:
                break  # the last message is too long by itself, which the pipeline says
            forgotten += kept[start : turns[0]]
            kept = kept[:start] + kept[turns[0] :]
        return kept, forgotten


def _open_index(name: str | os.PathLike, image_root: str | os.PathLike | None) -> Any:
    """The index of a folder or repository, where the package is installed: a checkpoint does not carry its code."""
    try:
        from modeling_fromage.index import FromageImageIndex
    except ImportError as error:
        raise ImportError(
            f"An index by its name ({name}) is opened by the package alone: pip install modeling-fromage. Or give "
            "`index` an object with `search` and `load_image`."
        ) from error
    return FromageImageIndex.from_pretrained(name, image_root=image_root)


def _wrap(prompt: Any) -> Chat | _Interleaved:
    """A prompt as what it is; one text, image or message is a prompt too."""
    if isinstance(prompt, (Chat, _Interleaved)):
        return prompt
    if isinstance(prompt, _ONE_PART):
        prompt = [prompt]
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(
            f"Expected a text, a list of texts and images, or a list of messages, got {type(prompt)}. Give the prompts "
            'of a dataset as a generator: `pipe(row["text"] for row in dataset)`.'
        )
    prompt = list(prompt)
    if not prompt:
        raise ValueError("The prompt is empty. Give it a text or an image.")
    return Chat(prompt) if all(isinstance(part, dict) and "role" in part for part in prompt) else _Interleaved(prompt)


def _with_parts(message: dict[str, Any], feed_images_back: bool) -> dict[str, Any]:
    content = message.get("content") or []
    content = content if isinstance(content, (list, tuple)) else [content]
    return {**message, "content": _parts(content, feed_images_back)}


def _parts(content: Sequence[Any], feed_images_back: bool) -> list[dict[str, Any]]:
    """Parts of a message; with `feed_images_back`, the images of a `[RET]` once more behind it, to be looked at."""
    parts = [_as_part(part) for part in content]
    if not feed_images_back:
        return parts
    seen: list[dict[str, Any]] = []
    for ret, group in itertools.groupby(parts, key=lambda part: part.get("ret_index")):
        retrieved = list(group)
        seen += retrieved
        if ret is not None:
            seen += [{"type": "image", "image": part["image"]} for part in retrieved if part.get("image") is not None]
    return seen


def _as_part(part: Any) -> dict[str, Any]:
    """A text, an image, or a part of a message, as the last."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, (Image.Image, Path)):
        return {"type": "image", "image": part}
    if isinstance(part, dict):
        part = {name: value for name, value in part.items() if value is not None}  # tables fill in what is absent
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part
        if part.get("type") in ("image", "ret"):
            return part
        if part.get("type") == "image_url" and "image_url" in part:  # as in OpenAI's messages
            url = part["image_url"]
            return {"type": "image", "url": url.get("url") if isinstance(url, dict) else url}
    raise ValueError(
        "Expected a text, a PIL image, a Path or a message's part of type 'text', 'image' or 'ret', got "
        f"{str(part)[:200]!r}."
    )


def _shown_ids(parts: list[dict[str, Any]]) -> list[str]:
    """Ids of the images of an index among a message's parts."""
    return [part["id"] for part in parts if part["type"] == "image" and isinstance(part.get("id"), str)]


def _read_image(part: dict[str, Any], limits: ImageLimits, allow_local_files: bool) -> Image.Image:
    source = FromageProcessor.image_source(part)
    if source is None:
        raise ValueError(f"An image of a prompt needs one of 'image', 'url' and 'path', got {sorted(part)}.")
    harmless = _harmless(source)
    if harmless is None and not allow_local_files:
        raise UnreadableImageError(
            str(source)[:200],
            "local files are refused",
            "an image is a URL, bytes, a PIL image or a Path; `allow_local_files=True` allows files' names",
        )
    return load_rgb_image(source if harmless is None else harmless, limits)


def _harmless(source: Any) -> Any:
    """What a part names as its image, if that can be no file that a message's text chose; else `None`."""
    if isinstance(source, (bytes, bytearray)):
        return {"bytes": bytes(source)}
    if isinstance(source, dict) and isinstance(source.get("bytes"), (bytes, bytearray)) and source["bytes"]:
        return source  # it is not looked for at its path, which is a name alone
    if isinstance(source, dict) and not source.get("bytes"):
        source = source.get("path")
        return _harmless(source) if isinstance(source, str) else None
    if isinstance(source, str):
        source = str.__str__(source)  # what a subclass of it is read as
        return source if is_url(source) else None
    return source if isinstance(source, (Image.Image, Path)) else None


__all__ = ["FromageChat", "FromagePipeline"]
