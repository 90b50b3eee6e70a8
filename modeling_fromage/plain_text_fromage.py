"""Text that stays text: whatever a user types or a model spells is never read as a special token.

As transformers' own `sanitize_control_tokens` does, this puts private marks into a text, at which the tokenizer splits
it and which it drops. transformers wraps whole tokens; once a wrapped token between two halves of another is taken out,
the halves look like a placeholder. Here a mark after a token's first character splits it instead.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

_MARKS = re.compile(f"[{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}]")
_PIECES = re.compile(f"{_MARKS.pattern}|[^{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}]+")  # a mark, or text without any
_CHANGES_CASE = re.compile(r"[|.]\s*(lower|upper|capitalize|title|swapcase|casefold)\b")  # in a chat template


class AnswerText(str):
    """Text of an answer that knows which of its `[RET]`s the model wrote as its token without finding an image.

    Everything else is text, whatever it spells.

    Args:
        text (`str`): The text, with `[RET]` where the model wrote that token.
        rets (`tuple[int, ...]`): Offsets of these `[RET]`s.
    """

    rets: tuple[int, ...]

    def __new__(cls, text: str, rets: Iterable[int] = ()) -> "AnswerText":
        self = super().__new__(cls, text)
        self.rets = tuple(rets)
        return self

    @classmethod
    def concatenate(cls, texts: Iterable[str]) -> "AnswerText":
        """Plain texts and answers as one."""
        whole, rets = "", []
        for text in texts:
            rets += [len(whole) + offset for offset in getattr(text, "rets", ())]
            whole += text
        return cls(whole, rets)

    def stripped(self, left: bool, right: bool) -> "AnswerText":
        """Without white space at the left or right end."""
        text = self.lstrip() if left else str(self)
        rets = [offset - (len(self) - len(text)) for offset in self.rets]
        return AnswerText(text.rstrip() if right else text, rets)

    def split_rets(self, token: str) -> list[tuple[str, bool]]:
        """Split at the `[RET]`s, spelled `token`: pieces, and whether each is the token."""
        pieces, start = [], 0
        for offset in self.rets:
            pieces += [(self[start:offset], False), (token, True)]
            start = offset + len(token)
        return [*pieces, (self[start:], False)]


@dataclass(frozen=True)
class ControlTokens:
    """The special tokens that no text may become.

    Args:
        pattern (`re.Pattern`): Matches the first character of each token, so that tokens that overlap or contain
            others are found too; it is a group where it is the whole token.
        normalize (`Callable`, *optional*): What the tokenizer does to a text before it looks for `normalized` tokens.
        normalized (`re.Pattern`): Matches those tokens in a normalised text.
    """

    pattern: re.Pattern[str]
    normalize: Callable[[str], str] | None
    normalized: re.Pattern[str]

    def split(self, text: str) -> str:
        """Mark `text` so that no token in it survives."""
        text = self.pattern.sub(_mark, _MARKS.sub("", _valid(text)))
        if self.normalize is None:
            return text
        pieces = _PIECES.findall(text)
        # Normalising can make a token of text that spells none, as lower-casing makes one of `</S>`.
        return "".join(_mark_each(p) if self.normalized.search(self.normalize(p)) else p for p in pieces)


def control_tokens(
    tokenizer: PreTrainedTokenizerBase, templates: Iterable[str], own: Iterable[str] = ()
) -> ControlTokens:
    """The tokenizer's special tokens, other tokens that `templates` write, and `own`."""
    templates = list(templates)
    tokens = {*own}.union(*map(tokenizer._get_control_tokens, templates))
    single = _any_of(token for token in tokens if len(token) == 1)
    longer = _any_of(token for token in tokens if len(token) > 1)
    # A template that changes the case of its messages may turn other spellings into tokens.
    flags = re.IGNORECASE if any(map(_CHANGES_CASE.search, templates)) else re.NOFLAG
    pattern = re.compile(f"({single})|(?={longer}).", flags | re.DOTALL)
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized]
    if normalizer is None or not tokens.intersection(found):
        return ControlTokens(pattern, None, re.compile(_any_of([])))
    normalized = {normalizer.normalize_str(token) for token in tokens.intersection(found)} - {""}
    return ControlTokens(pattern, normalizer.normalize_str, re.compile(_any_of(normalized)))


def as_text(value: Any, tokens: ControlTokens) -> Any:
    """Mark every text in `value` (a text, a list or a dict) so that no token of `tokens` in it survives.

    Texts without tokens stay as they are.
    """
    if isinstance(value, str):
        return tokens.split(value)
    if isinstance(value, dict):
        return {name: as_text(item, tokens) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_text(item, tokens) for item in value]
    return value


def is_marked(text: str) -> bool:
    """Whether a text has marks of [`as_text`], which the tokenizer must be told to heed and drop."""
    return _MARKS.search(text) is not None


def _any_of(tokens: Iterable[str]) -> str:
    """A regular expression for one of `tokens`, or for nothing where there are none."""
    return "|".join(map(re.escape, sorted(tokens))) or "(?!)"


def _valid(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which JSON has where a text was cut and which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _mark(match: re.Match[str]) -> str:
    # transformers takes out everything up to the first end mark to count placeholders; the second end mark splits
    # what is left around it.
    whole = f"{_CONTROL_TOKEN_START}{match[1]}{_CONTROL_TOKEN_END}" if match[1] else match[0]
    return whole + _CONTROL_TOKEN_END


def _mark_each(text: str) -> str:
    return "".join(character + _CONTROL_TOKEN_END for character in text)


__all__ = ["AnswerText", "ControlTokens", "as_text", "control_tokens", "is_marked"]
