"""Tar shards of images with their captions beside them (webdataset), read in place.

`a/000123.jpg` belongs to `a/000123.txt` or `a/000123.json`. Nothing is ever written under a name that a tar has.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..images_fromage import printable
from .columns import CAPTION_COLUMNS, bad_row, find_column, image_suffixes
from .shard_files import Shard

_SLOTS = ("image", "txt", "json")  # of a row of the index: first and last byte of each member, -1 where it has none
_DAMAGED = -2  # in the place of the first; the second tells where the damage begins
_BLOCK = tarfile.BLOCKSIZE
# Of `tarfile`, from headers that lie: about their size, or of thousands that each belong to the next.
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, RecursionError, MemoryError)


class DamagedTarError(ValueError):
    """Bytes of a tar file that are none of a tar, or the end of one that is cut off."""

    def __init__(self, start: int):
        super().__init__(f"the tar is damaged, or cut off, from byte {start:,} on")


class TarShard(Shard):
    """The examples of a tar file, by an index of `(N, 6)` offsets that one scan of its headers makes."""

    suffixes = (".tar",)

    def make_index(self) -> np.ndarray:
        rows: list[list[int]] = []
        of_key: dict[str, int] = {}  # the row that a key's next member belongs to
        slots = _slots(self.image_column)
        for name, start, end in _members(self.path):
            key, slot = _split(name, slots) if name else ("", None)
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
        try:
            found = self.members(number, with_image)
        except DamagedTarError as error:
            return bad_row(self.path.name, str(error))
        name = next((name for name, _ in found.values()), f"example {number}")
        place = f"{self.path.name}, {printable(name.rpartition('.')[0] or name)}"
        try:
            caption = self._caption({slot: data for slot, (_, data) in found.items()})
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
            return bad_row(
                place, f"its caption is not {'JSON' if 'JSON' in type(error).__name__ else 'UTF-8'}: {error}"
            )
        return {"image": image_of(found), "caption": caption, "place": place}

    def members(self, number: int, with_image: bool = True) -> dict[str, tuple[str, bytes]]:
        """Name and contents of an example's members: those of "image", "txt" and "json" that it has.

        Raises:
            DamagedTarError: They cannot be read.
        """
        spans = self.index[number].reshape(-1, 2).tolist()
        if spans[0][0] == _DAMAGED:
            raise DamagedTarError(spans[0][1])
        wanted = [i for i, span in enumerate(spans) if span[0] >= 0 and (with_image or _SLOTS[i] != "image")]
        try:
            return {_SLOTS[i]: self._member(*spans[i]) for i in wanted}
        except _BROKEN as error:
            raise DamagedTarError(spans[wanted[0]][0]) from error

    def _member(self, start: int, end: int) -> tuple[str, bytes]:
        """Name and contents of a member whose headers begin at `start`."""
        chunk = self.pread(start, end)
        if (plain := _plain_header(chunk)) is not None:
            return plain[0], chunk[plain[1] :]
        member = tarfile.TarFile(fileobj=io.BytesIO(chunk)).next()
        if member is None:
            raise tarfile.TarError("nothing but zeros")
        return member.name, chunk[member.offset_data :]

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


def image_of(members: dict[str, tuple[str, bytes]]) -> dict[str, Any] | None:
    """The image among the members of an example, as `{"bytes", "path"}`; `None` where there is none.

    Without bytes the name of a member would be taken for that of a file here.
    """
    name, data = members.get("image", ("", b""))
    return {"bytes": data, "path": printable(name)} if data else None


def _slots(image_suffix: str | None) -> dict[str, int]:
    """The slot of a member by its suffix, in lower case: images of all formats that are decoded, or of one suffix."""
    if image_suffix in (None, "image"):
        images = [suffix[1:] for suffix in image_suffixes()]
    else:
        images = [image_suffix.lower().removeprefix(".")]
    return {**dict.fromkeys(images, 0), "txt": 1, "json": 2}


def _split(name: str, slots: dict[str, int]) -> tuple[str, int | None]:
    """The key of a member and its slot, `None` for one that is neither image nor caption."""
    base = name.rpartition("/")[2]
    suffix = base.rpartition(".")[2]
    if (slot := slots.get(suffix.lower())) is None:
        longer = next((suffix for suffix in slots if "." in suffix and base.lower().endswith(f".{suffix}")), None)
        if longer is None:
            return name, None
        suffix, slot = longer, slots[longer]
    if base.startswith("."):  # a Mac's "._000123.jpg", which is no image
        return name, None
    return name[: -len(suffix) - 1], slot


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """The name of each whole file in a tar, with the bytes from its first header to the end of its data; for one that
    is cut off, and for bytes that are none of a tar, the first byte and -1."""
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        while end < size:
            start, found = end, _plain_header(os.pread(file.fileno(), 3 * _BLOCK, end))
            if found is None:
                file.seek(end)
                try:  # of any kind; it goes on behind damage, and in tars that were laid end to end
                    member = tarfile.TarFile(fileobj=file, ignore_zeros=True).next()
                except _BROKEN:
                    member = None
                if member is not None and member.size < 0:
                    yield "", end, -1
                    end = member.offset_data
                    continue
                start = size if member is None else member.offset
                if _has_contents(file, end, start):
                    yield "", end, -1
                if member is None:
                    return
                if not member.isreg():
                    end = member.offset_data
                    continue
                found = member.name, member.offset_data - member.offset, member.size
            name, header, length = found
            if start + header + length > size:
                yield name, start, -1
                return
            yield name, start, start + header + length
            end = start + header + -(-length // _BLOCK) * _BLOCK


def _plain_header(blocks: bytes) -> tuple[str, int, int] | None:
    """The name of a regular file, the length of its headers, and its size; `None` where they take more to read.

    `tarfile` takes several times as long, and there are millions of them.
    """
    try:
        first = 0
        if blocks[156:157] == b"x":  # Python's own, where a time has fractions of a second
            length = _checked_size(blocks[:_BLOCK])
            extended = blocks[_BLOCK : _BLOCK + length]
            if length > _BLOCK or any(key in extended for key in (b" path=", b" size=", b" GNU.")):
                return None
            first = 2 * _BLOCK
        header = blocks[first : first + _BLOCK]
        if header[257:262] != b"ustar" or header[156] not in b"0\0":
            return None
        size = _checked_size(header)
    except (ValueError, IndexError):
        return None
    name = header[:100].partition(b"\0")[0]
    if header[262:263] == b"\0" and (prefix := header[345:500].partition(b"\0")[0]):  # not GNU's format
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), first + _BLOCK, size


def _checked_size(header: bytes) -> int:
    """The size that a header tells; a `ValueError` where its sum is another, or the size is no octal number from 0."""
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(header[148:156].strip(b" \0"), 8):
        raise ValueError
    size = int(header[124:136].strip(b" \0") or b"0", 8)
    if size < 0:
        raise ValueError
    return size


def _has_contents(file: Any, start: int, end: int) -> bool:
    """Whether there is anything but zeros between two places."""
    file.seek(start)
    return any(file.read(min(1 << 20, end - place)).strip(b"\0") for place in range(start, end, 1 << 20))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file of this name and contents to a tar file that is being written."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


__all__ = ["DamagedTarError", "TarShard", "add_member", "image_of"]
