"""Captioned images from a TSV, a folder or a `datasets` repository."""

import csv
from pathlib import Path

from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_fromage.images_fromage import is_url

_CAPTION_COLUMNS = ("caption", "text", "captions", "title")


def load_captioned_images(
    source: str, split: str = "train", image_column: str = "image", caption_column: str | None = None
) -> Dataset:
    """Load a dataset of `{"image", "caption"}`; images stay undecoded until the collator reads them.

    Args:
        source: A `.tsv` or `.csv` file with a header and columns `caption` and `image` (URLs, or paths relative to the
            file); a `.tsv` file of captions and URLs without a header, as Conceptual Captions is published; a folder
            that the `imagefolder` builder of `datasets` reads (`metadata.csv` with `file_name` and `caption`), or one
            of Parquet files; or the id of a `datasets` repository.
        split: Split of a folder or repository.
        caption_column: Found among caption, text, captions and title where absent.

    Raises:
        ValueError: The table cannot be read, a column is missing, or there is no example.
    """
    path = Path(source)
    is_table = path.suffix in (".tsv", ".csv")
    if is_table and not path.is_file():
        raise ValueError(f"There is no file {source}.")
    if is_table:
        # A quote in a TSV is a quote, as in the image index's tables: captions have single ones.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        if path.suffix == ".tsv" and _has_no_header(path):
            options["column_names"] = ["caption", image_column]
        options |= {"path": "csv", "data_files": str(path), "keep_default_na": False}
    elif path.is_dir() and not any(path.rglob("*.parquet")):
        options = {"path": "imagefolder", "data_dir": source}
    else:
        options = {"path": source}
    try:
        dataset = load_dataset(**options, split="train" if is_table else split)
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    caption_column = caption_column or next((c for c in _CAPTION_COLUMNS if c in dataset.column_names), None)
    if image_column not in dataset.column_names or caption_column not in dataset.column_names:
        raise ValueError(
            f"{source} needs a column {image_column!r} and one of {_CAPTION_COLUMNS}; it has {dataset.column_names}. "
            "Name them with image_column and caption_column."
        )
    if not len(dataset):
        raise ValueError(f"{source} has no examples.")
    dataset = dataset.select_columns([image_column, caption_column])
    names = {image_column: "image", caption_column: "caption"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    if is_table:
        return dataset.map(lambda row: {"image": _absolute(row["image"], path.parent)}, desc="Resolving image paths")
    return dataset.cast_column("image", Image(decode=False))


def _has_no_header(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        fields = file.readline().rstrip("\r\n").split("\t")
    return len(fields) == 2 and is_url(fields[1])


def _absolute(image: str, folder: Path) -> str:
    return image if is_url(image) else str(folder / image)
