"""The authors' `cc3m_embeddings*.pkl`, read without running what a pickle can run."""

import io
import pickle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from modeling_fromage.images_fromage import is_url

# What arrays and tensors are pickled as. Nothing else is looked up, so nothing else can be called.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy.core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    ("collections", "OrderedDict"): dict,  # the tensors' hooks: none
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
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)  # torch's own would run a pickle within the pickle


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"an array's bytes are in {encoding}")
    return text.encode("latin1")


def read_original_embeddings(path: str | Path) -> tuple[list[str], torch.Tensor]:
    """Paths or URLs, and embeddings (N, q) in fp32, of one file of the authors' (an array, or a list of vectors).

    Raises:
        ValueError: The file would run code, is no such pickle, or its entries do not fit together, or a path leads out
            of the folder that paths start from. Nothing was run.
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
        raise ValueError(f"{path} has paths that are no list of texts.")
    if len(paths) != len(embeds):
        raise ValueError(f"{path} has {len(paths)} paths and {len(embeds)} embeddings; expected as many.")
    if escaping := [name for name in paths if not is_url(name) and _escapes(name)]:
        raise ValueError(f"{path} is refused: it names files outside its folder, such as {escaping[0]!r}.")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{path} has embeddings with NaN or infinite values.")
    return paths, embeds


def _escapes(name: str) -> bool:
    """Whether a relative path is none, or leads out of where it starts; by the rules of every system."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in kinds)
