"""Text and images to model inputs: the only place where FROMAGe's tokenizer is set up."""

import itertools
import logging
import os
from typing import Any

from PIL import Image
from transformers import AddedToken, AutoImageProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .images_fromage import load_rgb_image
from .plain_text_fromage import AnswerText, ControlTokens, as_text, control_tokens, is_marked

logger = logging.getLogger(__name__)
IMAGE_TOKEN, RET_TOKEN = "<|image|>", "[RET]"  # noqa: S105 (no passwords)

# How captions are laid out where nothing says otherwise: as in the paper.
CAPTION_FORMAT = {"caption_prefix": "", "caption_suffix": "", "max_length": 24}

# The paper's dialogue style, for language models without a chat template of their own.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}A: {{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


class FromageProcessor(ProcessorMixin):
    """
    Image processor and tokenizer of a FROMAGe model.

    `<|image|>` in a text stands for one image and becomes `num_image_tokens` placeholders; `[RET]` asks for an image.
    In a message's text they, and all special tokens, are text: see [`apply_chat_template`].
    On a fresh tokenizer of length V their ids are V and V + 1. Where the tokenizer adds a BOS token, there is exactly
    one, directly after the leading images (section 3.2 and the authors' code).

    Args:
        image_processor: Any transformers image processor.
        tokenizer: Any transformers tokenizer; it gains the two tokens where it lacks them.
        num_image_tokens (`int`, defaults to 1): Placeholders per image (`k`).
        chat_template (`str`, *optional*): Defaults to the tokenizer's, else to the paper's "Q: ... A: ...".
        caption_prefix (`str`, *optional*, defaults to `""`): Text between an image and its caption, before BOS.
        caption_suffix (`str`, *optional*, defaults to `""`): Text that ends a caption.
        max_length (`int`, *optional*, defaults to 24): Tokens of a caption in training, with BOS, suffix and `[RET]`.

    The last three are how captions were laid out in training. They are saved with the processor, and captions are
    written, read and scored with them.

    Raises:
        ValueError: The tokenizer has the two tokens in an order or with gaps that FROMAGe does not use; or captions
            cannot be laid out in this way.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 1,
        chat_template=None,
        caption_prefix: str | None = None,
        caption_suffix: str | None = None,
        max_length: int | None = None,
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_token, self.ret_token = IMAGE_TOKEN, RET_TOKEN
        self.image_token_id, self.ret_token_id = _add_tokens(tokenizer)
        self.bos_text = _bos_text(tokenizer)
        chat_template = chat_template or tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.caption_prefix, self.caption_suffix, self.max_length = CAPTION_FORMAT.values()
        self.set_caption_format(caption_prefix, caption_suffix, max_length)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, num_image_tokens: int = 1, **kwargs: Any
    ) -> "FromageProcessor":
        """Build a processor from the image processor and the tokenizer of two backbones.

        `gguf_file` and `revision` go to the tokenizer, `caption_prefix`, `caption_suffix` and `max_length` to the
        processor itself; other keyword arguments (`token`, `cache_dir`, ...) to both backbones.

        Raises:
            OSError, ValueError: A backbone is not found, or has no image processor or tokenizer.
        """
        caption_format = {key: kwargs.pop(key) for key in CAPTION_FORMAT if key in kwargs}
        for_tokenizer = {key: kwargs.pop(key) for key in ("gguf_file", "revision") if key in kwargs}
        image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path, **kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path, **for_tokenizer, **kwargs)
        except ValueError as error:  # which does not say of what
            raise ValueError(f"No tokenizer can be loaded from {text_model_name_or_path}: {error}") from error
        return cls(image_processor, tokenizer, num_image_tokens, **caption_format)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "FromageProcessor":
        """As in transformers. `caption_prefix`, `caption_suffix` and `max_length` replace what is saved."""
        # A tokenizer would take `max_length` for the length of every text.
        caption_format = {key: kwargs.pop(key) for key in CAPTION_FORMAT if key in kwargs}
        processor = super().from_pretrained(*args, **kwargs)
        if caption_format:
            processor.set_caption_format(**caption_format)
        return processor

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Args:
            images: One image, a list for the batch in reading order, or one list per text; PIL images or file paths.
            text: One text or a list, with one `<|image|>` where each image goes.
            kwargs: As in transformers: `return_tensors`, `padding`, `padding_side`, ... `add_special_tokens=False`
                leaves BOS out.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (B, L), `pixel_values` (N, channels, height, width).

        Raises:
            ValueError: Images and placeholders differ in number, or an image cannot be read.
        """
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not text:
                raise ValueError("The batch is empty: `text` is a list without texts.")
        if kwargs.pop("add_special_tokens", True) and text and all(isinstance(row, str) for row in text):
            text = [self.add_bos(row) for row in text]
        if text and any(isinstance(row, str) and is_marked(row) for row in text):
            kwargs["sanitize_control_tokens"] = True
        return super().__call__(images=_read(images), text=text, add_special_tokens=False, **kwargs)

    def add_bos(self, text: str) -> str:
        """Put BOS, where the tokenizer uses one, directly after the leading images; none where the text has it there,
        or behind `caption_prefix` as before a caption."""
        rest = text
        while rest.startswith(self.image_token):
            rest = rest[len(self.image_token) :]
        if not rest or rest.startswith((self.bos_text, self.caption_start)):
            return text
        return text[: len(text) - len(rest)] + self.bos_text + rest

    def set_caption_format(
        self, caption_prefix: str | None = None, caption_suffix: str | None = None, max_length: int | None = None
    ):
        """Lay captions out in another way; what is None stays as it is.

        Raises:
            ValueError: A text holds a special token, or `max_length` leaves no room for a caption.
        """
        given = {"caption_prefix": caption_prefix, "caption_suffix": caption_suffix, "max_length": max_length}
        given = {name: value for name, value in given.items() if value is not None}
        new = {**{name: getattr(self, name) for name in CAPTION_FORMAT}, **given}
        for name in ("caption_prefix", "caption_suffix"):
            text = new[name]
            if not isinstance(text, str) or self.image_token in text or self.ret_token in text:
                raise ValueError(
                    f"`{name}` must be a text without {self.image_token} and {self.ret_token}, got {text!r}."
                )
        length = new["max_length"]
        if not isinstance(length, int) or isinstance(length, bool):
            raise ValueError(f"`max_length` must be a number of tokens, got {length!r}.")
        suffix = self.tokenizer(new["caption_suffix"], add_special_tokens=False).input_ids
        if length < bool(self.bos_text) + len(suffix) + 2:
            raise ValueError(f"`max_length` {length} leaves no room for a caption beside BOS, suffix and [RET].")
        for name, value in given.items():
            before = getattr(self, name)
            if before not in (value, CAPTION_FORMAT[name]):
                logger.warning(
                    "The processor's `%s` was %r and is now %r, for all that uses this processor.", name, before, value
                )
            setattr(self, name, value)

    @property
    def caption_start(self) -> str:
        """What stands between an image and its caption: `caption_prefix`, and BOS where the tokenizer uses one."""
        return self.caption_prefix + self.bos_text

    @property
    def caption_prompt(self) -> str:
        """What a caption is the continuation of, in training as afterwards: an image, and [`caption_start`]."""
        return self.image_token + self.caption_start

    def caption_prompt_ids(self) -> list[int]:
        """Tokens of [`caption_prompt`], with `num_image_tokens` placeholders."""
        text = self.image_token * self.num_image_tokens + self.caption_start
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @property
    def caption_stop_strings(self) -> list[str]:
        """What ends a caption that is written: a newline, or `caption_suffix`, unless that is blank."""
        return list(dict.fromkeys(["\n", self.caption_suffix] if self.caption_suffix.strip() else ["\n"]))

    def count_tokens(self, text: str) -> int:
        """How many tokens a text becomes, with those of its images."""
        text = self.add_bos(text)
        marked = {"sanitize_control_tokens": True} if is_marked(text) else {}
        ids = self.tokenizer(text, add_special_tokens=False, **marked).input_ids
        return len(ids) + ids.count(self.image_token_id) * (self.num_image_tokens - 1)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(
        self, conversation, chat_template=None, sanitize_control_tokens: bool = True, **kwargs: Any
    ):
        """As in transformers; lists of content become text with `<|image|>` first, since many tokenizers' templates
        refuse lists. A `chat_template` that is given gets the messages as they are.

        What messages say is text: special tokens that somebody types, `<|image|>` and `[RET]` included, become what
        they are spelled with. In a text that is returned (`tokenize=False`) they have private marks in them, which the
        processor heeds. Parts of type "image" and "ret" are the tokens; with `sanitize_control_tokens=False` texts may
        hold them too.

        Raises:
            ValueError: A text holds a special token and `return_assistant_tokens_mask`, which counts characters, is
                set.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        tokens = self._control_tokens([self._resolve_chat_template(chat_template)]) if sanitize_control_tokens else None
        flat = [[self._flatten(message, tokens, chat_template is None) for message in row] for row in conversations]
        if kwargs.get("tokenize") and any(_images_of(messages) for messages in conversations):
            per_conversation = [_images_of(messages) for messages in conversations]
            processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
            processor_kwargs["images"] = per_conversation if batched else per_conversation[0]
            kwargs["processor_kwargs"] = processor_kwargs
        if tokens is not None:  # what tools and documents say comes from elsewhere, as messages do
            kwargs.update({name: as_text(kwargs[name], tokens) for name in ("tools", "documents") if name in kwargs})
        flat = flat if batched else flat[0]
        if kwargs.get("return_assistant_tokens_mask"):
            chat_template = self._template_for_mask(flat, chat_template, kwargs)
        return super().apply_chat_template(flat, chat_template, **kwargs)

    def _template_for_mask(self, conversation, chat_template: str | None, kwargs: dict[str, Any]) -> str | None:
        """The template with BOS in it: the mask counts the characters of the template's own text."""
        texts = super().apply_chat_template(conversation, chat_template, **{**kwargs, "tokenize": False})
        texts = [texts] if isinstance(texts, str) else texts
        if any(is_marked(text) for text in texts):
            raise ValueError(
                "A message holds a special token as text, which `return_assistant_tokens_mask` cannot count. Leave the "
                "message out, or let it be the token with `sanitize_control_tokens=False`."
            )
        if not self.bos_text:
            return chat_template
        if any(text.startswith(self.image_token) for text in texts):
            raise ValueError("`return_assistant_tokens_mask` needs a template that does not begin with an image.")
        if texts[0].startswith(self.bos_text):
            return chat_template
        return self.bos_text + (chat_template or self.chat_template)

    @property
    def chat_stop_strings(self) -> list[str]:
        """What ends an answer under the default chat template; the LM's own ends it with a token."""
        return ["\n"] if self.chat_template == DEFAULT_CHAT_TEMPLATE else []

    def join_parts(self, parts: list[dict], rets_in_text: bool = False) -> str:
        """The text of a message's parts, with `<|image|>` for each image, and `[RET]` for parts of type "ret" and for
        images that the model retrieved (parts with a "ret_index"; several of one `[RET]` have the same).

        Args:
            rets_in_text: Whether `[RET]` in a text is the token too. Other special tokens in a text are text in any
                case.
        """
        templates = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template]
        return self._join_parts(parts, self._control_tokens(list(templates), rets_in_text))

    def _join_parts(self, parts: list[dict], tokens: ControlTokens | None) -> str:
        pieces, last_ret = [], None  # texts, and whether each is a token
        for part in parts:
            ret = part.get("ret_index")
            if part["type"] == "text":
                pieces += AnswerText.join([part["text"]]).split_rets(self.ret_token)
            elif part["type"] == "ret":
                pieces.append((self.ret_token, True))
            elif ret is None:
                pieces.append((self.image_token, True))
            elif ret != last_ret:
                pieces.append((self.ret_token, True))
            last_ret = ret
        # Texts that stand side by side are one: together they may spell a token.
        runs = (("".join(text for text, _ in run), known) for known, run in itertools.groupby(pieces, lambda p: p[1]))
        return "".join(text if known or tokens is None else as_text(text, tokens) for text, known in runs)

    def _control_tokens(self, templates: list[str], rets_in_text: bool = False) -> ControlTokens:
        return control_tokens(self.tokenizer, templates, () if rets_in_text else (self.ret_token,))

    @staticmethod
    def shown_images(parts: list[dict]) -> list[dict]:
        """Those of a message's parts that [`join_parts`] gives a `<|image|>`, in order."""
        return [part for part in parts if part["type"] == "image" and part.get("ret_index") is None]

    @staticmethod
    def image_source(part: dict) -> Any:
        """What a message's part of type "image" names: the first of its "image", "url" and "path" that is there."""
        return next((part[key] for key in ("image", "url", "path") if part.get(key) is not None), None)

    def _flatten(self, message: dict, tokens: ControlTokens | None, join: bool) -> dict:
        """A message whose texts are text; with `join` its content is one text."""
        content = message.get("content")
        rest = {name: value for name, value in message.items() if name != "content"}
        rest = rest if tokens is None else as_text(rest, tokens)
        if isinstance(content, list):
            if join:
                content = self._join_parts(content, tokens)
            elif tokens is not None:
                content = [as_text(part, tokens) if part.get("type") == "text" else part for part in _joined(content)]
        elif isinstance(content, str):
            content = self._join_parts([{"type": "text", "text": content}], tokens)
        return {**rest, "content": content} if "content" in message else rest

    def check_config(self, config: Any):
        """Raise a `ValueError` where a model's token ids or `num_image_tokens` differ from this processor's."""
        for name in ("image_token_id", "ret_token_id", "num_image_tokens"):
            ours, theirs = getattr(self, name), getattr(config, name)
            if ours != theirs:
                raise ValueError(
                    f"The processor's `{name}` is {ours}, the model's is {theirs}: they do not belong together. Load "
                    "both from one checkpoint, or build the model with `processor=`."
                )


