"""An index as a `datasets.Dataset`, and back: to look at it on the Hub, to filter it, to join it with other data.

Axes: N images, q the width of the shared image-text space.
"""

import io
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.utils import is_datasets_available

from ..images_fromage import UnreadableImageError
from .images import KeptImage, Scrubber, write_png
from .store import IndexStore
from .values import as_embeds, as_entries, as_json, is_utf8

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
_OWN_COLUMNS = ("id", "embedding", "image", "metadata")
_ROWS_AT_A_TIME = 1000
LoadImage = Callable[[str, dict[str, Any], KeptImage | None], Image.Image]  # as `ImageAccess.load`


def store_to_dataset(store: IndexStore, load_image: LoadImage | None, scrub: Scrubber) -> "datasets.Dataset":
    """See [`FromageImageIndex.to_dataset`]; without `load_image` there is no column of images."""
    import_datasets()
    import datasets
    import pyarrow as pa

    now, images, _ = store.moment()
    rows = torch.cat([torch.empty(0, store.dim, dtype=store.dtype), *now.kept_rows()])
    entries = [entry for several in store.kept_entries(now) for entry in several]
    ids = [image_id for _, image_id, _ in entries]
    scrub.check_ids(ids)
    metadata = [scrub(values) for _, _, values in entries]
    kind = str(store.dtype).removeprefix("torch.")
    features: dict[str, Any] = {
        "id": datasets.Value("string"), "embedding": datasets.List(datasets.Value(kind), length=store.dim)
    }  # fmt: skip
    table: dict[str, Any] = {
        "id": pa.array(ids, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().reshape(-1)), store.dim),
    }
    kinds = {name: _column_kind(name, metadata) for name in sorted({name for values in metadata for name in values})}
    for name, column in kinds.items():
        if column is not None:
            features[name] = datasets.Value(column)
            table[name] = pa.array([values.get(name) for values in metadata], column)
    rest = [{name: value for name, value in values.items() if kinds[name] is None} for values in metadata]
    if any(rest):
        features["metadata"] = datasets.Value("string")
        table["metadata"] = pa.array([as_json(values, "metadata") if values else None for values in rest], pa.string())
    if load_image is not None:
        features["image"] = datasets.Image()
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pictures = [_png(load_image, image_id, values, images.get(position)) for position, image_id, values in entries]
        table["image"] = pa.array([None if png is None else {"bytes": png, "path": None} for png in pictures], struct)
        if missing := pictures.count(None):
            logger.warning("%d of %d images are not in the dataset: they cannot be read.", missing, len(ids))
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(pa.table({name: table[name] for name in features}), info=info)


def _column_kind(name: str, metadata: list[dict[str, Any]]) -> str | None:
    """The type of the column that holds the values of `name` without loss; `None` if none does: values of several
    types, lists, dicts, and `None`, which would be the same as no value."""
    if name in _OWN_COLUMNS or not is_utf8(name):
        return None
    values = [values[name] for values in metadata if name in values]
    types = {type(value) for value in values}
    if types == {int}:
        return "int64" if all(-(1 << 63) <= value < 1 << 63 for value in values) else None
    if types == {str} and not all(map(is_utf8, values)):
        return None
    columns = {str: "string", bool: "bool", float: "float64"}
    return columns.get(next(iter(types))) if len(types) == 1 else None


def _png(load_image: LoadImage, image_id: str, metadata: dict[str, Any], kept: KeptImage | None) -> bytes | None:
    try:
        write_png(load_image(image_id, metadata, kept), buffer := io.BytesIO())
    except UnreadableImageError as error:
        logger.info("%s", error)
        return None
    return buffer.getvalue()


def store_from_dataset(
    dataset: "datasets.Dataset", dtype: torch.dtype | None, embedding_column: str, id_column: str, image_column: str
) -> IndexStore:
    """See [`FromageImageIndex.from_dataset`]."""
    import_datasets()
    import datasets

    dataset = dataset.with_format(None)  # plain values, of all columns
    for name in (embedding_column, id_column):
        if name not in dataset.column_names:
            raise ValueError(f"The dataset has no column {name!r}; it has {dataset.column_names}.")
    if image_column in dataset.column_names and isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if dtype is None:
        items = getattr(dataset.features[embedding_column], "feature", None)
        dtype = torch.float16 if getattr(items, "dtype", None) == "float16" else torch.float32
    store: IndexStore | None = None
    others = [name for name in dataset.column_names if name not in (embedding_column, id_column, image_column)]
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        piece = dataset.select(range(start, min(start + _ROWS_AT_A_TIME, len(dataset))))
        embeds = _unit_rows(as_embeds(_matrix(piece, embedding_column)))
        store = store or IndexStore(embeds.shape[1], dtype)
        columns = {name: piece[name][:] for name in others}
        metadata = [_row_metadata({name: values[row] for name, values in columns.items()}) for row in range(len(piece))]
        pictures = piece[image_column][:] if image_column in piece.column_names else [None] * len(piece)
        images: dict[int, KeptImage] = {
            number: picture["bytes"] for number, picture in enumerate(pictures) if picture and picture.get("bytes")
        }
        store.insert([(embeds.to(dtype), as_entries(piece[id_column][:], metadata))], images)
    if store is None:
        raise ValueError("The dataset is empty, so the width of its embeddings is not known.")
    return store


def _matrix(dataset: "datasets.Dataset", name: str) -> np.ndarray:
    """The column of embeddings (N, q), straight from Arrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = dataset.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
    is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
    widths = set(pc.list_value_length(column).to_pylist()) if is_list else set()
    if len(widths) != 1 or None in widths:
        raise ValueError(f"The column {name!r} holds lists of numbers of one length, got {column.type}: {widths}.")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _row_metadata(values: dict[str, Any]) -> dict[str, Any]:
    """The metadata of one row: its columns that have a value, and what `store_to_dataset` wrote as JSON."""
    text = values.pop("metadata", None)
    metadata = {name: value for name, value in values.items() if value is not None}
    if isinstance(text, dict):
        return {**metadata, **text}
    try:
        rest = {} if text is None else json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"The dataset's column 'metadata' holds JSON objects, got {str(text)[:100]!r}.") from error
    if not isinstance(rest, dict):
        raise ValueError(f"The dataset's column 'metadata' holds JSON objects, got {str(text)[:100]!r}.")
    return {**metadata, **rest}


def _unit_rows(embeds: torch.Tensor) -> torch.Tensor:
    """`embeds` of unit norm. Those that have it, up to the rounding of fp16, stay as they are, bit for bit."""
    norms = torch.linalg.vector_norm(embeds, dim=-1, keepdim=True)
    return torch.where((norms - 1).abs() < 1e-3, embeds, F.normalize(embeds, dim=-1))


def import_datasets() -> None:
    """Raise an `ImportError` that says what to install if `datasets` is missing."""
    if not is_datasets_available():
        raise ImportError("Datasets need the `datasets` library: pip install 'modeling-fromage[train]'.")
