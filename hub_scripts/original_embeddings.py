"""Read the authors' `cc3m_embeddings*.pkl` without running the code that a pickle can hold."""

import io
import pickle
from importlib import import_module
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from modeling_fromage.images_fromage import is_url

_multiarray, _numeric = import_module("numpy._core.multiarray"), import_module("numpy._core.numeric")
# What pickled arrays and tensors refer to. Nothing else is looked up, so nothing else can be called.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _multiarray._reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _numeric._frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _numeric._frombuffer,
    ("collections", "OrderedDict"): dict,  # a tensor's hooks, which it has none of
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array does not need")


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)  # torch would run the pickle inside the pickle


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"an array's bytes are in {encoding}, not latin1")
    return text.encode("latin1")


def read_original_embeddings(path: str | Path) -> tuple[list[str], torch.Tensor]:
    """Read one file of the authors, whose embeddings are an array or a list of vectors.

    Returns:
        `tuple[list[str], torch.Tensor]`: Paths or URLs, and the `torch.float32` embeddings of shape
        `(num_images, projection_dim)`.

    Raises:
        ValueError: The file would run code, is not such a pickle, has entries that do not fit together, or names a path
            outside its folder. Nothing was run.
    """
    try:
        with Path(path).open("rb") as file:
            content = _ArraysOnly(file).load()
        paths, embeddings = content["paths"], content["embeddings"]
        rows = [torch.as_tensor(row).float().flatten() for row in embeddings]
        embeds = torch.stack(rows) if rows else torch.empty(0, 0)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
            RuntimeError) as error:  # fmt: skip
        raise ValueError(f"{path} is refused: {type(error).__name__}: {error}. Nothing of it was run.") from error
    if not (isinstance(paths, list) and all(isinstance(name, str) for name in paths)):
        raise ValueError(f"{path} has paths that are not a list of strings.")
    if len(paths) != len(embeds):
        raise ValueError(f"{path} has {len(paths)} paths and {len(embeds)} embeddings; expected one each.")
    if escaping := [name for name in paths if not is_url(name) and _escapes(name)]:
        raise ValueError(f"{path} is refused: it names files outside its folder, such as {escaping[0]!r}.")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{path} has embeddings with NaN or infinite values.")
    return paths, embeds


def _escapes(name: str) -> bool:
    """Whether a path leads out of the folder it should be relative to, on any operating system."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in kinds)
