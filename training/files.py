"""Writing a file so that a kill at any moment leaves the old one or the new one, whole."""

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, data: bytes):
    """Put `data` where `path` is: written beside it, on the disk, then moved over it. Its mode is the umask's."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is there where writing failed, or was interrupted
            temporary.unlink()
