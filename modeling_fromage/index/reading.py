"""Opening an index folder that anyone may have written: its listing is checked, its other files are not read yet."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backends import BACKENDS, FlatBackend, SearchBackend, make_backend
from .folder import INDEX_FILE, CorruptIndexError, IndexFolder, ReplacedIndexError
from .images import ImageAccess, KeptImage, kept_images, own_folders
from .metadata_store import MetadataStore
from .milvus_store import MilvusStore, open_store
from .shards import Shard
from .snapshot import Snapshot
from .store import IndexStore
from .stores import Store

UNFINISHED_FILE = "building.json"
FORMAT = 1
MILVUS_FORMAT = 2  # a header of what is in Milvus, which earlier versions refuse by this number
_LARGEST_LISTING = 1 << 26  # bytes; 100 million images take 250 kB


class IndexParts(NamedTuple):
    """What an index is made of."""

    store: Store
    access: ImageAccess
    model_fingerprint: str | None


def open_index(
    directory: Path, image_root: str | os.PathLike[str] | None = None, milvus_token: str | None = None
) -> IndexParts:
    """Open a finished index. Only `index.json` is read; all other files are there and have the right size.

    Raises:
        FileNotFoundError: There is no finished index.
        CorruptIndexError: A file is missing, or shorter or longer than it was.
        MilvusIndexError: The collection that it names is not there, or cannot be reached.
    """
    if not (directory / INDEX_FILE).is_file():
        if (directory / UNFINISHED_FILE).is_file():
            raise FileNotFoundError(
                f"{directory} holds an unfinished index. Call `build` with this `save_directory` again: it resumes."
            )
        raise FileNotFoundError(f"{directory} holds no image index: it has no {INDEX_FILE}.")
    while True:
        state, folder = read_listing(directory, INDEX_FILE)
        with contextlib.suppress(ReplacedIndexError):  # another save has just finished; its index is as good
            store = _milvus_store(state, directory, milvus_token) if "milvus" in state else _listed_store(state, folder)
            break
    root = None if image_root is None else Path(image_root)
    access = ImageAccess(root, folder=directory, stored_root=state["image_root"], may_read_files=False)
    return IndexParts(store, access, state["model"])


def _milvus_store(state: dict[str, Any], directory: Path, token: str | None) -> MilvusStore:
    if token is None and os.environ.get("MILVUS_URI") == state["milvus"]["uri"]:
        token = os.environ.get("MILVUS_TOKEN")
    try:
        return open_store(directory, state, token)
    except ValueError as error:
        raise CorruptIndexError(directory / INDEX_FILE, str(error)) from error


def _listed_store(state: dict[str, Any], folder: IndexFolder) -> IndexStore:
    """Embeddings, ids, metadata, backend and kept images of an index; each file is there and has its size."""
    shards = tuple(listed_shard(folder, state, entry) for entry in state["shards"])
    for entry in (*state["shards"], state["entries"], *_listed_backends(state).values()):
        _check_size(folder, entry)
    count = state["count"]
    snapshot = Snapshot(shards, count, backend=_saved_backend(state, folder))
    entries = MetadataStore(folder.file(state["entries"]), count)
    images: dict[int, KeptImage] = {
        position: path for position, path in kept_images(folder.path, state).items() if position < count
    }
    return IndexStore(state["dim"], getattr(torch, state["dtype"]), snapshot, entries, images)


def _listed_backends(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The listing of a saved backend's file by the backend's name, if there is one."""
    return {name: state[name] for name in BACKENDS if state.get(name)}


def _saved_backend(state: dict[str, Any], folder: IndexFolder) -> SearchBackend:
    for name, listed in _listed_backends(state).items():
        try:
            backend = make_backend(name, listed["options"])
        except (ValueError, TypeError) as error:
            raise CorruptIndexError(folder.path / INDEX_FILE, str(error)) from error
        backend.load(folder.file(listed), state["count"], state["dim"])
        return backend
    return FlatBackend()


