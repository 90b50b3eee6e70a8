"""Shards of images, tar files (webdataset) and Parquet files, as rows to build an index from: here or in a store."""

import glob
import hashlib
import json
import os
import posixpath
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from ..images_fromage import UnreadableImageError, is_url, printable
from ..io.columns import IMAGE_COLUMNS as OTHER_IMAGE_COLUMNS
from ..io.columns import as_image, find_column
from ..io.file_patterns import expand_braces, find_files
from ..io.shard_files import close_files
from ..io.tar_shards import DamagedTarError, TarShard, image_of

IMAGE_COLUMNS = ("image", "url", "path", "file_name")  # of tables and rows, in this order
SHARD_SUFFIXES = (".tar", ".parquet")
_ROWS_AT_A_TIME = 256  # of a Parquet file
_DAMAGED = "damaged shard"
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")  # of stores


@dataclass(frozen=True)
class ShardFile:
    """A shard: its path, here or in `store`; what tells whether it has changed; its name among the others."""

    path: str
    stamp: str
    store: AbstractFileSystem | None = None
    name: str = ""


class ImageShards:
    """The rows of several shards, one after the other. Those of a store are fetched whole, one ahead of the one that is
    read, into a temporary folder.

    Args:
        files (`Sequence[ShardFile]`): See [`find_shards`].
        shard (`tuple`, *optional*): (i, n) takes every n-th file from the i-th on where there are n files or more, and
            otherwise every n-th row.
    """

    def __init__(self, files: Sequence[ShardFile], shard: tuple[int, int] | None = None):
        first, step = shard or (0, 1)
        by_file = len(files) >= step
        self.files = list(files)[first::step] if by_file else list(files)
        self._rows = (0, None, 1) if by_file else (first, None, step)

    def digest(self) -> str:
        """What tells these rows from others, without reading them."""
        told = [self._rows, *((file.name, file.stamp) for file in self.files)]
        return hashlib.sha256(repr(told).encode(errors="surrogatepass")).hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self._all_rows(), *self._rows)

    def _all_rows(self) -> Iterator[dict[str, Any]]:
        for file, path in _local_copies(self.files):
            if path.suffix.lower() == ".tar":
                yield from tar_rows(path, file.name)
            else:
                for number, row in enumerate(parquet_rows(path, file.name, file.store is None)):
                    place = {"shard": file.name, "member": number, "id": f"{file.name}/{number}"}
                    yield place | {name: value for name, value in row.items() if name != "id" or value is not None}


# ---- which files --------------------------------------------------------------------------------------------------


def find_shards(images: Any) -> tuple[list[ShardFile], str | None]:
    """The shards that `images` name, none where these are something else, and the folder that those of this machine
    have in common.

    Args:
        images: A path, a pattern (`{000..099}.tar`, `*.parquet`), a folder, or such an address of a store that fsspec
            knows (`s3://...`); or a list of these.

    Raises:
        ValueError: There are none at an address or a pattern, or they are in several places.
        ImportError: fsspec needs another package for this store.
    """
    if isinstance(images, (str, os.PathLike)):
        given = [os.fspath(images)]
    elif isinstance(images, (list, tuple)) and images and all(map(_may_be_shards, images)):
        given = [os.fspath(each) for each in images]
    else:
        return [], None
    found = [file for each in given for file in (_in_store(each) if "://" in each else _here(each))]
    if not found:
        return [], None
    stores = {type(file.store) for file in found}
    if len(stores) > 1:
        raise ValueError(f"Shards must all be in files of this machine, or in one store; got {given[:3]}.")
    folder = posixpath.commonpath([posixpath.dirname(file.path) for file in found])
    named = [replace(file, name=posixpath.relpath(file.path, folder or ".")) for file in found]
    return named, folder if found[0].store is None else None


