"""Draws that a resumed run, and every process, repeats."""

import hashlib
from typing import Any


def number_of(data: bytes) -> int:
    """A number below 2 ** 56 that is a function of `data`."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


def drawn_number(*what: Any) -> int:
    """[`number_of`] of what a draw depends on: a seed, what is drawn, and for what."""
    return number_of(repr(what).encode())


__all__ = ["drawn_number", "number_of"]
