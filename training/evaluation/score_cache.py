"""Scores on disk, so that an interrupted evaluation resumes where it stopped."""

import json
import logging
import os
from itertools import count
from pathlib import Path
from typing import Any

from modeling_fromage.file_writing_fromage import replace_file

logger = logging.getLogger(__name__)


class ScoreCache:
    """A file of JSON lines: a header that states what the scores depend on, then one key with its scores per line.

    No computed score is lost. A truncated line is dropped by rewriting the file, and a file with another header is
    renamed to the same name with `.1`, `.2`, ... appended.

    Args:
        path: The file; `None` keeps nothing.
        depends_on: What the scores depend on.
    """

    def __init__(self, path: Path | None, depends_on: dict[str, Any]):
        self.path = path
        self.found: dict[int, Any] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps(depends_on).encode() + b"\n"
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
            except (TypeError, ValueError):  # a crash may leave a truncated line
                continue
            if key is not None:
                self.found[key] = scores
                kept.append(line)
        if self.found:
            logger.warning("%s has scores of %d dialogues from an earlier run; resuming.", path, len(self.found))
        if (whole := b"".join(kept)) != content:
            replace_file(path, whole)

    def add(self, key: int, scores: Any) -> None:
        self.found[key] = scores
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, scores]) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _set_aside(path: Path) -> None:
    free = next(other for i in count(1) if not (other := path.with_name(f"{path.name}.{i}")).exists())
    os.rename(path, free)
    logger.warning("%s has scores of another model, data set or protocol; they are in %s now.", path, free)
