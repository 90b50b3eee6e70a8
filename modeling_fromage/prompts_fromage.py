"""The layout of every prompt: special tokens, BOS, captions, texts for retrieval, chats, and messages of several parts.

Section 3.2 of the paper and the authors' code. The processor, the data collator, the pipeline and the evaluations lay
out their prompts with these functions, so that a model reads what it was trained on.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .messages_fromage import Part
from .plain_text_fromage import AnswerText, ControlTokens, as_text, is_marked

IMAGE_TOKEN, RET_TOKEN = "<|image|>", "[RET]"  # noqa: S105 (no passwords)

# The paper's dialogue style, for language models without a chat template of their own.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}A: {{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
TEXT_STOP_STRINGS = ["\n"]  # the paper's prompts are lines


def ret_tokens(count: int) -> list[str]:
    """The texts of `count` `[RET]` tokens: `[RET]`, `[RET2]`, ..."""
    return [RET_TOKEN, *(f"{RET_TOKEN[:-1]}{number}]" for number in range(2, count + 1))]


def expand_rets(text: str, count: int) -> str:
    """A text with all `count` tokens for each `[RET]` in it, which may have them already.

    Raises:
        ValueError: The text has another of them by itself.
    """
    if count == 1:
        return text
    tokens = ret_tokens(count)
    rest = "".join(tokens[1:])
    pieces = re.split(rf"{re.escape(RET_TOKEN)}(?:{re.escape(rest)})?", text)
    if torn := [token for token in tokens[1:] if any(token in piece for piece in pieces)]:
        raise ValueError(
            f"A text has {torn[0]} without the tokens before it. Write {RET_TOKEN} alone, which stands for all "
            f"{count} of them."
        )
    return (RET_TOKEN + rest).join(pieces)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token."""
    found = tokenizer.convert_tokens_to_ids(token)
    return found if isinstance(found, int) else found[0]


def bos_text_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the BOS token where the tokenizer puts it before a text, else `""`."""
    ids = tokenizer("a").input_ids
    has_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if has_bos else ""


def add_bos(text: str, bos_text: str, caption_start: str) -> str:
    """Insert BOS directly after the leading images.

    Nothing is inserted where the text is images alone, where BOS is there already (a chat template may write its own),
    or where `caption_start` brings it.
    """
    rest = text
    while rest.startswith(IMAGE_TOKEN):
        rest = rest[len(IMAGE_TOKEN) :]
    if not rest or rest.startswith((bos_text, caption_start)):
        return text
    return text[: len(text) - len(rest)] + bos_text + rest


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, num_image_tokens: int, num_ret_tokens: int = 1
) -> list[int]:
    """Token ids of a text, `num_image_tokens` placeholders for each `<|image|>` among them, and `num_ret_tokens` for
    each `[RET]`."""
    text = expand_rets(text, num_ret_tokens)
    marked = {"sanitize_control_tokens": True} if is_marked(text) else {}
    image, ids = token_id(tokenizer, IMAGE_TOKEN), tokenizer(text, add_special_tokens=False, **marked).input_ids
    return [each for token in ids for each in ([image] * num_image_tokens if token == image else [token])]


def retrieval_text(text: str, num_ret_tokens: int = 1) -> str:
    """A text that ends in `[RET]`, all its tokens, whose hidden states there give the text's embedding."""
    text = expand_rets(text, num_ret_tokens)
    run = "".join(ret_tokens(num_ret_tokens))
    return text if text.endswith(run) else text + run


def chat_stop_strings(chat_template: str | dict[str, str] | None) -> list[str]:
    """Strings that end an answer under the default chat template; the LM's own template ends it with a token."""
    return list(TEXT_STOP_STRINGS) if chat_template == DEFAULT_CHAT_TEMPLATE else []


def template_for_mask(rendered: str | list[str], chat_template: str, bos_text: str, num_ret_tokens: int = 1) -> str:
    """A chat template with BOS in it, for the mask of the assistant's tokens.

    Raises:
        ValueError: The mask, which counts characters of the `rendered` texts, would be wrong.
    """
    texts = [rendered] if isinstance(rendered, str) else rendered
    if any(is_marked(text) for text in texts):
        raise ValueError(
            "A message holds a special token as text, which `return_assistant_tokens_mask` cannot count. Leave the "
            "message out, or let it be the token with `sanitize_control_tokens=False`."
        )
    if any(expand_rets(text, num_ret_tokens) != text for text in texts):
        raise ValueError(
            f"`return_assistant_tokens_mask` cannot count a {RET_TOKEN} of {num_ret_tokens} tokens that a text spells. "
            'Give it as a part of type "ret".'
        )
    if bos_text and any(text.startswith(IMAGE_TOKEN) for text in texts):
        raise ValueError("`return_assistant_tokens_mask` needs a template that does not begin with an image.")
    return chat_template if texts[0].startswith(bos_text) else bos_text + chat_template


