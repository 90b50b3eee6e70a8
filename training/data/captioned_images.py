"""Captioned images from whatever one line names: tables, shards, folders, saved datasets, the Hub."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from modeling_fromage.io.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    NEGATIVES,
    as_image,
    bad_row,
    document_columns,
    find_columns,
    image_suffixes,
    negatives_of,
)
from modeling_fromage.io.file_patterns import find_files
from modeling_fromage.io.tables import is_table, read_rows
from modeling_fromage.trainer.documents import document_in

from .examples import Examples
from .sharded_examples import SHARD_SUFFIXES, SHUFFLE_WINDOW, ShardedExamples
from .sources import files_of_split, paths_of_split

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load_captioned_images(
    source: str,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    *,
    keep_problems: bool = False,
    index_dir: str | Path | None = None,
    shuffle_window: int = SHUFFLE_WINDOW,
) -> Dataset | Examples:
    """Load a dataset with columns `image` and `caption`, or of documents: see [`document_of`]. Images stay encoded
    until the collator reads them.

    Args:
        source: One of

            - tables (TSV, CSV, JSON lines, Parquet) with a column of captions and one of images: URLs, bytes, Image
              features, or paths relative to the table. Several by a pattern: `cc3m/*.tsv`, `part-{000..099}.parquet`.
              A TSV file of captions and URLs needs no header;
            - webdataset's tar shards, `shards/{00000..00331}.tar`: images with a `.txt`, or a `.json` that has the
              caption, of the same name;
            - a folder: of images with a `metadata.csv` (`file_name` and `caption`), or with `NAME.txt` beside
              `NAME.jpg`; of Parquet files; of tar shards; or one that `save_to_disk` wrote;
            - the id of a Hub dataset.
        split: Split of a folder, of a saved `DatasetDict`, or of a Hub dataset.
        image_column: Column of images (of tar shards, their suffix). Found by its name by default.
        caption_column: Column of captions, each a text or a list of texts (of tar shards, a key of the `.json`). Found
            by its name by default.
        streaming: Read tables, Parquet files and tar shards in place, where they would be copied into the cache of
            `datasets`. Tar shards are never copied; images that are files, and saved datasets, neither.
        keep_problems: Whether a row that cannot be read becomes an example with `problem`, its `image` and `caption`
            `None`. Examples then have a `place`, and tables are read in place.
        index_dir, shuffle_window: See [`ShardedExamples`].

    Raises:
        ValueError: The data cannot be read, a column is missing, a row has no image or caption, or there are no
            examples.
    """
    options: Any = (image_column, caption_column, keep_problems, index_dir, shuffle_window)
    in_place = streaming or keep_problems
    files = find_files(source)
    if files and files[0].is_dir():
        return _load_folder(files[0], split, in_place, options)
    if files:
        if in_place or not all(map(is_table, files)) or _is_of_documents(files[0], image_column, caption_column):
            return ShardedExamples(files, *options)
        return _load_tables(source, files, image_column, caption_column)
    if source.lower().endswith(SHARD_SUFFIXES) or source.startswith(("/", ".", "~")):
        raise ValueError(f"There is no file {source}. Check the path.")
    if streaming:
        return ShardedExamples(files_of_split(source, split), *options)
    return _named(source, load_dataset(source, split=split), image_column, caption_column)


def _is_of_documents(table: Path, image_column: str | None, caption_column: str | None) -> bool:
    """Whether the first row of a table is a document, of which a copy in Arrow's columns would need parts alike."""
    first = next(read_rows(table), None) if image_column is caption_column is None else None
    return first is not None and bool(document_columns(first[1]))


def _load_folder(path: Path, split: str, in_place: bool, options: Any) -> Dataset | Examples:
    source = str(path.absolute())  # `datasets` takes "parquet" for a format
    image_column, caption_column, *_ = options
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(source)
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{source} has no split {split!r}; it has {', '.join(saved)}.")
            saved = saved[split]
        return _named(source, saved, image_column, caption_column)
    metadata = [file for name in _METADATA for file in sorted(path.rglob(name))]
    if tars := sorted(path.rglob("*.tar")):
        return ShardedExamples(paths_of_split(path, tars, split, by_name=True), *options)
    has_parquet = any(file.name not in _METADATA for file in path.rglob("*.parquet"))
    if has_parquet and in_place:
        return ShardedExamples(files_of_split(source, split), *options)
    try:
        if has_parquet:
            dataset = load_dataset(source, split=split)
        elif metadata and in_place:
            return ShardedExamples(paths_of_split(path, metadata, split), *options)
        elif metadata:
            dataset = load_dataset("imagefolder", data_dir=source, split=split)
        else:
            return _load_images_with_texts(path, split, in_place)
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    return _named(source, dataset, image_column, caption_column)


