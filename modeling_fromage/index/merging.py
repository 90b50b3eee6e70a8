"""One index of several folders of them, such as the shards of a build, which memory need not hold."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .folder import INDEX_FILE
from .images import ImageAccess
from .reading import IndexParts, open_index, read_listing
from .stores import on_this_machine, with_root
from .writer import IndexWriter, one_at_a_time


def merge_folders(
    folders: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    progress: dict[str, Any] | None = None,
) -> None:
    """Write one index of all images of those in `folders`, in order, a shard at a time. Of images of one id the first
    is kept, and the others are listed in `skipped`.

    Args:
        progress (`dict`, *optional*): What the build that they come from would be told when it is called again.

    Raises:
        ValueError: They are of different models, widths or dtypes, have no images, or lack some shards of a build.
        FileNotFoundError: One of them is not finished.
    """
    parts = [open_index(Path(folder)) for folder in folders]
    if not parts:
        raise ValueError("Merging needs at least one index.")
    if Path(directory).resolve() in [Path(folder).resolve() for folder in folders]:
        raise ValueError(f"{directory} is one of the indexes that are merged. Write into another folder.")
    _check_all_there(folders)
    kinds = {(part.store.dim, part.store.dtype, part.model_fingerprint) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"Only indexes of one model and kind can be merged; got (width, dtype, model): {kinds}.")
    dim, dtype, model = kinds.pop()
    root = ImageAccess.shared([part.access for part in parts]).root
    header = {"dim": dim, "dtype": str(dtype).removeprefix("torch."), "model": model, "image_root": root,
              "may_read_files": False}  # fmt: skip
    with one_at_a_time(directory):
        writer = IndexWriter(directory, header, progress=progress)
        for part in parts:
            _append(writer, part, root)
        if not writer.count:
            left_out = sum(writer.reasons().values())
            writer.discard()
            raise ValueError(f"An index needs at least one image; {len(parts)} without any left out {left_out:,}.")
        writer.finish()


def _check_all_there(folders: Sequence[str | os.PathLike[str]]) -> None:
    """Raise a `ValueError` if some shards of a build are missing."""
    shards = [str(read_listing(Path(folder), INDEX_FILE)[0].get("shard")) for folder in folders]
    for count in {found[1] for shard in shards if (found := re.fullmatch(r"\d+/(\d{1,6})", shard))}:
        missing = [shard for shard in (f"{i}/{count}" for i in range(int(count))) if shard not in shards]
        if missing:
            raise ValueError(
                f"{len(missing)} shards are missing: {', '.join(missing[:5])}. Build them with --shard, or join those "
                "that are there by `FromageImageIndex.merge`."
            )


def _append(writer: IndexWriter, part: IndexParts, root: str | None) -> None:
    store = on_this_machine(part.store)
    now, images, skipped = store.moment()
    own_root = None if part.access.root == root else part.access.root
    repeated = []
    for rows, entries in store.pieces(now):
        taken = writer.entries.positions([image_id for _, image_id, _ in entries])
        new = [number for number, (_, image_id, _) in enumerate(entries) if image_id not in taken]
        repeated += [(image_id, values.get("path") or values.get("url") or "in memory", "id occurs twice")
                     for _, image_id, values in entries if image_id in taken]  # fmt: skip
        for number, (position, _, _) in enumerate((entries[place] for place in new), writer.count):
            if position in images:
                writer.keep_image(number, images[position])
        metadata = [with_root(entries[place][2], own_root) for place in new]
        writer.add(rows[new], [entries[place][1] for place in new], metadata)
    writer.entries.skip([*((row["id"], row["source"], row["reason"]) for row in skipped), *repeated])


def is_index_of(directory: str | os.PathLike[str], digest: str, model: str, dtype: str) -> bool:
    """Whether `directory` holds a finished index of the images of this digest, by this model and in this dtype.

    Raises:
        ValueError: It holds another index.
    """
    if not (Path(directory) / INDEX_FILE).is_file():
        return False
    state, _ = read_listing(Path(directory), INDEX_FILE)
    if digest in (state["progress"].get("digest"), state.get("shards_digest")) and (
        (state["model"], state["dtype"]) == (model, dtype)
    ):
        return True
    raise ValueError(f"{directory} holds an index of other images, or by another model. Remove it, or build elsewhere.")
