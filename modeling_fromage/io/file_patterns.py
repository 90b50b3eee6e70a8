"""The files that a pattern names."""

import glob
import itertools
import os
import re
from pathlib import Path

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")


def find_files(source: str) -> list[Path]:
    """The files that a path or a pattern names: `*`, `?`, `[...]`, `**`; `{000..099}` and `{a,b}`. An empty list where
    `source` is no pattern, and there is no such file.

    Raises:
        ValueError: A pattern names no file.
    """
    if os.path.exists(source):
        return [Path(source)]
    alternatives = expand_braces(source)
    if len(alternatives) == 1 and not glob.has_magic(source):
        return []
    found = [sorted(glob.glob(name, recursive=True)) for name in alternatives]
    missing = [name for name, files in zip(alternatives, found, strict=True) if not files]
    if missing:
        raise ValueError(f"There is no file {missing[0]}, which {source} names. Check the path.")
    return [Path(path) for path in itertools.chain(*found)]


def expand_braces(pattern: str) -> list[str]:
    """The alternatives of a pattern: of numbers `{000..099}`, zeros in front kept, and of texts `{a,b}`."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        chosen = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    elif "," in inside:
        chosen = inside.split(",")
    else:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + each + rest for each in chosen for rest in expand_braces(tail)]


__all__ = ["expand_braces", "find_files"]
