"""The list of a run's bad examples: `_bad_examples.jsonl` in its output folder, one line an example."""

import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..file_writing_fromage import replace_file
from ..images_fromage import printable

NAME, _PARTS = "_bad_examples.jsonl", "_bad_examples"  # the Trainer pushes nothing whose name begins with "_"
_FIRST = 3  # places that a table names of each reason

Entry = dict[str, Any]


class BadExampleList:
    """Every bad example once, however many workers, processes, epochs and resumed runs come across it.

    Whoever finds one, a worker for instance, appends it to a file of its own at once; [`merge`] collects these. So a
    killed run has lost nothing.

    Args:
        directory (`str`): The run's output folder.
        process_index (`int`): Of this process among those that train.
    """

    def __init__(self, directory: str | os.PathLike, process_index: int = 0):
        self.path, self.parts = Path(directory, NAME), Path(directory, _PARTS)
        self.process_index = process_index
        self._entries: dict[tuple, Entry] = {}
        self._read_so_far: dict[Path, int] = {}
        self._noted: set[tuple] = set()
        self._pid = os.getpid()
        self._is_written, self._last_write, self._write_seconds = True, 0.0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_entries": {}, "_read_so_far": {}, "_noted": set()}  # for a worker that is spawned

    def note(self, entry: Entry) -> None:
        """Append an example, unless this process has done so: its `split`, `number`, `place`, `reason`, `detail`; of a
        stream, instead of a number, a hash of its `contents`, and which `copy` of them it is in its pass."""
        if self._pid != os.getpid():  # a worker that was forked
            self._noted, self._pid = set(self._entries), os.getpid()
        if (key := _key(entry)) in self._noted:
            return
        self._noted.add(key)
        self.parts.mkdir(parents=True, exist_ok=True)
        with self._own_part(str(self._pid)).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")  # in ASCII: a name may be invalid Unicode

    def add(self, entry: Entry) -> None:
        """Take in an example, in this process alone."""
        self._entries.setdefault(_key(entry), entry)

    def begin(self, keep: bool) -> None:
        """Start a run: without `keep` with an empty list, but for what evaluations of this process have found; with it
        from the list of the run that is resumed, and what that one noted last."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry["split"] != "train"}
        self._noted, self._read_so_far = set(self._entries), {}
        if keep:
            self._take(self.path)  # each process may have to write the whole list, if the run stops
        if self.process_index == 0:
            if keep:
                self.read_parts()
            if self._entries or self.path.exists():
                self.write()
            shutil.rmtree(self.parts, ignore_errors=True)  # now that what they had is in the list
            self._read_so_far = {}
        elif not keep:  # on another disk, perhaps
            self._remove_own_parts()
        self.gather([])  # nothing is noted before

    def read_parts(self, own: bool = False) -> None:
        """Take in what was noted since: by the processes of this machine, or by this process and its workers."""
        for path in sorted(self.parts.glob(self._own_part("*").name if own else "*.jsonl")):
            self._take(path)

    @staticmethod
    def gather(found: list[Any]) -> list[Any]:
        """The lists of all processes, which call this together, as one."""
        from accelerate.utils import gather_object  # this package may be installed without it

        return gather_object(found)

    def merge(self, write: bool = False) -> list[Entry]:
        """Collect what all processes have noted, which they call together; what is new of it. The list is written with
        `write`, and else where that takes little of the time."""
        known = set(self._entries)
        self.read_parts(own=True)
        for entry in self.gather([entry for key, entry in self._entries.items() if key not in known]):
            self.add(entry)
        new = [entry for key, entry in self._entries.items() if key not in known]
        self._is_written = self._is_written and not new
        is_due = write or time.perf_counter() - self._last_write > 20 * self._write_seconds
        if is_due and not self._is_written and self.process_index == 0:
            self.write()
        return new

    def end(self) -> None:
        """Remove the files that [`merge`] has collected."""
        self._read_so_far = {}
        self._remove_own_parts()
        if self.process_index == 0:
            shutil.rmtree(self.parts, ignore_errors=True)

    def _remove_own_parts(self) -> None:
        for path in self.parts.glob(self._own_part("*").name):
            path.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the list, in the order of the data."""
        start = time.perf_counter()
        rows = sorted(self._entries.values(), key=lambda entry: [str(entry["split"]), *_order(entry)])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._is_written, self._last_write = True, time.perf_counter()
        self._write_seconds = self._last_write - start

    def reasons(self, split: str = "train") -> Counter[str]:
        """How many bad examples of `split` are known, by reason."""
        return Counter(entry["reason"] for entry in self._entries.values() if entry["split"] == split)

    def metrics(self) -> dict[str, int]:
        """`bad_examples`, and of each reason `bad_examples_not_found`, ..."""
        reasons: Counter[str] = Counter()
        for reason, count in self.reasons().most_common():
            reasons["bad_examples_" + re.sub(r"\W+", "_", reason.lower()).strip("_")] += count
        return {"bad_examples": reasons.total(), **reasons}

    def table(self, split: str = "train") -> str:
        """A line for each reason: how many, and where the first of them are."""
        rows = sorted((entry for entry in self._entries.values() if entry["split"] == split), key=_order)
        lines = []
        for reason, count in self.reasons(split).most_common():
            places = [_told(entry) for entry in rows if entry["reason"] == reason]
            lines.append(f"  {count:,} {reason} ({'; '.join(places[:_FIRST])}{'; ...' if count > _FIRST else ''})")
        return "\n".join(lines)

    def why_stopped(self, why: str) -> str:
        """The message of a run that stops because of `why`: with the table and what to do. The list is written."""
        self.write()
        return (
            f"{why} Those that were found so far:\n{self.table()}\nThey are listed in {self.path}. Correct them or "
            "take them out, or allow more: `max_bad_share`."
        )

    def _own_part(self, pid: str) -> Path:
        return self.parts / f"{self.process_index:05d}-{pid}.jsonl"

    def _take(self, path: Path) -> None:
        """Take in the lines of a file that were not read yet; a last one that was cut off by a kill is left out."""
        try:
            with path.open("rb") as file:
                file.seek(self._read_so_far.get(path, 0))
                whole, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        if whole:
            self._read_so_far[path] = self._read_so_far.get(path, 0) + len(whole) + 1
        for line in whole.splitlines():
            try:
                self.add(json.loads(line))
            except (ValueError, KeyError):  # cut off by a kill, and written on by a process of the same id
                continue


def _key(entry: Entry) -> tuple:
    if entry["number"] is not None:
        return entry["split"], entry["number"]
    # Of a stream, which may be shuffled: neither where an example was met nor its file, which others may share, holds.
    return entry["split"], entry["contents"], entry["copy"]


def _order(entry: Entry) -> list:
    number = entry["number"]
    return [number is None, number or 0, str(entry["place"])]


def _told(entry: Entry) -> str:
    return printable(str(entry["place"] or f"example {entry['number']}"))


__all__ = ["NAME", "BadExampleList"]