def read_listing(directory: Path, name: str) -> tuple[dict[str, Any], IndexFolder]:
    """Read `index.json` or `building.json`, and remember the folder as it is now.

    Raises:
        CorruptIndexError: The file is not what this version writes.
        ValueError: It has another format.
    """
    path = directory / name
    try:
        if path.stat().st_size > _LARGEST_LISTING:
            raise CorruptIndexError(path, f"it has more than {_LARGEST_LISTING:,} bytes")
        data = path.read_bytes()
        state = json.loads(data.decode("utf-8"))
        if state["format"] == FORMAT:
            _check_listing(state, finished=name == INDEX_FILE)
            return state, IndexFolder(directory, data)
        if state["format"] == MILVUS_FORMAT:
            _check_header(state)
            return state, IndexFolder(directory, data)
    except CorruptIndexError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptIndexError(path, f"{type(error).__name__}: {error}") from error
    known = f"{FORMAT} and {MILVUS_FORMAT}"
    raise ValueError(f"{path} is of format {state['format']}, this version reads {known}. Upgrade modeling-fromage.")


def _check_listing(state: dict[str, Any], finished: bool) -> None:
    """Raise any of the errors that a wrong type gives if a listing is not as this version writes it."""
    listed = [*state["shards"], *([state["entries"]] if finished else [])]
    _check_common(state)
    _check_kinds(state, {"count": int, **({"images": str} if "images" in state else {})})
    for backend in _listed_backends(state).values():
        _check_kinds(backend, {"options": dict})
        listed.append(backend)
    for entry in listed:
        _check_kinds(entry, {"file": str, "bytes": int, "crc32": int})
    _check_kinds(state["entries"], {"file": str})
    row_bytes = state["dim"] * getattr(torch, state["dtype"]).itemsize
    for entry in state["shards"]:
        _check_kinds(entry, {"count": int})
        if not 1 <= entry["count"] <= entry["bytes"] // row_bytes:
            raise ValueError(f"{entry['count']} embeddings in the {entry['bytes']} bytes of {entry['file']}")
    if sum(entry["count"] for entry in state["shards"]) != state["count"]:
        raise ValueError("its shards do not add up to its count")


def _check_header(state: dict[str, Any]) -> None:
    """The same for what [`header_of`] writes."""
    _check_common(state)
    _check_kinds(state, {"milvus": dict, "skipped": list})
    _check_kinds(state["milvus"], {"uri": str, "collection": str, "index_type": str, "index_params": dict,
                                   "search_params": dict})  # fmt: skip
    for row in state["skipped"]:
        _check_kinds(row, {"id": str, "source": str, "reason": str})


def _check_common(state: dict[str, Any]) -> None:
    kinds = {
        "dim": int, "dtype": str, "model": (str, type(None)), "image_root": (str, type(None)), "may_read_files": bool,
        "progress": dict,
    }  # fmt: skip
    _check_kinds(state, kinds)
    _check_kinds({"consumed": 0, "digest": "", "skipped": 0, **state["progress"]},
                 {"consumed": int, "digest": str, "skipped": int})  # fmt: skip
    if state["dim"] < 1 or state["dtype"] not in ("float32", "float16"):
        raise ValueError(f"embeddings of width {state['dim']!r} and dtype {state['dtype']!r}")


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or (isinstance(values[name], bool) and kind is not bool):
            raise TypeError(f"{name} is {str(values[name])[:100]!r}")


def _check_size(folder: IndexFolder, entry: dict[str, Any]) -> None:
    file = folder.file(entry)
    try:
        size = file.path.stat().st_size if file.path.is_file() else None
        leads_out = file.path.is_symlink() and not any(
            file.path.resolve().is_relative_to(own) for own in own_folders(folder.path)
        )
    except (OSError, RuntimeError, ValueError) as error:  # a name that is none, a loop of links
        raise file.error(str(error)) from error
    if leads_out:
        raise file.error("it is a link that leads out of the index's folder")
    if size != entry["bytes"]:
        raise file.error(f"it should have {entry['bytes']:,} bytes, and has {size}")


def listed_shard(folder: IndexFolder, state: dict[str, Any], entry: dict[str, Any]) -> Shard:
    dtype = getattr(torch, state["dtype"])
    return Shard(entry["count"], file=folder.file(entry), dim=state["dim"], dtype=dtype)