def _load_images_with_texts(folder: Path, split: str, keep_problems: bool) -> Dataset:
    """Images with captions in text files beside them."""
    suffixes = image_suffixes()
    images = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    if not any(image.with_suffix(".txt").is_file() for image in images):
        found = f"{len(images)} images, but no captions: names of files and folders are none" if images else "no images"
        raise ValueError(
            f"{folder} has {found}. Put a metadata.csv with columns file_name and caption into it, or NAME.txt beside "
            f"each NAME.jpg. Tables in it are named by a pattern: {folder}/*.tsv."
        )
    rows = []
    for image in paths_of_split(folder, images, split):
        row = {"image": str(image), "caption": None, "place": str(image.relative_to(folder)), "problem": None}
        try:
            row["caption"] = image.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            pass  # an example without a caption
        except UnicodeDecodeError as error:
            row |= bad_row(row["place"], f"its caption is not UTF-8: {error}")
        if row["caption"] is None and not keep_problems:
            problem = row["problem"] or f"there is no {image.stem}.txt beside it"
            raise ValueError(f"{image} has no caption: {problem}. {_COMPLETE}")
        rows.append(row)
    columns = ("image", "caption", "place", "problem") if keep_problems else ("image", "caption")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def _named(source: str, dataset: Dataset, image_column: str | None, caption_column: str | None) -> Dataset | Examples:
    """`dataset` with columns `image`, encoded, and `caption`."""
    if not len(dataset):
        raise ValueError(f"{source} has no examples.")
    if image_column is caption_column is None and (documents := document_columns(dataset.column_names)):
        return SavedDocuments(dataset.select_columns(list(documents)))
    image_column, caption_column = find_columns(source, dataset.column_names, image_column, caption_column)
    more = [NEGATIVES] if NEGATIVES in dataset.column_names else []
    dataset = dataset.select_columns([image_column, caption_column, *more])
    names = {image_column: "image", caption_column: "caption"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    return dataset.cast_column("image", Image(decode=False))


class SavedDocuments(Examples):
    """Documents of a `datasets.Dataset`, whose images stay encoded.

    Args:
        dataset: Its columns are those of documents.
    """

    column_names = ("document",)

    def __init__(self, dataset: Dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        (row,) = self.dataset[number].to_pylist()
        return {**document_in(Path(), row), "place": f"row {number + 1}"}


_COMPLETE = "Complete the row, or take it out."


class _SeveralCaptions(ValueError):
    """A row has a list of captions where those before have one."""


def _load_tables(source: str, files: list[Path], image_column: str | None, caption_column: str | None) -> Dataset:
    headerless = (caption_column or CAPTION_COLUMNS[0], image_column or IMAGE_COLUMNS[0])
    columns, listed, has_negatives = [], False, False
    for path in files:
        first = next(read_rows(path, headerless), None)
        if first is not None:
            columns.append((str(path), find_columns(str(path), list(first[1]), image_column, caption_column)))
            listed = listed or isinstance(first[1][columns[-1][1][1]], list)
            has_negatives = has_negatives or NEGATIVES in first[1]
    if not columns:
        raise ValueError(f"{source} has no examples.")
    found = [path.stat() for path in files]
    arguments = {
        "tables": tuple(columns),
        "headerless": headerless,
        "has_negatives": has_negatives,
        # Part of the cache key of `datasets`.
        "version": tuple(
            (str(path.absolute()), stat.st_mtime_ns, stat.st_size) for path, stat in zip(files, found, strict=True)
        ),
    }
    while True:
        try:
            return Dataset.from_generator(_pairs, gen_kwargs={**arguments, "listed": listed})
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, _SeveralCaptions):  # a column has one type: a list in every row
                listed = True
                continue
            if isinstance(error.__cause__, ValueError) and any(str(path) in str(error.__cause__) for path in files):
                raise error.__cause__ from None
            raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _pairs(
    tables: tuple[tuple[str, tuple[str, str]], ...],
    headerless: tuple[str, str],
    has_negatives: bool,
    version: Any,
    listed: bool,
) -> Iterator[dict[str, Any]]:
    """Rows of the dataset from those of tables; with `listed` every caption is a list."""
    none: dict[str, Any] = {NEGATIVES: None} if has_negatives else {}
    for path, (image_column, caption_column) in tables:
        for line, row in read_rows(Path(path), headerless):
            image, caption = row.get(image_column), row.get(caption_column)
            if image is None or caption is None:
                missing = image_column if image is None else caption_column
                raise ValueError(f"{path}, line {line} has no {missing!r}. {_COMPLETE}")
            if isinstance(caption, list) and not listed:
                raise _SeveralCaptions
            caption = [caption] if listed and not isinstance(caption, list) else caption
            negatives = negatives_of(row, Path(path).parent) if has_negatives else {}
            yield {"image": as_image(image, Path(path).parent), "caption": caption} | none | negatives
