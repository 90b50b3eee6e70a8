"""The files of a saved index: which ones its listing names, and whether they are still what was written."""

import contextlib
import zlib
from pathlib import Path
from typing import Any

INDEX_FILE = "index.json"


class CorruptIndexError(ValueError):
    """A file of an index is not what was written. The message names the file."""

    def __init__(self, path: Path, detail: str):
        super().__init__(f"{path} is damaged: {detail}. Copy or download the index again, or build it anew.")


class ReplacedIndexError(ValueError):
    """Another index was saved into the folder after this one was opened, and files that it still needs are gone."""

    def __init__(self, directory: Path):
        super().__init__(
            f"The index in {directory} was saved anew since it was opened. Reopen it: "
            "`FromageImageIndex.from_pretrained`."
        )


class IndexFolder:
    """The folder of an index, as it was when it was opened.

    Args:
        path (`Path`): The folder.
        listing (`bytes`): The contents of its `index.json`.
    """

    def __init__(self, path: Path, listing: bytes):
        self.path, self.listing = path, listing

    def is_replaced(self) -> bool:
        """Whether another index has been saved into it since."""
        with contextlib.suppress(OSError):
            return (self.path / INDEX_FILE).read_bytes() != self.listing
        return False

    def error(self, file: Path, detail: str) -> ValueError:
        """The error to raise about a file that is missing or not as listed."""
        return ReplacedIndexError(self.path) if self.is_replaced() else CorruptIndexError(file, detail)

    def file(self, entry: dict[str, Any]) -> "ListedFile":
        """The file of an entry of `index.json`. Whatever name is written there, it is one in this folder."""
        return ListedFile(self.path / Path(entry["file"]).name, entry["crc32"], self)


class ListedFile:
    """A file that an `index.json` lists with its checksum. It is checked when it is first used."""

    def __init__(self, path: Path, crc32: int, folder: IndexFolder):
        self.path, self.crc32, self.folder = path, crc32, folder

    def error(self, detail: str) -> ValueError:
        return self.folder.error(self.path, detail)

    def check(self) -> None:
        """Raise a [`CorruptIndexError`] if the file does not have the listed checksum."""
        try:
            crc32 = crc32_of_file(self.path)
        except OSError as error:
            raise self.error(str(error)) from error
        if crc32 != self.crc32:
            raise self.error("its checksum differs from the index's")


def crc32_of_file(path: Path) -> int:
    """Checksum of a file, read piece by piece."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value
