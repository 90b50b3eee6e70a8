"""Saving an index into a folder, and publishing it on the Hub."""

import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from .folder import INDEX_FILE, crc32_of_file
from .images import IMAGE_FOLDERS, ImageAccess, Scrubber
from .milvus_store import MilvusStore, header_of
from .reading import read_listing
from .snapshot import Snapshot
from .stores import Store, on_this_machine
from .writer import IndexWriter, one_at_a_time, write_header

_HUB_FILES = [INDEX_FILE, "embeds-*.safetensors", "entries-*.sqlite", "backend-????????.*", f"{IMAGE_FOLDERS}/*.png"]


def save_index(
    directory: str | os.PathLike[str],
    store: Store,
    access: ImageAccess,
    model_fingerprint: str | None,
    progress: dict[str, Any] | None = None,
    scrub: Scrubber | None = None,
) -> None:
    """Write an index as it is now, whatever changes meanwhile; of one that is in Milvus, the header.

    Args:
        progress (`dict`, *optional*): What the build that it comes from would be told when it is called again.
        scrub ([`Scrubber`], *optional*): Removes what is not to be published.

    Raises:
        ValueError: `scrub` is given, and an id is a path of this machine.
    """
    root = access.stored_root if access.image_root is None else str(access.image_root.resolve())
    header = {
        "dim": store.dim,
        "dtype": str(store.dtype).removeprefix("torch."),
        "model": model_fingerprint,
        "image_root": None if scrub else root,
        "may_read_files": access.may_read_files,
    }
    if isinstance(store, MilvusStore):
        with one_at_a_time(directory):
            write_header(Path(directory), {**header, "progress": progress or {}, **header_of(store, Path(directory))})
        return
    now, images, skipped = store.moment()
    with one_at_a_time(directory):
        writer = IndexWriter(directory, header, progress=progress)
        moved: dict[int, Path] = {}
        for embeds, entries in store.pieces(now):
            for number, (position, _, _) in enumerate(entries, writer.count):
                if position in images:
                    moved[position] = writer.keep_image(number, images[position])
            ids = [image_id for _, image_id, _ in entries]
            if scrub is not None:
                scrub.check_ids(ids)
            metadata = [values if scrub is None else scrub(values) for _, _, values in entries]
            writer.add(embeds, ids, metadata)
        left_out = [[row["id"], row["source"], row["reason"]] for row in skipped]
        writer.entries.skip([tuple(row if scrub is None else scrub(row, is_path=True)) for row in left_out])
        store.images_moved(writer.directory, images, moved)
        writer.finish(_saved_backend(writer.directory, now, store.dim))


def _saved_backend(directory: Path, now: Snapshot, dim: int) -> dict[str, Any] | None:
    """Write the backend's file, if it has one; its listing by the backend's name."""
    backend = now.backend
    path = directory / f"backend-{uuid.uuid4().hex[:8]}.{backend.name}"
    if not backend.save(path, now, dim):
        return None
    listed = {"file": path.name, "bytes": path.stat().st_size, "crc32": crc32_of_file(path), "options": backend.options}
    return {backend.name: listed}


def index_folder(
    name_or_path: str | os.PathLike[str],
    repo_type: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The folder of an index: the one that is named or, of a repository of the Hub, the one in the cache.

    Raises:
        FileNotFoundError: There is no such folder, and a repository has no such name.
        ValueError: The repository holds the header of an index in Milvus: its author would choose what this machine
            connects to.
    """
    directory = Path(name_or_path)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or len(directory.parts) > 2:
        raise FileNotFoundError(f"There is no folder {directory}, and it is no repository's name (org/name).")
    folder = snapshot_download(
        str(name_or_path),
        repo_type=repo_type,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        allow_patterns=_HUB_FILES,
    )
    listing = Path(folder) / INDEX_FILE
    if listing.is_file() and "milvus" in (state := read_listing(listing.parent, INDEX_FILE)[0]):
        raise ValueError(
            f"{name_or_path} names a collection of Milvus at {state['milvus']['uri']!r}, and holds no images. Its "
            "owner publishes them with `push_to_hub`."
        )
    return Path(folder)


def push_index(
    repo_id: str,
    store: Store,
    access: ImageAccess,
    model_fingerprint: str | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    repo_type: str,
) -> str:
    """Upload an index without this machine's folders, in one commit, in the place of the one that is there. Of one that
    is in Milvus, the contents are uploaded.

    Raises:
        ValueError: An id is a path of this machine.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_index(folder, on_this_machine(store), access, model_fingerprint, scrub=access.scrubber())
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=_HUB_FILES[1:],
        )
    return commit.commit_url
