"""Scores that took long, kept as they come, so that a run that broke off goes on where it was."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class PartialScores:
    """Numbers by a key, a line of JSON each, in a file whose first line says what they are scores of.

    A file of something else is begun anew; a last line that was cut off is dropped.

    Args:
        path: The file; `None` keeps nothing.
        facts: What the scores depend on.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]):
        self.path, self.found = path, {}
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        first = json.dumps(facts).encode() + b"\n"
        if whole[:1] != [first]:
            whole = [first]
        for line in whole[1:]:
            key, scores = json.loads(line)
            self.found[key] = scores
        if self.found:
            logger.warning("%s has scores of %d dialogues from an earlier run; it goes on.", path, len(self.found))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(whole))

    def add(self, key: int, scores: Any):
        self.found[key] = scores
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, scores]) + "\n")