# ---- captions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionFormat:
    """How a caption is laid out: images, `caption_prefix`, BOS, the caption, `caption_suffix`.

    The defaults are the paper's.

    Args:
        caption_prefix (`str`, defaults to `""`): Text between an image and its caption, before BOS.
        caption_suffix (`str`, defaults to `""`): Text that ends a caption.
        max_length (`int`, defaults to 24): Tokens of a caption in training, including BOS, the suffix and `[RET]`, all
            its tokens.
    """

    caption_prefix: str = ""
    caption_suffix: str = ""
    max_length: int = 24

    def check(self, tokenizer: PreTrainedTokenizerBase, bos_text: str, num_ret_tokens: int = 1) -> None:
        """
        Raises:
            ValueError: A text contains a special token, or `max_length` leaves no room for a caption.
        """
        for name in ("caption_prefix", "caption_suffix"):
            text = getattr(self, name)
            tokens = [IMAGE_TOKEN, *ret_tokens(num_ret_tokens)]
            if not isinstance(text, str) or any(token in text for token in tokens):
                raise ValueError(f"`{name}` must be a text without {' and '.join(tokens)}, got {text!r}.")
        if not isinstance(self.max_length, int) or isinstance(self.max_length, bool):
            raise ValueError(f"`max_length` must be a number of tokens, got {self.max_length!r}.")
        suffix = tokenizer(self.caption_suffix, add_special_tokens=False).input_ids
        if self.max_length < bool(bos_text) + len(suffix) + 1 + num_ret_tokens:
            raise ValueError(
                f"`max_length` {self.max_length} leaves no room for a caption beside BOS, suffix and [RET]."
            )

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end a generated caption: a newline, and `caption_suffix` unless it is blank."""
        suffixes = [self.caption_suffix] if self.caption_suffix.strip() else []
        return list(dict.fromkeys([*TEXT_STOP_STRINGS, *suffixes]))


class CaptionIds(NamedTuple):
    """Token ids of one caption in training.

    Args:
        caption_ids: The caption alone, cut to its length.
        input_ids: The captioning sequence: image placeholders, prefix, BOS, caption, suffix.
        labels: Its targets, -100 at the placeholders and the prefix. BOS is a target, predicted from the last visual
            token, as in the authors' code.
        retrieval_input_ids: The retrieval sequence: BOS, caption, `[RET]`.
    """

    caption_ids: list[int]
    input_ids: list[int]
    labels: list[int]
    retrieval_input_ids: list[int]


@dataclass(frozen=True)
class CaptionLayout:
    """A [`CaptionFormat`] for one tokenizer: the prompt of a caption, and captions as token ids.

    Args:
        tokenizer: The processor's tokenizer.
        caption_format ([`CaptionFormat`]): How captions are laid out.
        bos_text (`str`): BOS, or `""` where the tokenizer uses none.
        num_image_tokens (`int`): Placeholders per image.
        num_ret_tokens (`int`, defaults to 1): Tokens of a `[RET]`.
    """

    tokenizer: PreTrainedTokenizerBase
    caption_format: CaptionFormat
    bos_text: str
    num_image_tokens: int
    num_ret_tokens: int = 1

    @property
    def start(self) -> str:
        """The text between an image and its caption: `caption_prefix`, then BOS."""
        return self.caption_format.caption_prefix + self.bos_text

    @cached_property
    def prompt_ids(self) -> list[int]:
        """Token ids that a caption continues, in training and in generation: one image, then [`start`]."""
        return self._tokenize(IMAGE_TOKEN * self.num_image_tokens + self.start)

    @cached_property
    def _bos_ids(self) -> list[int]:
        return [token_id(self.tokenizer, self.bos_text)] if self.bos_text else []

    @cached_property
    def _suffix_ids(self) -> list[int]:
        return self._tokenize(self.caption_format.caption_suffix)

    @cached_property
    def ret_ids(self) -> list[int]:
        """Token ids of a `[RET]`."""
        return [token_id(self.tokenizer, token) for token in ret_tokens(self.num_ret_tokens)]

    def encode(self, caption: str) -> CaptionIds:
        """Token ids of a caption; one that is too long loses its last words."""
        caption_ids = ids = self._caption_ids(caption)
        if self.caption_format.caption_prefix and not self.bos_text:
            # No BOS parts the caption from its prefix: it continues the sentence.
            ids = self._caption_ids(" " + caption)
        head = self.prompt_ids[: len(self.prompt_ids) - len(self._bos_ids)]
        body = self._bos_ids + ids + self._suffix_ids
        return CaptionIds(caption_ids, head + body, [-100] * len(head) + body, self._for_retrieval(caption_ids))

    def retrieval_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """`retrieval_input_ids` of captions, which are tokenised together."""
        found = self.tokenizer(list(captions), add_special_tokens=False).input_ids
        return [self._for_retrieval(ids[: self._room]) for ids in found]

    def _for_retrieval(self, caption_ids: list[int]) -> list[int]:
        return self._bos_ids + caption_ids + self.ret_ids

    @property
    def _room(self) -> int:
        """Tokens that a caption may have."""
        return self.caption_format.max_length - len(self._bos_ids) - len(self._suffix_ids) - len(self.ret_ids)

    def _caption_ids(self, caption: str) -> list[int]:
        return self._tokenize(caption)[: self._room]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


# ---- messages -------------------------------------------------------------------------------------------------------


def join_parts(parts: Sequence[Part], tokens: ControlTokens | None, num_ret_tokens: int = 1) -> str:
    """The text of a message's parts, with `<|image|>` for each image that is shown to the model and `[RET]` for each
    that it retrieved.

    Args:
        parts: Parts of type "text", "image" and "ret". Images of the same "ret_index" have one `[RET]`.
        tokens ([`ControlTokens`]): Tokens that the texts must not become; `None` leaves the texts alone.
        num_ret_tokens (`int`, defaults to 1): Tokens that are written for a `[RET]`.
    """
    run = "".join(ret_tokens(num_ret_tokens))
    pieces: list[tuple[str, bool]] = []  # texts, and whether each is a token
    last_ret = None
    for part in parts:
        ret = part.get("ret_index")
        if part["type"] == "text":
            split = AnswerText.concatenate([part["text"]]).split_rets(RET_TOKEN)
            pieces += [(run if is_ret else text, is_ret) for text, is_ret in split]
        elif part["type"] == "ret":
            pieces.append((run, True))
        elif ret is None:
            pieces.append((IMAGE_TOKEN, True))
        elif ret != last_ret:
            pieces.append((run, True))
        last_ret = ret
    # Adjacent texts are treated as one: together they may spell a token.
    runs = (("".join(text for text, _ in run), known) for known, run in itertools.groupby(pieces, lambda p: p[1]))
    return "".join(text if known or tokens is None else as_text(text, tokens) for text, known in runs)


def plain_message(
    message: dict[str, Any], tokens: ControlTokens | None, join: bool, num_ret_tokens: int = 1
) -> dict[str, Any]:
    """A message whose texts cannot become special tokens.

    Args:
        join: Whether content that is a list of parts becomes one text, since many chat templates refuse lists.
    """
    content = message.get("content")
    rest = {name: value for name, value in message.items() if name != "content"}
    rest = rest if tokens is None else as_text(rest, tokens)
    if isinstance(content, str):
        content = join_parts([{"type": "text", "text": content}], tokens, num_ret_tokens)
    elif isinstance(content, list) and join:
        content = join_parts(content, tokens, num_ret_tokens)
    elif isinstance(content, list) and tokens is not None:
        content = [as_text(part, tokens) if part.get("type") == "text" else part for part in _merged_texts(content)]
    return {**rest, "content": content} if "content" in message else rest


def _merged_texts(parts: list[Part]) -> list[Part]:
    """Parts with adjacent texts merged: together they may spell a token."""
    merged: list[Part] = []
    for part in parts:
        if merged and part.get("type") == merged[-1].get("type") == "text":
            merged[-1] = {**merged[-1], "text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return merged


__all__ = [
    "CaptionFormat",
    "CaptionIds",
    "CaptionLayout",
    "DEFAULT_CHAT_TEMPLATE",
    "IMAGE_TOKEN",
    "RET_TOKEN",
    "TEXT_STOP_STRINGS",
    "add_bos",
    "bos_text_of",
    "chat_stop_strings",
    "expand_rets",
    "join_parts",
    "plain_message",
    "prompt_ids",
    "ret_tokens",
    "retrieval_text",
    "template_for_mask",
    "token_id",
]
