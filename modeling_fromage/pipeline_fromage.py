"""The pipeline "interleaved-generation": chats and interleaved prompts in, texts and retrieved images out."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Pipeline
from transformers.utils.chat_template_utils import Chat

from .fetching_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError, is_url
from .images_fromage import load_rgb_image
from .interleaving_fromage import InterleavedGeneration, Segment
from .processing_fromage import FromageProcessor
from .retrieval_fromage import FromageImageIndex

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
                in as `{"role": "assistant", "content": answer}`, and its images are not shown again.
            batch_size: Prompts at a time.
            index, images_per_ret, feed_images_back, max_new_tokens, stop_strings, load_images, limits:
                See [`InterleavedGeneration`]. `stop_strings` defaults to a newline, which ends captions and the
                default template's answers; where the LM has a chat template of its own, chats end as it says.
            exclude_ids: Ids of images that are not to be shown, besides those that a prompt has shown.
            allow_local_files: Whether a message's strings may name files of this machine. Off, because messages
                often come from others; PIL images and `pathlib.Path` objects do not need it.
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
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("FromagePipeline needs a processor. Give `processor=`, from the model's checkpoint.")
        self.processor.check_config(self.model.config)

    def _sanitize_parameters(
        self,
        index: Any = None,
        limits: ImageLimits | None = None,
        allow_local_files: bool | None = None,
        exclude_ids: Sequence[str] | None = None,
        feed_images_back: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess_params = {
            "limits": limits,
            "allow_local_files": allow_local_files,
            "exclude_ids": exclude_ids,
            "feed_images_back": feed_images_back,
        }
        if isinstance(index, (str, os.PathLike)):
            index = FromageImageIndex.from_pretrained(index)
        forward_params = {"index": index, "limits": limits, "feed_images_back": feed_images_back}
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
    ) -> dict[str, Any]:
        """A prompt as text with placeholders, its images, and the ids of those that it has shown."""
        prompt = _wrap(prompt)
        stops = ["\n"]
        if isinstance(prompt, Chat):
            messages = [_with_parts(message, feed_images_back) for message in prompt.messages]
            parts = [part for message in messages for part in message["content"]]
            goes_on = messages[-1]["role"] == "assistant"
            text = self.processor.apply_chat_template(
                messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False
            )
            stops = self.processor.chat_stop_strings
        else:
            parts = _parts(prompt.parts, feed_images_back)
            text = self.processor.join_parts(parts)
            is_formatted = self.processor.caption_prefix or self.processor.caption_suffix
            if is_formatted and len(self.processor.shown_images(parts)) == len(parts):
                # Images alone ask for a caption, which the model learnt to write in this format.
                text += self.processor.caption_start
                stops = self.processor.caption_stop_strings
        images = [_read_image(part, limits, allow_local_files) for part in self.processor.shown_images(parts)]
        shown = [part["id"] for part in parts if part["type"] == "image" and "id" in part]
        return {"text": text, "images": images, "shown": [*shown, *exclude_ids], "stops": stops}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, list]:
        is_batch = isinstance(model_inputs["text"], list)
        rows = model_inputs if is_batch else {name: [value] for name, value in model_inputs.items()}
        segments: list[list[Segment]] = [[] for _ in rows["text"]]
        for stops in {tuple(stops) for stops in rows["stops"]}:
            places = [i for i, own in enumerate(rows["stops"]) if tuple(own) == stops]
            generation = InterleavedGeneration(self.model, self.processor, **{"stop_strings": stops, **options})
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

    Args:
        pipe ([`FromagePipeline`]): The pipeline that answers.
        system (`str`, *optional*): A system message to begin with.
        kwargs: For every call of the pipeline.
    """

    def __init__(self, pipe: FromagePipeline, system: str | None = None, **kwargs: Any):
        self.pipe, self.kwargs = pipe, kwargs
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]

    def send(self, *content: Any, **kwargs: Any) -> list[Segment]:
        """Say texts and show images, in order; returns the answer. A turn that fails is not remembered."""
        messages = [*self.messages, {"role": "user", "content": [_as_part(part) for part in content]}]
        answer = self.pipe(messages, **{**self.kwargs, **kwargs})
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


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
    return {**message, "content": _parts([content] if isinstance(content, str) else content, feed_images_back)}


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
        if part.get("type") == "image":
            return part
        if part.get("type") == "image_url" and "image_url" in part:  # as in OpenAI's messages
            url = part["image_url"]
            return {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
    raise ValueError(
        f"Expected a text, a PIL image, a Path or a message's part of type 'text' or 'image', got {str(part)[:200]!r}."
    )


def _read_image(part: dict[str, Any], limits: ImageLimits, allow_local_files: bool) -> Image.Image:
    source = FromageProcessor.image_source(part)
    if source is None:
        raise ValueError(f"An image of a prompt needs one of 'image', 'url' and 'path', got {sorted(part)}.")
    if isinstance(source, str) and not is_url(source) and not allow_local_files:
        raise UnreadableImageError(
            source[:200], "local files are refused", "`allow_local_files=True` allows them, as does a Path or PIL image"
        )
    return load_rgb_image(source, limits)


__all__ = ["FromageChat", "FromagePipeline"]
