"""What the one line that names a source of data stands for."""

import glob
import itertools
import os
import re
from pathlib import Path

from datasets import load_dataset_builder
from huggingface_hub import HfFileSystem, hf_hub_download

from .sharded_examples import SHARD_SUFFIXES

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


def files_of_split(source: str, split: str) -> list[Path]:
    """The files of a split of a folder or of a Hub dataset, as `datasets` finds them. Those of the Hub are downloaded
    as they are.

    Raises:
        ValueError: There is no such split, or its files cannot be read in place.
    """
    files = load_dataset_builder(source).config.data_files
    if split not in files:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(str, files))}.")
    names = [str(name) for name in files[split]]
    if strange := [name for name in names if not name.lower().endswith(SHARD_SUFFIXES)]:
        raise ValueError(
            f"{source} has {os.path.basename(strange[0])}, which cannot be read in place, as "
            f"{', '.join(SHARD_SUFFIXES)} can. Load it without streaming."
        )
    return [_local(name) for name in names]


def tars_of_split(folder: Path, split: str) -> list[Path]:
    """The tar shards of a folder: those in a folder called as the split, or whose names begin like it; all of them for
    the split "train" where none are.

    Raises:
        ValueError: There are none of that split.
    """
    files = sorted(folder.rglob("*.tar"))
    own = [file for file in files if split in file.relative_to(folder).parts[:-1] or file.name.startswith(split)]
    if not own and split != "train":
        raise ValueError(
            f"{folder} has no tar shards of split {split!r}, in a folder {split}/ or called {split}-*.tar."
        )
    return own or files


def _local(name: str) -> Path:
    if not name.startswith("hf://"):
        return Path(name)
    found = HfFileSystem().resolve_path(name)
    where = {"repo_id": found.repo_id, "repo_type": found.repo_type, "revision": found.revision}
    return Path(hf_hub_download(filename=found.path_in_repo, **where))


__all__ = ["expand_braces", "files_of_split", "find_files", "tars_of_split"]
