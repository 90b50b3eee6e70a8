"""Captioned images from a table, a folder or a `datasets` repository."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_fromage.images_fromage import is_url
from modeling_fromage.io.tables import is_table, read_rows

_CAPTION_COLUMNS = ("caption", "text", "captions", "title")


def load_captioned_images(
    source: str, split: str = "train", image_column: str = "image", caption_column: str | None = None
) -> Dataset:
    """Load a dataset with columns `image` and `caption`. Images stay encoded until the collator reads them.

    Args:
        source: A table (see [`read_rows`]) with a column of captions and a column of images (URLs, or paths relative
            to the table); a folder for the `imagefolder` builder of `datasets` (`metadata.csv` with `file_name` and
            `caption`); a folder of Parquet files; or the id of a Hub dataset.
        split: Split of a folder or Hub dataset.
        image_column: Column of images.
        caption_column: Column of captions. Defaults to the first of caption, text, captions and title.

    Raises:
        ValueError: The data cannot be read, a column is missing, a row has no image or caption, or there are no
            examples.
    """
    path = Path(source)
    try:
        if is_table(path):
            return _load_table(path, image_column, caption_column)
        if path.is_dir() and not any(path.rglob("*.parquet")):
            dataset = load_dataset("imagefolder", data_dir=source, split=split)
        else:
            dataset = load_dataset(source, split=split)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError) and str(path) in str(error.__cause__):
            raise error.__cause__ from None
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    caption_column = _find_columns(source, dataset.column_names, image_column, caption_column)
    if not len(dataset):
        raise ValueError(f"{source} has no examples.")
    dataset = dataset.select_columns([image_column, caption_column])
    names = {image_column: "image", caption_column: "caption"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    return dataset.cast_column("image", Image(decode=False))


def _find_columns(source: str, columns: list[str], image_column: str, caption_column: str | None) -> str:
    """The name of the caption column.

    Raises:
        ValueError: The caption or the image column is missing.
    """
    caption_column = caption_column or next((c for c in _CAPTION_COLUMNS if c in columns), None)
    if image_column not in columns or caption_column not in columns:
        raise ValueError(
            f"{source} needs a column {image_column!r} and one of {_CAPTION_COLUMNS}; it has {columns}. "
            "Name them with image_column and caption_column."
        )
    return caption_column


def _load_table(path: Path, image_column: str, caption_column: str | None) -> Dataset:
    headerless = (caption_column or _CAPTION_COLUMNS[0], image_column)
    first = next(read_rows(path, headerless), None)
    if first is None:
        raise ValueError(f"{path} has no examples.")
    caption_column = _find_columns(str(path), list(first[1]), image_column, caption_column)
    found = path.stat()
    arguments = {
        "path": str(path),
        "headerless": headerless,
        "columns": (image_column, caption_column),
        "version": (str(path.absolute()), found.st_mtime_ns, found.st_size),  # part of the cache key of `datasets`
    }
    return Dataset.from_generator(_pairs, gen_kwargs=arguments)


def _pairs(path: str, headerless: tuple[str, str], columns: tuple[str, str], version: Any) -> Iterator[dict[str, Any]]:
    """Rows of the dataset from those of a table."""
    folder, (image_column, caption_column) = Path(path).parent, columns
    for line, row in read_rows(Path(path), headerless):
        image, caption = row.get(image_column), row.get(caption_column)
        if image is None or caption is None:
            missing = image_column if image is None else caption_column
            raise ValueError(f"{path}, line {line} has no {missing!r}. Complete the row, or take it out.")
        if isinstance(image, str) and not is_url(image):
            image = str(folder / image)
        yield {"image": image, "caption": caption}