def _may_be_shards(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.fspath(value).lower().endswith(SHARD_SUFFIXES)


def _here(name: str) -> Iterator[ShardFile]:
    files = find_files(name)
    if len(files) == 1 and files[0].is_dir():
        files = sorted(file for file in files[0].rglob("*") if file.is_file() and _may_be_shards(file))
    elif strange := [file for file in files if not _may_be_shards(file)]:
        if len(files) > 1:
            raise ValueError(f"{name} names {strange[0]}, which is no shard ({', '.join(SHARD_SUFFIXES)}).")
        return
    for file in files:
        found = file.stat()
        yield ShardFile(file.absolute().as_posix(), f"{found.st_size} {found.st_mtime_ns}")


def _in_store(address: str) -> Iterator[ShardFile]:
    for alternative in expand_braces(address):
        store, path = url_to_fs(alternative)
        if glob.has_magic(path):
            found = store.glob(path, detail=True)
        elif path.lower().endswith(SHARD_SUFFIXES):
            found = {path: store.info(path)} if store.exists(path) else {}
        else:
            found = store.find(path, detail=True)
        names = sorted(filter(_may_be_shards, found))
        if not names:
            raise ValueError(f"There is no shard ({', '.join(SHARD_SUFFIXES)}) at {alternative}. Check the address.")
        for name in names:
            info = found[name]
            stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
            yield ShardFile(name, f"{info.get('size')} {stamp}", store)


def _local_copies(files: Iterable[ShardFile]) -> Iterator[tuple[ShardFile, Path]]:
    """Each file with its path here, until the next one is asked for."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        coming: deque[tuple[ShardFile, Path, Future[Any] | None]] = deque()

        def next_one() -> Iterator[tuple[ShardFile, Path]]:
            file, path, fetched = coming.popleft()
            if fetched is not None:
                fetched.result()
            yield file, path
            if fetched is not None:
                close_files()
                path.unlink()

        for number, file in enumerate(files):
            if file.store is None:
                coming.append((file, Path(file.path), None))
            else:
                path = Path(folder, f"{number}{Path(file.path).suffix}")
                coming.append((file, path, pool.submit(file.store.get_file, file.path, str(path))))
            if len(coming) > 1:
                yield from next_one()
        while coming:
            yield from next_one()


# ---- their rows ---------------------------------------------------------------------------------------------------


def tar_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Images of a tar file with what the JSON and the text beside them say; the text is the "caption".

    The id is the JSON's, or else `name/member`. In the place of an image that cannot be read stands the error. A "path"
    in the JSON is left out: it would be taken for that of a file here.
    """
    shard = TarShard(path)
    for number in range(len(shard)):
        place = f"{name}/{number}"
        try:
            members = shard.members(number)
        except DamagedTarError as error:
            yield {"image": UnreadableImageError(name, _DAMAGED, str(error)), "id": place}
            continue
        member = printable(next(iter(members.values()))[0])
        place = f"{name}/{member}"
        row: dict[str, Any] = {"shard": name, "member": member, "id": place}
        try:
            told = _told_beside(members)
        except (ValueError, RecursionError) as error:
            yield row | {"image": UnreadableImageError(place, "broken metadata", str(error))}
            continue
        image, nothing = image_of(members), UnreadableImageError(place, "no image", f"only {', '.join(members)}")
        row |= {key: value for key, value in told.items() if key != "path" and (key != "id" or value is not None)}
        yield row | {"image": image | {"path": place} if image else nothing}


def _told_beside(members: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
    texts = {slot: data.decode("utf-8-sig") for slot, (_, data) in members.items() if slot != "image"}
    told = {"caption": texts["txt"].strip()} if "txt" in texts else {}
    if "json" not in texts:
        return told
    found = json.loads(texts["json"])
    return told | (found if isinstance(found, dict) else {"caption": found})


def count_rows(path: Path) -> int:
    """The rows of a Parquet file. Raises a `ValueError` if it is none."""
    exceptions, parquet, _ = _pyarrow()
    try:
        return parquet.read_metadata(path).num_rows
    except exceptions as error:
        raise ValueError(f"{path} is not a Parquet file, or is damaged: {error}.") from error


def parquet_rows(path: Path, name: str, may_read_files: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, as [`image_sources`] takes them: of their columns the one of images, and those of
    numbers and texts. In the place of each image that cannot be read stands the error; one stands for a whole file
    that has lost its footer.

    Raises:
        ValueError: There is no column of images.
        ImportError: pyarrow is not installed.
    """
    exceptions, parquet, types = _pyarrow()
    try:
        file = parquet.ParquetFile(path)
    except exceptions as error:
        yield {"image": UnreadableImageError(name, _DAMAGED, str(error))}
        return
    with file:
        schema = file.schema_arrow
        column = find_column(schema.names, None, (*IMAGE_COLUMNS, *OTHER_IMAGE_COLUMNS))
        if column is None:
            raise ValueError(f"{name} needs one of the columns {IMAGE_COLUMNS}; it has {schema.names}.")
        wanted = [field.name for field in schema if field.name == column or _is_plain(field.type, types)]
        number = 0
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], wanted, use_threads=False):
                    for row in batch.to_pylist():
                        image = _image_in(row, row.pop(column), path.parent if may_read_files else None, name)
                        yield row | {column if column in IMAGE_COLUMNS else "image": image}
                        number += 1
            except exceptions as error:  # other groups are read all the same
                problem = UnreadableImageError(name, _DAMAGED, f"from row {number} on: {error}")
                yield from repeat({"image": problem}, end - number)
                number = end


def _image_in(row: dict[str, Any], value: Any, folder: Path | None, shard: str) -> Any:
    """The image of a row: its `value`, or else what other columns say. Files are read where there is a `folder`."""
    image = as_image(value, folder or Path()) or ""  # like a missing file's, not for all to fail
    if folder is not None:
        return image
    image = image or next((row[name] for name in IMAGE_COLUMNS if is_url(row.get(name))), "")
    in_reach = image.get("bytes") if isinstance(image, dict) else is_url(image)
    return image if in_reach else UnreadableImageError(shard, "not in the shard", "files beside it are not read")


def _pyarrow() -> tuple[tuple[type[Exception], ...], Any, Any]:
    """What reading may raise, and the modules."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise ImportError("Parquet files need pip install 'modeling-fromage[train]'.") from error
    return (ArrowException, OSError, UnicodeDecodeError), parquet, types  # OSError also of a damaged footer


def _is_plain(kind: Any, types: Any) -> bool:
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(is_kind(kind) for is_kind in (*tests, types.is_dictionary))


__all__ = ["IMAGE_COLUMNS", "SHARD_SUFFIXES", "ImageShards", "ShardFile", "count_rows", "find_shards", "parquet_rows"]
