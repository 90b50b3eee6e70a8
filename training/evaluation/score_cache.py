"""Scores that took long, kept as they come, so that a run that broke off goes on where it was."""

import json
import logging
import os
from itertools import count
from pathlib import Path
from typing import Any

from modeling_fromage.file_writing_fromage import replace_file

logger = logging.getLogger(__name__)


class ScoreCache:
    """Numbers by a key, a line of JSON each, in a file whose first line says what they are scores of.

    Nothing that was computed is lost: a line that was cut off is dropped from a copy that then takes the file's place,
    and a file of something else is moved aside, to the same name with `.1`, `.2`, ... behind it.

    Args:
        path: The file; `None` keeps nothing.
        facts: What the scores depend on.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]):
        self.path, self.found = path, {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps(facts).encode() + b"\n"
        content = path.read_bytes() if path.is_file() else b""
        header, *lines = content.splitlines(keepends=True) or [b""]
        if header != first:
            if lines:
                _set_aside(path)
            lines = []
        kept = [first]
        for line in lines:
            try:
                key, scores = json.loads(line) if line.endswith(b"\n") else (None, None)
            except (TypeError, ValueError):  # a disk that lost its power leaves such lines
                continue
            if key is not None:
                self.found[key] = scores
                kept.append(line)
        if self.found:
            logger.warning("%s has scores of %d dialogues from an earlier run; it goes on.", path, len(self.found))
        if (whole := b"".join(kept)) != content:
            replace_file(path, whole)

    def add(self, key: int, scores: Any):
        self.found[key] = scores
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, scores]) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _set_aside(path: Path):
    free = next(other for i in count(1) if not (other := path.with_name(f"{path.name}.{i}")).exists())
    os.rename(path, free)
    logger.warning("%s has scores of another model, data set or protocol; they are in %s now.", path, free)
