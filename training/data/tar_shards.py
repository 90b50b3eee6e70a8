"""Tar shards of images with their captions beside them (webdataset), read in place.

`a/000123.jpg` belongs to `a/000123.txt` or `a/000123.json`. Nothing is ever written under a name that a tar has.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_fromage.images_fromage import DEFAULT_LIMITS, printable

from .columns import CAPTION_COLUMNS, bad_row, find_column
from .shard_files import Shard

_SLOTS = ("image", "txt", "json")  # of a row of the index: first and last byte of each member, -1 where it has none
_DAMAGED = -2  # in the place of the first; the second tells where the damage begins
_BLOCK = tarfile.BLOCKSIZE


class TarShard(Shard):
    """The examples of a tar file, by an index of `(N, 6)` offsets that one scan of its headers makes."""

    suffixes = (".tar",)

    def make_index(self) -> np.ndarray:
        rows: list[list[int]] = []
        of_key: dict[str, int] = {}  # the row that a key's next member belongs to
        suffixes = _image_suffixes(self.image_column)
        for name, start, end in _members(self.path):
            key, slot = _split(name, suffixes) if name else ("", None)
            if end < 0:  # damaged, and with it the example that it belonged to
                if rows and rows[-1][0] != _DAMAGED and (rows[-1][0] < 0 or max(rows[-1][2:]) < 0):
                    rows.pop()
                    of_key = {other: row for other, row in of_key.items() if row < len(rows)}
                rows.append([_DAMAGED, start] + [-1] * 4)
            elif slot is not None:
                if key not in of_key or rows[of_key[key]][2 * slot] >= 0:  # a second image: a second example
                    of_key[key] = len(rows)
                    rows.append([-1] * 6)
                rows[of_key[key]][2 * slot : 2 * slot + 2] = start, end
        return np.array(rows, dtype=np.int64).reshape(-1, 2 * len(_SLOTS))

    def read(self, number: int, with_image: bool = True) -> dict[str, Any]:
        spans = self.index[number].reshape(-1, 2).tolist()
        if spans[0][0] == _DAMAGED:
            return bad_row(self.path.name, f"the tar is damaged, or cut off, from byte {spans[0][1]:,} on")
        found = {
            slot: self._member(*span)
            for slot, span in zip(_SLOTS, spans, strict=True)
            if span[0] >= 0 and (with_image or slot != "image")
        }
        name = next((name for name, _ in found.values()), f"example {number}")
        place = f"{self.path.name}, {printable(name.rpartition('.')[0] or name)}"
        try:
            caption = self._caption({slot: data for slot, (_, data) in found.items()})
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
            return bad_row(
                place, f"its caption is not {'JSON' if 'JSON' in type(error).__name__ else 'UTF-8'}: {error}"
            )
        name, data = found.get("image", ("", b""))
        # Without bytes the name of a member would be taken for that of a file here.
        image = {"bytes": data, "path": printable(name)} if data else None
        return {"image": image, "caption": caption, "place": place}

    def _member(self, start: int, end: int) -> tuple[str, bytes]:
        """Name and contents of a member whose headers begin at `start`."""
        chunk = self.pread(start, end)
        member = tarfile.TarFile(fileobj=io.BytesIO(chunk)).firstmember
        return member.name, chunk[member.offset_data : member.offset_data + member.size]

    def _caption(self, members: dict[str, bytes]) -> Any:
        wants_json = self.caption_column is not None and self.caption_column != "txt"
        if "txt" in members and not wants_json:
            return members["txt"].decode("utf-8-sig").strip()
        if "json" not in members:
            return None
        found = json.loads(members["json"].decode("utf-8-sig"))
        if isinstance(found, dict):
            return found.get(find_column(found, self.caption_column, CAPTION_COLUMNS))
        return found


def _image_suffixes(wanted: str | None) -> tuple[str, ...]:
    if wanted not in (None, "image"):
        return ("." + wanted.lower().removeprefix("."),)
    allowed = Image.registered_extensions().items()
    return tuple(suffix for suffix, name in allowed if name in DEFAULT_LIMITS.formats)


def _split(name: str, image_suffixes: tuple[str, ...]) -> tuple[str, int | None]:
    """The key of a member and its slot, `None` for one that is neither image nor caption."""
    lower = name.lower()
    if name.rpartition("/")[2].startswith("."):  # a Mac's "._000123.jpg", which is no image
        return name, None
    for slot, suffixes in enumerate((image_suffixes, (".txt",), (".json",))):
        for suffix in suffixes:
            if lower.endswith(suffix):
                return name[: -len(suffix)], slot
    return name, None


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """The name of each whole file in a tar, with the bytes from its first header to the end of its data; for one that
    is cut off, and for bytes that are none of a tar, the first byte and -1."""
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        try:
            tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)  # goes on behind damage, and in tars laid end to end
            while (member := tar.next()) is not None:
                tar.members.clear()
                if _has_contents(file, end, member.offset):
                    yield "", end, -1
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                if member.offset_data + member.size > size and member.isreg():
                    yield member.name, member.offset, -1
                    return
                if member.isreg():
                    yield member.name, member.offset, member.offset_data + member.size
                if end > size:  # without the padding of its last block
                    return
        except tarfile.TarError:
            yield "", end, -1
            return
        if _has_contents(file, end, size):
            yield "", end, -1


def _has_contents(file: Any, start: int, end: int) -> bool:
    """Whether there is anything but zeros between two places. Leaves the file where it was."""
    if start >= end:
        return False
    before = file.tell()
    file.seek(start)
    found = any(file.read(min(1 << 20, end - place)).strip(b"\0") for place in range(start, end, 1 << 20))
    file.seek(before)
    return found


__all__ = ["TarShard"]
