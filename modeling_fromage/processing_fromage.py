"""Text and images to model inputs: the only place where FROMAGe's tokenizer is set up."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from transformers import (
    AddedToken,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .images_fromage import load_rgb_image
from .messages_fromage import Part, image_source, images_of, shown_images
from .plain_text_fromage import ControlTokens, as_text, control_tokens, is_marked
from .prompts_fromage import (
    DEFAULT_CHAT_TEMPLATE,
    IMAGE_TOKEN,
    RET_TOKEN,
    CaptionFormat,
    CaptionLayout,
    add_bos,
    bos_text_of,
    chat_stop_strings,
    expand_rets,
    join_parts,
    plain_message,
    prompt_ids,
    ret_tokens,
    retrieval_text,
    template_for_mask,
    token_id,
)
from .vision_libraries_fromage import load_image_processor

logger = logging.getLogger(__name__)
_FORMAT_FIELDS = [field.name for field in dataclasses.fields(CaptionFormat)]


class FromageProcessor(ProcessorMixin):
    """Image processor and tokenizer of a FROMAGe model.

    `<|image|>` in a text stands for one image and becomes `num_image_tokens` placeholders; `[RET]` asks for an image.
    On a fresh tokenizer of length V their ids are V and V + 1. Of several tokens `[RET]`, `[RET2]`, ... a text names
    the first alone. In a message special tokens are plain text: see [`apply_chat_template`]. Where the tokenizer adds
    BOS, a prompt has exactly one, directly after its leading images.

    Args:
        image_processor, tokenizer: Any of transformers; the tokenizer gains the two tokens if it lacks them.
        num_image_tokens, num_ret_tokens (`int`, default to 1): Placeholders per image (`k`); tokens per `[RET]`.
        chat_template (`str`, *optional*): Defaults to the tokenizer's, else to the paper's "Q: ... A: ...".
        caption_prefix, caption_suffix, max_length (*optional*): How captions were laid out in training: see
            [`CaptionFormat`]. Saved with the processor; captions are generated, evaluated and scored with it.

    Raises:
        ValueError: The tokenizer has the two tokens in another order, or captions cannot be laid out in this way.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 1,
        chat_template: str | dict[str, str] | None = None,
        caption_prefix: str | None = None,
        caption_suffix: str | None = None,
        max_length: int | None = None,
        num_ret_tokens: int = 1,
        **kwargs: Any,
    ):
        self.num_image_tokens, self.num_ret_tokens = num_image_tokens, num_ret_tokens
        self.image_token, self.ret_token, self.ret_tokens = IMAGE_TOKEN, RET_TOKEN, ret_tokens(num_ret_tokens)
        self.image_token_id, *self.ret_token_ids = _set_up(tokenizer, num_ret_tokens)
        self.ret_token_id = self.ret_token_ids[0]
        self.bos_text = bos_text_of(tokenizer)
        chat_template = chat_template or tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.caption_prefix, self.caption_suffix, self.max_length = dataclasses.astuple(CaptionFormat())
        self.set_caption_format(caption_prefix, caption_suffix, max_length)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, num_image_tokens: int = 1, **kwargs: Any
    ) -> "FromageProcessor":
        """Build a processor from the image processor and the tokenizer of two backbones: see [`split_library`].

        `gguf_file` and `revision` go to the tokenizer, `num_ret_tokens`, `caption_prefix`, `caption_suffix` and
        `max_length` to the processor itself; other keyword arguments (`token`, `cache_dir`, ...) to both backbones.

        Raises:
            OSError, ValueError: A backbone is not found, or has no image processor or tokenizer.
        """
        own = {key: kwargs.pop(key) for key in (*_FORMAT_FIELDS, "num_ret_tokens") if key in kwargs}
        for_tokenizer = {key: kwargs.pop(key) for key in ("gguf_file", "revision") if key in kwargs}
        image_processor = load_image_processor(os.fspath(vision_model_name_or_path), **kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path, **for_tokenizer, **kwargs)
        except ValueError as error:  # it does not say what it was loading
            raise ValueError(f"No tokenizer can be loaded from {text_model_name_or_path}: {error}") from error
        return cls(image_processor, tokenizer, num_image_tokens, **own)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "FromageProcessor":
        """As in transformers. `caption_prefix`, `caption_suffix` and `max_length` replace the saved values."""
        # Taken out here: a tokenizer would take `max_length` for the length of every text.
        caption_format = {key: kwargs.pop(key) for key in _FORMAT_FIELDS if key in kwargs}
        processor = super().from_pretrained(*args, **kwargs)
        processor.set_caption_format(**caption_format)
        return processor

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Turn texts and images into model inputs.

        Args:
            images (`ImageInput`, *optional*): One image, a list for the whole batch in reading order, or one list per
                text. PIL images, arrays, file paths or URLs.
            text (`str` or `list[str]`, *optional*): One text or several, with one `<|image|>` for each image.
            kwargs: As in transformers: `return_tensors`, `padding`, `padding_side`, ... `add_special_tokens=False`
                leaves BOS out.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`, and
            `pixel_values` of shape `(num_images, num_channels, height, width)`.

        Raises:
            ValueError: Images and placeholders differ in number, an image cannot be read, or `[RET2]` is by itself.

        Example:

            inputs = processor(images=photo, text="<|image|>A picture of", return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=16)
        """
        if text is not None:
            rows = [text] if isinstance(text, str) else text
            text = [expand_rets(row, self.num_ret_tokens) if isinstance(row, str) else row for row in rows]
            if not text:
                raise ValueError("The batch is empty: `text` is a list without texts.")
        if kwargs.pop("add_special_tokens", True) and text and all(isinstance(row, str) for row in text):
            text = [self.add_bos(row) for row in text]
        if text and any(isinstance(row, str) and is_marked(row) for row in text):
            kwargs["sanitize_control_tokens"] = True
        return super().__call__(images=_read(images), text=text, add_special_tokens=False, **kwargs)

    def add_bos(self, text: str) -> str:
        """Insert BOS, if the tokenizer uses one and the text has none there, directly after the leading images."""
        return add_bos(text, self.bos_text, self.caption_start)

    def retrieval_text(self, text: str) -> str:
        """`text` with BOS and a final `[RET]`, all its tokens, as `get_text_embeds` of the model takes it."""
        return self.add_bos(retrieval_text(text, self.num_ret_tokens))

    @property
    def image_placeholders(self) -> str:
        """An image in a text that the tokenizer itself reads: `<|image|>`, `num_image_tokens` times."""
        return self.image_token * self.num_image_tokens

    @property
    def caption_format(self) -> CaptionFormat:  # which `set_caption_format` changes
        """How captions are laid out, in one value."""
        return CaptionFormat(self.caption_prefix, self.caption_suffix, self.max_length)

    @property
    def caption_layout(self) -> CaptionLayout:
        """[`caption_format`] for this tokenizer: encodes captions for training."""
        counts = self.num_image_tokens, self.num_ret_tokens
        return CaptionLayout(self.tokenizer, self.caption_format, self.bos_text, *counts)

    def set_caption_format(
        self, caption_prefix: str | None = None, caption_suffix: str | None = None, max_length: int | None = None
    ) -> None:
        """Change how captions are laid out; `None` leaves a value as it is. Raises as [`CaptionFormat.check`]."""
        values: tuple[Any, ...] = (caption_prefix, caption_suffix, max_length)
        given = {name: value for name, value in zip(_FORMAT_FIELDS, values, strict=True) if value is not None}
        dataclasses.replace(self.caption_format, **given).check(self.tokenizer, self.bos_text, self.num_ret_tokens)
        for name, value in given.items():
            before = getattr(self, name)
            if before not in (value, getattr(CaptionFormat, name)):
                logger.warning("The processor's `%s` was %r and is now %r, wherever it is used.", name, before, value)
            setattr(self, name, value)

    @property
    def caption_start(self) -> str:
        """The text between an image and its caption: `caption_prefix`, and BOS if the tokenizer uses one."""
        return self.caption_layout.start

    @property
    def caption_prompt(self) -> str:
        """The prompt that a caption continues, in training and in generation: an image, then [`caption_start`]."""
        return self.image_token + self.caption_start

    def caption_prompt_ids(self) -> list[int]:
        """Token ids of [`caption_prompt`], with `num_image_tokens` placeholders."""
        return self.caption_layout.prompt_ids

    @property
    def caption_stop_strings(self) -> list[str]:
        """Strings that end a generated caption: a newline, and `caption_suffix` unless it is blank."""
        return self.caption_format.stop_strings

    @property
    def chat_stop_strings(self) -> list[str]:
        """Strings that end an answer under the default chat template; the LM's own ends it with a token."""
        return chat_stop_strings(self.chat_template)

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text with BOS, and with all tokens of each `<|image|>` and `[RET]`."""
        return prompt_ids(self.tokenizer, self.add_bos(text), self.num_image_tokens, self.num_ret_tokens)

    def count_tokens(self, text: str) -> int:
        return len(self.token_ids(text))

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_placeholders

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def apply_chat_template(  # type: ignore[override]  # its other options are keywords here
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """Render messages, or a list of conversations, as in transformers.

        Messages, tools and documents are plain text: special tokens that they spell, `<|image|>` and `[RET]` included,
        are tokenised as other text. A rendered text (`tokenize=False`) carries private marks for this, which the
        processor heeds. Parts of type "image" and "ret" are the tokens.

        Args:
            chat_template (`str`, *optional*): It gets the messages as they are; the processor's own gets lists of parts
                as one text with `<|image|>` for each image, since many templates refuse lists.
            sanitize_control_tokens (`bool`, defaults to `True`): `False` lets texts contain special tokens.
            kwargs: As in transformers: `add_generation_prompt`, `tokenize`, `return_dict`, `return_tensors`, ...

        Returns:
            The text, a list of texts for a list of conversations, or, as in transformers, token ids.

        Raises:
            ValueError: A text contains a special token, which `return_assistant_tokens_mask` cannot count.

        Example:

            content = [{"type": "image", "image": photo}, {"type": "text", "text": "Hi"}]
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            # 'Q: <|image|>Hi\nA:'
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        tokens = self._control_tokens([self._resolve_chat_template(chat_template)]) if sanitize_control_tokens else None
        join, count = chat_template is None, self.num_ret_tokens
        plain = [[plain_message(message, tokens, join, count) for message in row] for row in conversations]
        if kwargs.get("tokenize") and any(images_of(messages) for messages in conversations):
            images = [images_of(messages) for messages in conversations]
            given = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {**given, "images": images if batched else images[0]}
        if tokens is not None:
            kwargs.update({name: as_text(kwargs[name], tokens) for name in ("tools", "documents") if name in kwargs})
        messages: list[Any] = plain if batched else plain[0]
        if kwargs.get("return_assistant_tokens_mask"):
            # The mask counts the characters of the template's own text, so BOS must be part of it.
            texts = super().apply_chat_template(messages, chat_template, **{**kwargs, "tokenize": False})
            chat_template = template_for_mask(texts, self._resolve_chat_template(chat_template), self.bos_text, count)
        return super().apply_chat_template(messages, chat_template, **kwargs)

    def join_parts(self, parts: Sequence[Part], rets_in_text: bool = False) -> str:
        """The text of a message's parts, with `<|image|>` for each image that is shown to the model and `[RET]` for
        parts of type "ret" and for images that it retrieved (those of one `[RET]` have the same "ret_index").

        With `rets_in_text`, `[RET]` in a text is the token too. Other special tokens in a text are always text.
        """
        templates = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template]
        return join_parts(parts, self._control_tokens(filter(None, templates), rets_in_text), self.num_ret_tokens)

    def _control_tokens(self, templates: Iterable[str], rets_in_text: bool = False) -> ControlTokens:
        return control_tokens(self.tokenizer, templates, () if rets_in_text else (self.ret_token,))

    shown_images = staticmethod(shown_images)
    image_source = staticmethod(image_source)

    def check_config(self, config: PretrainedConfig) -> None:
        """Raise a `ValueError` where a model's token ids or their numbers differ from the processor's."""
        _compare(token_counts(self), config)


def token_counts(processor: FromageProcessor) -> dict[str, int]:
    """Ids and numbers of the special tokens, by their names in the model's configuration, too."""
    names = ("image_token_id", "ret_token_id", "num_image_tokens", "num_ret_tokens")
    return {name: getattr(processor, name) for name in names}


def _compare(counts: dict[str, int], config: PretrainedConfig) -> None:
    for name, ours in counts.items():
        if ours != (theirs := getattr(config, name)):
            raise ValueError(
                f"The processor's `{name}` is {ours}, the model's is {theirs}: they do not belong together. Load both "
                "from one checkpoint, or build the model with `processor=`."
            )


def _set_up(tokenizer: PreTrainedTokenizerBase, num_ret_tokens: int) -> list[int]:
    """Add `<|image|>` and the tokens of `[RET]` and set padding up; returns their ids."""
    if num_ret_tokens < 1:
        raise ValueError(f"`num_ret_tokens` must be at least 1, got {num_ret_tokens}.")
    present = tokenizer.get_vocab()
    for name in (IMAGE_TOKEN, *ret_tokens(num_ret_tokens)):
        if name not in present:  # a decoded text that skips special tokens keeps [RET], once
            is_special = name != RET_TOKEN
            tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False)], special_tokens=is_special)
    image_id, ret_id, *_ = ids = [token_id(tokenizer, token) for token in (IMAGE_TOKEN, *ret_tokens(num_ret_tokens))]
    if ret_id <= image_id:
        raise ValueError(
            f"The tokenizer has {RET_TOKEN} at {ret_id} and {IMAGE_TOKEN} at {image_id}; FROMAGe needs [RET] after "
            "<|image|>. Start from a tokenizer without them."
        )
    further = ret_tokens(num_ret_tokens + 1)
    if ids[1:] != list(range(ret_id, ret_id + num_ret_tokens)) or further[-1] in present:
        found = {token: present[token] for token in further if token in present}
        raise ValueError(
            f"`num_ret_tokens` is {num_ret_tokens}, but the tokenizer has {found} already: their ids must be "
            "contiguous, and there must be no more. Load the processor of that checkpoint with its own number, or "
            "start from a tokenizer without them."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # so that a batch can be continued
    return ids


def _read(images: Any) -> Any:
    """Read files, URLs and PIL images of any mode as RGB, keeping the nesting; arrays are left to transformers."""
    if isinstance(images, (list, tuple)):
        return [_read(image) for image in images]
    return load_rgb_image(images) if isinstance(images, (str, os.PathLike, Image.Image)) else images


__all__ = ["FromageProcessor", "token_counts"]
