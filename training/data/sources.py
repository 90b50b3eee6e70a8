"""What the one line that names a source of data stands for."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from datasets import load_dataset_builder
from huggingface_hub import HfFileSystem, hf_hub_download

from .sharded_examples import SHARD_SUFFIXES

_SPLITS = {  # the words for each, as in `datasets`
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


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


def paths_of_split(folder: Path, files: Iterable[Path], split: str, by_name: bool = False) -> list[Path]:
    """Those files in a folder that are of a split: by the first of their subfolders whose name tells of one, or
    `by_name` by their own names too. Where no name tells of any, all are of the split "train".

    A name tells of a split where it has that as a word of its own, as `cc3m-train-0000.tar` and `val2014/` have.

    Raises:
        ValueError: There are none of that split.
    """
    by_split: dict[str, list[Path]] = {}
    wanted = _canonical(split)
    for file in files:
        parts = file.relative_to(folder).parts
        told = (_splits_in(part, wanted) for part in (parts if by_name else parts[:-1]))
        for name in next(filter(None, told), {""}):
            by_split.setdefault(name, []).append(file)
    unnamed = by_split.pop("", [])
    if not by_split and wanted == "train":
        return unnamed
    if wanted not in by_split:
        there = ", ".join(sorted(by_split)) or "no splits: all of it is the split train"
        called = f" or called {split}-*" if by_name else ""
        raise ValueError(f"{folder} has no files of split {split!r}, in a folder {split}/{called}; it has {there}.")
    return by_split[wanted]


def _canonical(split: str) -> str:
    return next((name for name, words in _SPLITS.items() if split.lower() in words), split)


def _splits_in(name: str, wanted: str) -> set[str]:
    """The splits that a name tells of: those that folders commonly have, and the one that is wanted."""
    known = {wanted: (wanted,)} | _SPLITS
    return {
        split
        for split, words in known.items()
        if re.search(rf"(?<![^\W\d_])(?:{'|'.join(map(re.escape, words))})(?![^\W\d_])", name, re.IGNORECASE)
    }


def _local(name: str) -> Path:
    if not name.startswith("hf://"):
        return Path(name)
    found = HfFileSystem().resolve_path(name)
    where = {"repo_id": found.repo_id, "repo_type": found.repo_type, "revision": found.revision}
    return Path(hf_hub_download(filename=found.path_in_repo, **where))


__all__ = ["files_of_split", "paths_of_split"]
