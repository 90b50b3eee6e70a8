"""The pipeline "interleaved-generation": chats and interleaved prompts in, texts and retrieved images out."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Pipeline
from transformers.utils.chat_template_utils import Chat

from .backbones_fromage import room_for
from .image_ids_fromage import as_ids
from .image_search_fromage import ImageIndex, ImageSearch, Segment, open_index
from .images_fromage import DEFAULT_LIMITS, ImageLimits
from .interleaved_generation_fromage import MAX_NEW_TOKENS, InterleavedGeneration
from .messages_fromage import (
    SINGLE_PARTS,
    InterleavedPrompt,
    Part,
    as_part,
    as_parts,
    as_prompt,
    read_image,
    shown_ids,
    shown_images,
    with_parts,
)
from .prefix_cache_fromage import PrefixCache
from .processing_fromage import FromageProcessor
from .prompts_fromage import TEXT_STOP_STRINGS

if TYPE_CHECKING:
    from .modeling_fromage import FromageForConditionalGeneration

logger = logging.getLogger(__name__)
TASK = "interleaved-generation"


@dataclass(frozen=True)
class _PromptOptions:
    """How prompts are read: see [`FromagePipeline.__call__`]."""

    limits: ImageLimits = DEFAULT_LIMITS
    allow_local_files: bool = False
    exclude_ids: Sequence[str] = ()
    feed_images_back: bool = False
    rets_in_text: bool = False


class FromagePipeline(Pipeline):
    """Answers prompts with texts and images, in the order in which the model gives them.

    Args:
        model ([`FromageForConditionalGeneration`]), processor ([`FromageProcessor`]): As in every pipeline: objects, or
            found by the model's name.
        index ([`ImageIndex`] or `str`, *optional*): Any object with `search`, such as [`FromageImageIndex`], or the
            folder or repository of one. Without it a `[RET]` of the model stays a marker in the text.
        image_root (`str`, *optional*): Where `index` is a folder or repository, the folder below which its images are.
        prefix_cache ([`PrefixCache`], *optional*): What the turns of chats so far have computed, so that the next ones
            need not start over: by default up to 256 MiB. `PrefixCache(max_bytes=0)` keeps nothing.
        kwargs: Defaults for [`__call__`].

    Raises:
        ValueError: There is no processor, or it does not belong to the model.
        ImportError: `index` is a folder or repository, and the `modeling-fromage` package is not installed.

    Example:

        pipe = pipeline("interleaved-generation", model="org/fromage", index="org/index")
        pipe([photo, "What goes well with this?"])
        # [{"type": "text", "text": "a glass of"}, {"type": "image", "id": "wine.jpg", "score": 0.71, "image": ...}]
        pipe.search("a red square", top_k=5)
        # [{"type": "image", "id": "square.jpg", "score": 0.64, "image": ..., "metadata": {...}}, ...]
    """

    # transformers annotates these as None, although they are meant to be set.
    _load_processor, _load_tokenizer, _load_image_processor, _load_feature_extractor = True, False, False, False  # type: ignore[assignment]
    model: "FromageForConditionalGeneration"
    processor: FromageProcessor

    def __init__(self, *args: Any, prefix_cache: PrefixCache | None = None, **kwargs: Any):
        self.prefix_cache = PrefixCache() if prefix_cache is None else prefix_cache
        self._logged: set[Any] = set()
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("FromagePipeline needs a processor. Give `processor=`, from the model's checkpoint.")
        self.processor.check_config(self.model.config)

    @property
    def index(self) -> ImageIndex | None:
        """The index that is searched; an object with `search`, a folder or a repository can be assigned."""
        return self._forward_params.get("index")

    @index.setter
    def index(self, index: ImageIndex | str | os.PathLike[str] | None) -> None:
        self._forward_params["index"] = open_index(index) if isinstance(index, (str, os.PathLike)) else index

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> list[Segment] | list[list[Segment]]:
        """Answer prompts.

        Args:
            inputs: A chat (messages with roles), an interleaved prompt (a list of texts and PIL images, or one text),
                or a list of either. Datasets and generators of prompts give an iterator. Images alone ask for a
                caption, in the format that the processor has from training.
                A message's content is a text or a list of parts, as in transformers; an answer of this pipeline goes
                in as `{"role": "assistant", "content": answer}`, and its images are not shown again. Texts are plain
                text: a `<|image|>`, `[RET]` or `</s>` in them is not the token. A part `{"type": "ret"}` is a `[RET]`;
                with `max_new_tokens=0`, which retrieves for a prompt's own `[RET]`s, those in the texts of an
                interleaved prompt count too.
            batch_size (`int`, defaults to 1): Prompts per batch.
            index, images_per_ret, feed_images_back, max_new_tokens, stop_strings, load_images, limits, where:
                See [`InterleavedGeneration`]. `stop_strings` defaults to a newline, which ends captions and the
                default template's answers; where the LM has a chat template of its own, chats end as it says.
            exclude_ids (`str` or `list[str]`): Ids of images that are not shown, besides those that a prompt has shown.
            image_root (`str`): Where `index` is a folder or repository, the folder below which its images are.
            allow_local_files (`bool`, defaults to `False`): Whether a message may name files of this machine. Messages
                often come from others, so an image is a PIL image, a `pathlib.Path`, a URL or `{"bytes": ...}`.
            kwargs: Any option of `generate`.

        Returns:
            For each prompt a list of `{"type": "text", "text": ...}` and `{"type": "image", "id": ..., "score": ...,
            "image": PIL or None, "metadata": {...}, "ret_index": ...}`.

        Raises:
            ValueError: A prompt is empty, too long, or of an unknown kind; an image cannot be read or is refused.

        Example:

            pipe([photo, "What goes well with this?"], max_new_tokens=16)
            pipe([{"role": "user", "content": [photo, "What is this?"]}], images_per_ret=3)
        """
        if isinstance(inputs, (list, tuple)) and inputs and all(isinstance(item, (list, tuple)) for item in inputs):
            inputs = [as_prompt(item) for item in inputs]
        elif isinstance(inputs, (list, tuple, *SINGLE_PARTS)):
            inputs = as_prompt(inputs)
        return super().__call__(inputs, *args, **kwargs)

    @torch.no_grad()
    def search(
        self,
        prompt: Any,
        top_k: int = 1,
        *,
        where: dict[str, Any] | None = None,
        exclude_ids: Sequence[str] | str = (),
        load_images: bool = True,
        limits: ImageLimits = DEFAULT_LIMITS,
        allow_local_files: bool = False,
    ) -> list[Segment]:
        """The images of the index that fit a prompt best.

        Args:
            prompt: A text, an interleaved prompt or a chat, as in [`__call__`]. `[RET]` is appended where it is absent.
            top_k (`int`, defaults to 1): Number of images; there are fewer where the index has no more.
            where (`dict`, *optional*): Only images whose metadata has these values, as in the index's `search`.
            exclude_ids (`str` or `list[str]`): Ids of images that are not found.
            load_images (`bool`, defaults to `True`): Whether to read the images; one that cannot be read is `None`.
            limits ([`ImageLimits`]): What reading an image may cost.
            allow_local_files (`bool`, defaults to `False`): Whether the prompt may name files of this machine.

        Returns:
            A list of `{"type": "image", "id": ..., "score": ... (cosine), "image": PIL or None, "metadata": {...}}`,
            best first.

        Raises:
            ValueError: The pipeline has no index, `top_k` is less than 1, or the prompt is empty or cannot be read.

        Example:

            pipe.search("a red square", top_k=5, where={"license": "CC0"})
            pipe.search([photo, "the same in winter"])
        """
        if self.index is None:
            raise ValueError("The pipeline has no index to search. Assign one: `pipe.index = ...`, or give `index=`.")
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        images = ImageSearch(self.index, self.model, load_images, where, limits, self._logged)
        embeds, shown = query_embeds(self, [prompt], limits, allow_local_files)
        hits = images.find(embeds, top_k, [[*shown[0], *as_ids(exclude_ids)]])[0]
        for hit in hits if load_images else []:
            images.load(hit)
        return hits

    def _sanitize_parameters(
        self,
        index: Any = None,
        image_root: str | os.PathLike[str] | None = None,
        limits: ImageLimits | None = None,
        allow_local_files: bool | None = None,
        exclude_ids: Sequence[str] | str | None = None,
        feed_images_back: bool | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
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
            index = open_index(index, image_root)
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

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """A prompt as text with placeholders, its images, the ids that it has shown, and what ends its answer."""
        options, prompt = _PromptOptions(**preprocess_parameters), as_prompt(input_)
        text, parts, stops = self._as_text(prompt, options)
        images = [read_image(part, options.limits, options.allow_local_files) for part in shown_images(parts)]
        shown = [*shown_ids(parts), *options.exclude_ids]
        return {"text": text, "images": images, "shown": shown, "stops": stops, "is_chat": isinstance(prompt, Chat)}

    def _as_text(self, prompt: Chat | InterleavedPrompt, options: _PromptOptions) -> tuple[str, list[Part], list[str]]:
        """A prompt as text with placeholders, its parts, and the strings that end its answer."""
        if isinstance(prompt, Chat):
            messages = [with_parts(message, options.feed_images_back) for message in prompt.messages]
            parts = [part for message in messages for part in message["content"]]
            continues = messages[-1]["role"] == "assistant"
            rendered: Any = self.processor.apply_chat_template(
                messages, add_generation_prompt=not continues, continue_final_message=continues, tokenize=False
            )
            return rendered, parts, self.processor.chat_stop_strings
        parts = as_parts(prompt.parts, options.feed_images_back)
        text = self.processor.join_parts(parts, options.rets_in_text)
        is_formatted = bool(self.processor.caption_prefix or self.processor.caption_suffix)
        if is_formatted and not options.rets_in_text and len(shown_images(parts)) == len(parts):
            # Images alone ask for a caption, which the model has learnt to write in this format.
            return text + self.processor.caption_start, parts, self.processor.caption_stop_strings
        return text, parts, list(TEXT_STOP_STRINGS)

    def tokens_left(self, prompt: Any, **kwargs: Any) -> float:
        """Tokens of the language model's context that a prompt and `max_new_tokens` leave, with `kwargs` as in
        [`__call__`]: negative where they would be refused, infinite where the context has no end."""
        kwargs.pop("index", None)  # irrelevant here, and slow to open
        preprocess_params, forward_params, _ = self._sanitize_parameters(**{**kwargs, "image_root": None})
        options = _PromptOptions(**{**self._preprocess_params, **preprocess_params})
        generating = {**self._forward_params, **forward_params}
        used = self.processor.count_tokens(self._as_text(as_prompt(prompt), options)[0])
        cached = generating.get("use_cache", self.model.generation_config.use_cache) is not False
        room = room_for(used, self.model.config.text_config, cached)
        return room - used - generating.get("max_new_tokens", MAX_NEW_TOKENS)

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        is_batch = isinstance(input_tensors["text"], list)
        rows = input_tensors if is_batch else {name: [value] for name, value in input_tensors.items()}
        segments: list[list[Segment]] = [[] for _ in rows["text"]]
        kinds = [(tuple(stops), is_chat) for stops, is_chat in zip(rows["stops"], rows["is_chat"], strict=True)]
        for stops, is_chat in set(kinds):
            numbers = [i for i, kind in enumerate(kinds) if kind == (stops, is_chat)]
            options = {"stop_strings": stops, "logged": self._logged, **forward_parameters}
            if is_chat:  # which is likely to go on
                options["prefix_cache"] = self.prefix_cache
            generation = InterleavedGeneration(self.model, self.processor, **options)
            answers = generation(*([rows[name][i] for i in numbers] for name in ("text", "images", "shown")))
            for number, answer in zip(numbers, answers, strict=True):
                segments[number] = answer
        return {"segments": segments if is_batch else segments[0]}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[Segment]:
        return model_outputs["segments"]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model, the processor and this pipeline's code, so that `pipeline(model=...)` finds it. The index is
        saved by itself, into a folder or repository of its own."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


@torch.no_grad()
def query_embeds(
    pipe: FromagePipeline, prompts: Sequence[Any], limits: ImageLimits = DEFAULT_LIMITS, allow_local_files: bool = False
) -> tuple[torch.Tensor, list[list[str]]]:
    """The embeddings (N, q) with which [`FromagePipeline.search`] finds images, of unit norm, or (N, r, q) of several
    queries each; and for each prompt the ids of the images that it has shown."""
    reading: dict[str, Any] = {"limits": limits, "allow_local_files": allow_local_files, "rets_in_text": True}
    rows = [pipe.preprocess(prompt, **reading) for prompt in prompts]
    if not all(row["text"] for row in rows):
        raise ValueError("The prompt is empty. Give it a text or an image.")
    texts = [pipe.processor.retrieval_text(row["text"]) for row in rows]
    images = [image for row in rows for image in row["images"]]
    tensors: Any = pipe.processor(images=images or None, text=texts, padding=True, return_tensors="pt")
    embeds = pipe.model.get_text_embeds(**tensors.to(pipe.model.device, pipe.model.vision_model.dtype))
    return embeds, [row["shown"] for row in rows]


class FromageChat:
    """A conversation with a [`FromagePipeline`], which remembers what was said and shown.

    Where it grows beyond the language model's context, its oldest turns are forgotten: a message of the user and the
    answer to it. System messages stay, and images that were shown are not shown again.

    Args:
        pipe ([`FromagePipeline`]): The pipeline that answers.
        system (`str`, *optional*): A system message to begin with.
        kwargs: For every call of the pipeline.

    Example:

        chat = FromageChat(pipe, system="Be brief.", max_new_tokens=32)
        chat.send(photo, "What is this?")
        chat.send("Show me another one.")
    """

    def __init__(self, pipe: FromagePipeline, system: str | None = None, **kwargs: Any):
        self.pipe, self.kwargs = pipe, kwargs
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._forgotten_ids: list[str] = []  # of the images shown in forgotten turns
        self._forgets = False

    def send(self, *content: Any, **kwargs: Any) -> list[Segment]:
        """Send texts and images, in order, and return the answer. A turn that fails is not remembered.

        Args:
            content: Texts, images and parts of a message.
            kwargs: For this call of the pipeline.

        Raises:
            ValueError: As [`FromagePipeline.__call__`], for example where this message alone is too long.
        """
        messages, options = self.prepare(*content, **kwargs)
        answer: Any = self.pipe(messages, **options)
        self.remember(messages, answer)
        return answer

    def prepare(self, *content: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages that fit the context with new `content`, and the options, for whoever answers them; arguments as
        in [`send`]."""
        options = {**self.kwargs, **kwargs}
        messages = [*self.messages, {"role": "user", "content": [as_part(part) for part in content]}]
        messages, forgotten = self._fit(messages, options)
        shown = [shown_ids(with_parts(message)["content"]) for message in forgotten]
        forgotten_ids = sum(shown, self._forgotten_ids)
        if forgotten_ids:
            excluded = options.get("exclude_ids", self.pipe._preprocess_params.get("exclude_ids"))
            options["exclude_ids"] = [*as_ids(excluded or ()), *forgotten_ids]
        if forgotten and not self._forgets:
            self._forgets = True
            logger.warning("The chat exceeds the language model's context, so its oldest turns are forgotten.")
        return messages, options

    def remember(self, messages: list[dict[str, Any]], answer: list[Segment]) -> None:
        """Remember an answer to what [`prepare`] gave."""
        forgotten = [message for message in self.messages if not any(message is kept for kept in messages)]
        shown = [shown_ids(with_parts(message)["content"]) for message in forgotten]
        self._forgotten_ids = sum(shown, self._forgotten_ids)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _fit(
        self, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages that fit the context, without as few of the oldest turns as possible; and the forgotten ones."""
        start = next(i for i, message in enumerate(messages) if message["role"] in ("user", "assistant"))
        kept, forgotten = messages, []
        while self.pipe.tokens_left(kept, **options) < 0:
            turns = [i for i, message in enumerate(kept) if message["role"] == "user" and i > start]
            if not turns:
                break  # the last message is too long by itself; the pipeline will say so
            forgotten += kept[start : turns[0]]
            kept = kept[:start] + kept[turns[0] :]
        return kept, forgotten


__all__ = ["FromageChat", "FromagePipeline", "query_embeds"]
