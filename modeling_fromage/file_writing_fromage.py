"""Write files so that an interruption leaves the old file or the new one, never a part of either."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; what was written there then replaces `path`.

    The file gets the permissions that the user's umask gives a new file, whichever the writer set. After an error
    `path` is as it was.

    Example:

        with replacing(Path("results.json")) as temporary:
            temporary.write_text("{}")
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to the disk and let it replace `path`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move_into_place(staging: Path, directory: Path, last: str) -> None:
    """Move the files of `staging` over those of `directory`, the one named `last` at the end: it makes the rest count.

    Their permissions become those of the user's umask; safetensors, for one, writes files that only their owner reads.
    """
    for path in sorted(staging.iterdir(), key=lambda path: path.name == last):
        with replacing(directory / path.name) as temporary:
            os.replace(path, temporary)


__all__ = ["move_into_place", "replace_file", "replacing"]
