"""Text that stays text: what somebody types, or a model spells, is never read as a special token.

By private marks in a text, at which the tokenizer takes it apart and which it leaves out: those of transformers' own
`sanitize_control_tokens`. That wraps whole tokens, which cannot be told from placeholders once the wrapped ones between
two halves are taken out; here a mark behind a token's first character parts it.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

_MARKS = re.compile(f"[{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}]")
_PIECES = re.compile(f"{_MARKS.pattern}|[^{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}]+")  # what marks part, and marks
_CHANGES_CASE = re.compile(r"[|.]\s*(lower|upper|capitalize|title|swapcase|casefold)\b")  # of a template's text


class AnswerText(str):
    """A text of an answer, with the places `rets` of the `[RET]`s in it that the model wrote as its token, and that
    found no image. What is not at these places is text, whatever it spells."""

    def __new__(cls, text: str, rets: tuple[int, ...] = ()):
        self = super().__new__(cls, text)
        self.rets = tuple(rets)
        return self

    @classmethod
    def join(cls, texts: list[str]) -> "AnswerText":
        rets, length = [], 0
        for text in texts:
            rets += [length + place for place in getattr(text, "rets", ())]
            length += len(text)
        return cls("".join(texts), rets)

    def stripped(self, left: bool, right: bool) -> "AnswerText":
        """Without the blanks at its left or right end."""
        text = self.lstrip() if left else str(self)
        rets = [place - (len(self) - len(text)) for place in self.rets]
        return AnswerText(text.rstrip() if right else text, rets)

    def split_rets(self, token: str) -> list[tuple[str, bool]]:
        """The text in pieces, and for each whether it is a `[RET]`, which `token` is the text of."""
        pieces, start = [], 0
        for place in self.rets:
            pieces += [(self[start:place], False), (token, True)]
            start = place + len(token)
        return [*pieces, (self[start:], False)]


@dataclass(frozen=True)
class ControlTokens:
    """What no text may become: special tokens.

    Attributes:
        pattern: Matches the first character of each, so that those that overlap or hold others are found too; as a
            group where it is all of the token.
        normalize: What the tokenizer does to a text before it looks for tokens that are `normalized`, where it does.
        normalized: Matches those tokens in a text that was normalised.
    """

    pattern: re.Pattern
    normalize: Callable[[str], str] | None
    normalized: re.Pattern

    def part(self, text: str) -> str:
        """`text` with marks that take the tokens in it apart."""
        text = self.pattern.sub(_mark, _MARKS.sub("", _valid(text)))
        if self.normalize is None:
            return text
        return "".join(_mark_each(piece) if self._appears_in(piece) else piece for piece in _PIECES.findall(text))

    def _appears_in(self, piece: str) -> bool:
        """Whether a token comes of what spells none: of `</S>` where the tokenizer makes small letters of it."""
        return self.normalized.search(self.normalize(piece)) is not None


def control_tokens(tokenizer: PreTrainedTokenizerBase, templates: list[str], own: tuple[str, ...]) -> ControlTokens:
    """The tokenizer's special tokens, what else `templates` write as a token, and `own`."""
    tokens = {*own}.union(*map(tokenizer._get_control_tokens, templates))
    single = _any_of(token for token in tokens if len(token) == 1)
    longer = _any_of(token for token in tokens if len(token) > 1)
    # A template that changes the case of its messages would make tokens of what is none before.
    flags = re.IGNORECASE if any(map(_CHANGES_CASE.search, templates)) else re.NOFLAG
    pattern = re.compile(f"({single})|(?={longer}).", flags | re.DOTALL)
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized]
    if normalizer is None or not tokens.intersection(found):
        return ControlTokens(pattern, None, re.compile(_any_of([])))
    normalized = {normalizer.normalize_str(token) for token in tokens.intersection(found)} - {""}
    return ControlTokens(pattern, normalizer.normalize_str, re.compile(_any_of(normalized)))


def _any_of(tokens: Iterable[str]) -> str:
    """A regular expression for one of `tokens`; of none it matches nothing."""
    return "|".join(map(re.escape, sorted(tokens))) or "(?!)"


def as_text(value: Any, tokens: ControlTokens) -> Any:
    """`value`, a text or messages, with marks that take `tokens` in it apart; a text without any stays as it is."""
    if isinstance(value, str):
        return tokens.part(value)
    if isinstance(value, dict):
        return {name: as_text(item, tokens) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_text(item, tokens) for item in value]
    return value


def _valid(text: str) -> str:
    """`text` with U+FFFD for halves of characters (JSON has them where a text was cut), which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _mark(match: re.Match) -> str:
    # What transformers takes out to count placeholders ends with the first end; the second parts what is around it.
    whole = f"{_CONTROL_TOKEN_START}{match[1]}{_CONTROL_TOKEN_END}" if match[1] else match[0]
    return whole + _CONTROL_TOKEN_END


def _mark_each(text: str) -> str:
    return "".join(character + _CONTROL_TOKEN_END for character in text)


def is_marked(text: str) -> bool:
    """Whether a text has marks of [`as_text`], which the tokenizer is to heed and to leave out."""
    return _MARKS.search(text) is not None


__all__ = ["AnswerText", "ControlTokens", "as_text", "control_tokens", "is_marked"]
