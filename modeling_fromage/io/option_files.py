"""YAML files and `key=value` overrides as dataclasses of options."""

import dataclasses
import re
from argparse import ArgumentTypeError
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .command_line import did_you_mean


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars. PyYAML implements 1.1, where `1e-3` is a string, `no` is false and `1:30` is 90."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    # The first match wins: integers before floats.
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


def read_options(path: str, overrides: list[str], advice: str = "Give a YAML file") -> dict[str, Any]:
    """The values of a YAML file, updated by overrides.

    Args:
        advice: What to do where the file cannot be read.

    Raises:
        ValueError: The file cannot be read or is not a mapping, or an override does not have the form key=value.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = _load(file.read(), f"{path} is not valid YAML")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {advice}.") from error
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold lines of the form `key: value`, got {str(config)[:100]!r}.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"Overrides have the form key=value, got {override!r}.")
        config[key] = _load(value, f"The value of {override!r} is not valid YAML")
    return config


def _load(text: str, problem: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{problem}: {' '.join(str(error).split())}.") from error


def to_dataclasses(config: dict[str, Any], types: tuple[Any, ...]) -> tuple[Any, ...]:
    """`config` as instances of `types`, each value converted to the type of its field.

    Raises:
        ValueError: A key is unknown or missing, or a value has the wrong type.
    """
    config = dict(config)
    for cls in types:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name in config:
                config[field.name] = typed(field.name, config[field.name], hints[field.name])
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"`{field.name}` is missing. Say what it is in the file, or as {field.name}=...")
    known = [field.name for cls in types for field in dataclasses.fields(cls)]
    if unknown := sorted(map(str, config.keys() - set(known))):
        told = [f"There is no key {name!r}. {did_you_mean(name, known) or 'Leave it out.'}" for name in unknown]
        raise ValueError(" ".join(told))
    return HfArgumentParser(types).parse_dict(config)


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` declares. Strings and integers are converted where that is unambiguous.

    Raises:
        ValueError: It has another type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for convert in (_as_it_is, _converted):
        for kind in kinds:
            try:
                return convert(value, kind)
            except (TypeError, ValueError, ArgumentTypeError):
                continue
    expected = type_name(hint)
    quotes = " Put a text that looks like a number in quotes." if str in kinds else ""
    raise ValueError(f"`{name}` must be {expected}, got {value!r}.{quotes}")


def type_name(hint: Any) -> str:
    """A type as shown in messages and `--help`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join("nothing" if kind is NoneType else _name(kind) for kind in kinds)


def _as_it_is(value: Any, kind: Any) -> Any:
    """A value that already has the type, with its items converted. Strings stand for members of an enumeration."""
    if kind is Any or value is None and kind is NoneType:
        return value
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        fits = any(value is choice or value == choice and type(value) is type(choice) for choice in inner)
    elif not isinstance(origin, type):
        raise TypeError
    elif isinstance(value, bool):
        fits = origin is bool
    else:
        fits = isinstance(value, (int, float) if origin is float else str if issubclass(origin, Enum) else origin)
    if not fits:
        raise TypeError
    if origin is list and inner:
        return [typed("an item", item, inner[0]) for item in value]
    return value


def _converted(value: Any, kind: Any) -> Any:
    if kind is bool and isinstance(value, str):
        return string_to_bool(value)
    if kind in (int, float) and isinstance(value, str):
        return kind(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if value is False and isinstance(kind, type) and issubclass(kind, Enum):
        return kind("no").value
    raise TypeError


def _name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list[Any]: "a list"}
    return names.get(kind, getattr(kind, "__name__", None) if not get_args(kind) else None) or str(kind)


__all__ = ["read_options", "to_dataclasses", "type_name", "typed"]
