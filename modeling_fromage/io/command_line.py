"""What the commands share: one line for an error that its user can mend, and types of options."""

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

logger = logging.getLogger(__name__)
TRACEBACK = "FROMAGE_TRACEBACK"  # an environment variable: errors with all that led to them
# Files, folders, checkpoints, addresses, values and extras that are not as they must be.
_EXPECTED = (ValueError, OSError, ImportError, SafetensorError)
_DTYPES = {
    "float32": ("fp32", "float", "single"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float64": ("fp64", "double"),
    "auto": (),
}


@contextmanager
def errors_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the program with status 2 and one line, as argparse does, where an error is one that its user can mend: of
    the data, the checkpoint, the network. Any other keeps its traceback, as do all where `FROMAGE_TRACEBACK` is set."""
    try:
        yield
    except _EXPECTED as error:
        if os.environ.get(TRACEBACK):
            raise
        logger.debug("The error in full:", exc_info=True)
        parser.exit(2, f"{parser.prog}: error: {_line(error)} [{TRACEBACK}=1 shows where]\n")


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Check the path."
    if isinstance(error, HFValidationError):  # a path that is no folder is taken for a name on the Hub
        return f"{error} Nor is it a folder here. Check the path."
    if isinstance(error, SafetensorError):
        return f"A weights file (*.safetensors) is damaged or cut off: {error}. Get the checkpoint again."
    return " ".join(str(error).split()) or type(error).__name__


def dtype_name(value: Any) -> str:
    """A dtype's name in torch, by that or by its usual abbreviation ("bf16", "torch.bfloat16"), or "auto".

    Raises:
        ValueError: It is none that a model may have.
    """
    text = str(value).lower().removeprefix("torch.")
    for name, others in _DTYPES.items():
        if text == name or text in others:
            return name
    allowed = ", ".join(f"{name} ({others[0]})" if others else name for name, others in _DTYPES.items())
    raise ValueError(f"There is no dtype {value!r} for a model. Give one of {allowed}.")


def dtype_option(text: str) -> str:
    """As [`dtype_name`], for argparse."""
    try:
        return dtype_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device_option(text: str) -> str:
    """A device that there is here, for argparse."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such name, or no such device
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used ({reason}). Give cpu, or a GPU that is here."
        ) from error
    return text


def at_least(lowest: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """A number from `lowest` on, for argparse."""

    def option(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not number >= lowest:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"expected a {whole}number of at least {lowest}, got {text!r}")
        return number

    return option
