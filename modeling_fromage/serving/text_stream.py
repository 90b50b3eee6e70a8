"""The text of an answer while it is written, of which nothing is ever taken back."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..answer_rows_fromage import AnswerOptions, up_to_stop
from ..image_search_fromage import Segment

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte
_INCOMPLETE = "�"  # what tokenizers give for the first bytes of a letter


class TextStream:
    """Turns tokens into pieces of text as soon as these are certain: no letter of which bytes are missing, no white
    space that may turn out to end the answer, and nothing that may be the beginning of a stop string.

    After a `[RET]`, whose image is looked up when all is written, nothing more is handed on until then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ret_ids: Sequence[int], options: AnswerOptions):
        self.tokenizer, self.ret_ids = tokenizer, ret_ids
        self.stop_strings, self.eos_ids = options.stop_strings, set(options.eos_ids)
        self.tokens: list[int] = []
        self.written = ""
        self.holds = False  # until the end

    def put(self, token: int) -> Iterator[Segment]:
        """What is certain with one more token."""
        is_ret = token in self.ret_ids
        if not self.holds and not is_ret and token not in self.eos_ids:
            self.tokens.append(token)
            yield from self._new(self._certain())
        elif is_ret:
            if not self.holds:
                yield from self._new(self._text())
            self.holds = True
            if token == self.ret_ids[-1]:  # one that is cut off finds no image
                yield {"type": "ret"}

    def rest(self, answer: Sequence[Segment]) -> Iterator[Segment]:
        """What was not handed on of the whole answer."""
        parts = list(answer)
        if parts and parts[0]["type"] == "text":
            yield from self._new(str(parts.pop(0)["text"]))
        yield from parts

    def _text(self, count: int | None = None) -> str:
        """The text of the first `count` tokens, up to a stop string."""
        text: Any = self.tokenizer.decode(self.tokens[:count], skip_special_tokens=True)
        return up_to_stop(text, self.stop_strings)

    def _certain(self) -> str:
        count = len(self.tokens)
        while count and _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(self.tokens[count - 1]))):
            count -= 1  # a letter in bytes is one only if no byte follows that does not fit
        text = self._text(count).rstrip(_INCOMPLETE)
        for stop in self.stop_strings:
            begun = (n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n]))
            text = text[: len(text) - next(begun, 0)]
        return text.rstrip()

    def _new(self, text: str) -> Iterator[Segment]:
        text = text.lstrip()
        new = text[len(self.written) :]
        if new and text.startswith(self.written):
            self.written = text
            yield {"type": "text", "text": new}


__all__ = ["TextStream"]
