"""What the commands share: their parser, one line for an error that the user can fix, and types of options."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

logger = logging.getLogger(__name__)
TRACEBACK = "FROMAGE_TRACEBACK"  # an environment variable: where it is set, errors keep their traceback
# Files, folders, checkpoints, addresses, values and extras that are not as they must be.
_EXPECTED = (ValueError, OSError, ImportError, SafetensorError)
_DTYPES = {
    "float32": ("fp32", "float", "single"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float64": ("fp64", "double"),
    "auto": (),
}


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names that `name` may have been meant for: alike, with its words, or with it for initials."""
    known = list(known)
    if alike := get_close_matches(name, known, n=1, cutoff=0.85):
        return alike
    words = set(name.split("_"))
    initials = [each for each in known if "".join(word[:1] for word in each.split("_")) == name]
    holders = sorted((each for each in known if words <= set(each.split("_"))), key=len)
    return list(dict.fromkeys([*initials, *holders, *get_close_matches(name, known, n=3)]))[:3]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names what is [`nearest`], or nothing."""
    found = nearest(name, known)
    return f"Did you mean {' or '.join(found)}?" if found else ""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors name the nearest option or choice."""

    def error(self, message: str) -> NoReturn:
        kind, _, rest = message.partition(": ")
        if kind == "unrecognized arguments":
            given = rest.split()[0].partition("=")[0]
            hint = did_you_mean(given, [option for option in self._all_options() if option.startswith("--")])
            if given.startswith("--") and any(action.metavar == "key=value" for action in self._actions):
                key = given.lstrip("-").replace("-", "_")
                hint = hint or f"Keys of the file are written without dashes: {key}=VALUE."
            message = f"{message}. {hint}" if hint else message
        elif choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hint = did_you_mean(choice[1], re.split(r"[', ]+", choice[2].strip("'")))
            message = f"{message}. {hint}" if hint else message
        super().error(message)

    def _all_options(self) -> list[str]:
        """Of this parser and of its subcommands."""
        below = [parser for action in self._actions if isinstance(action, argparse._SubParsersAction)
                 for parser in action.choices.values()]  # fmt: skip
        return [option for parser in (self, *below) for action in parser._actions for option in action.option_strings]


def command_parser(description: str | None, epilog: str | None = None) -> CommandParser:
    """A parser that shows `description` and `epilog` as they are, and names the command as the user called it.

    That is `fromage train`, or `python -m training.train` (which argparse itself does from Python 3.14 on).
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    prog = f"python -m {spec.name}" if spec is not None and sys.argv[0].endswith(".py") else None
    raw = argparse.RawDescriptionHelpFormatter
    return CommandParser(prog, description=description, epilog=epilog, formatter_class=raw)


@contextmanager
def errors_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the program with status 2 and one line, as argparse does, after an error that the user can fix.

    Those are errors of the data, the checkpoint, the network or the environment. Any other error keeps its traceback,
    as do all of them where `FROMAGE_TRACEBACK` is set.
    """
    try:
        yield
    except _EXPECTED as error:
        if os.environ.get(TRACEBACK):
            raise
        logger.debug("The full error:", exc_info=True)
        parser.exit(2, f"{parser.prog}: error: {_line(error)} [{TRACEBACK}=1 shows where]\n")


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Check the path."
    if isinstance(error, HFValidationError):  # transformers takes a path that is not a folder for a Hub id
        return f"{error} Nor is it a folder here. Check the path."
    if isinstance(error, SafetensorError):
        return f"A weights file (*.safetensors) is damaged or cut off: {error}. Get the checkpoint again."
    return " ".join(str(error).split()) or type(error).__name__


def dtype_name(value: str | torch.dtype) -> str:
    """The name that torch gives a dtype, from that name or an abbreviation ("bf16", "torch.bfloat16"), or "auto".

    Raises:
        ValueError: A model cannot have this dtype.
    """
    text = str(value).lower().removeprefix("torch.")
    for name, others in _DTYPES.items():
        if text == name or text in others:
            return name
    allowed = ", ".join(f"{name} ({others[0]})" if others else name for name, others in _DTYPES.items())
    raise ValueError(f"There is no dtype {value!r} for a model. Give one of {allowed}.")


def dtype_option(text: str) -> str:
    """[`dtype_name`] as an argparse type."""
    try:
        return dtype_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device_option(text: str) -> str:
    """A device that this machine has, as an argparse type."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such name, or no such device
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used ({reason}). Give cpu, or a GPU of this machine."
        ) from error
    return text


def at_least(lowest: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """An argparse type: a number that is not below `lowest`."""

    def option(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not number >= lowest:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"expected a {whole}number of at least {lowest}, got {text!r}")
        return number

    return option