def _add_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    tokens = [
        AddedToken(IMAGE_TOKEN, special=True, normalized=False),
        AddedToken(RET_TOKEN, special=False, normalized=False),
    ]
    present = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in tokens[:1] if token.content not in present], special_tokens=True)
    tokenizer.add_tokens([token for token in tokens[1:] if token.content not in present])
    image_id, ret_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, RET_TOKEN])
    if ret_id <= image_id:
        raise ValueError(
            f"The tokenizer has {RET_TOKEN} at {ret_id} and {IMAGE_TOKEN} at {image_id}; FROMAGe needs [RET] after "
            "<|image|>. Start from a tokenizer without them."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # so that a batch can be generated on
    return image_id, ret_id


def _bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token's text where the tokenizer puts one before a text, else nothing."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else ""


def _images_of(messages: list[dict]) -> list:
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in FromageProcessor.shown_images(content)]
    sources = [FromageProcessor.image_source(part) for part in parts]
    return [source for source in sources if source is not None]


def _joined(parts: list[dict]) -> list[dict]:
    """Parts of a message, texts that stand side by side as one: together they may spell a token."""
    joined: list[dict] = []
    for part in parts:
        if joined and part.get("type") == joined[-1].get("type") == "text":
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _read(images):
    """Files, URLs and odd PIL modes as RGB, in the nesting they came in; arrays are transformers' to read."""
    if isinstance(images, (list, tuple)):
        return [_read(image) for image in images]
    return load_rgb_image(images) if isinstance(images, (str, os.PathLike, Image.Image)) else images


__all__ = ["FromageProcessor"]
