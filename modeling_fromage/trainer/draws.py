"""Draws that a resumed run, and every process, repeats."""

import hashlib


def number_of(data: bytes) -> int:
    """A number below 2 ** 56 that is a function of `data`."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


__all__ = ["number_of"]
