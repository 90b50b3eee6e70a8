"""Captions and texts that can be trained on."""

from typing import Any

from ..processing_fromage import FromageProcessor
from .bad_examples import BadExampleError


def usable_captions(caption: Any, processor: FromageProcessor) -> Any:
    """A caption, or those of several that can be used.

    Raises:
        BadExampleError: None can.
    """
    if not isinstance(caption, (list, tuple)) or not caption:
        check_caption(caption, processor)
        return caption
    usable, last = [], None
    for text in caption:
        try:
            check_caption(text, processor)
            usable.append(text)
        except BadExampleError as error:
            last = error
    if not usable and last is not None:
        raise last
    return usable


def check_caption(caption: Any, processor: FromageProcessor) -> None:
    """Raise a `BadExampleError` for what is no text, or an empty one, or has a special token in it."""
    if not isinstance(caption, str) or not caption.strip():
        raise BadExampleError("empty caption", repr(caption)[:100])
    check_text(caption, processor)


def check_text(text: str, processor: FromageProcessor, kind: str = "caption") -> None:
    """Raise a `BadExampleError` for a text that is not Unicode, or has a special token in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of an emoji, as JSON may have it; tokenizers refuse it
        raise BadExampleError(f"{kind} is not Unicode", ascii(text)[:100]) from error
    for token in (processor.image_token, *processor.ret_tokens):
        if token in text:
            raise BadExampleError(f"{kind} with a special token", f"{token} in {text[:200]!r}")


__all__ = ["check_caption", "check_text", "usable_captions"]
