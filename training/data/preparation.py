"""Tables of URLs to shards of images: which shard holds which rows, what is there already, and what failed."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, Value
from datasets import Image as ImageFeature
from filelock import FileLock, Timeout
from PIL import Image
from pyarrow import parquet
from tqdm.auto import tqdm

from modeling_fromage.file_writing_fromage import replace_file, replacing
from modeling_fromage.images_fromage import UnreadableImageError, is_url
from modeling_fromage.io.file_patterns import find_files
from modeling_fromage.io.tar_shards import add_member

from .fetching import Fetcher
from .sharded_examples import ShardedExamples

REPORTS = ".reports"  # `datasets`, which may load the folder too, passes hidden folders over
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # others are called as Pillow calls their format
_GROUP, _GROUP_BYTES = 256, 64_000_000  # rows of a Parquet row group, and bytes that make it end before


class _TarWriter:
    """`000000123.jpg` and `000000123.json` (caption and URL) of each row."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w")

    def add(self, number: int, image: bytes, caption: Any, url: str) -> None:
        kind = Image.open(io.BytesIO(image)).format or ""
        told = json.dumps({"caption": caption, "url": url}, ensure_ascii=False).encode()
        add_member(self._tar, f"{number:09d}.{_SUFFIXES.get(kind, kind.lower())}", image)
        add_member(self._tar, f"{number:09d}.json", told)

    def copy(self, path: Path) -> set[int]:
        """Take the rows of an earlier shard over; their numbers."""
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for member in members:
                self._tar.addfile(member, tar.extractfile(member))
        return {int(member.name.partition(".")[0]) for member in members}

    def close(self) -> None:
        self._tar.close()


class _ParquetWriter:
    """Columns `image`, `caption` (a list of texts), `url` and `row`, in small row groups."""

    def __init__(self, path: Path):
        texts: Any = [Value("string")]
        columns = {"image": ImageFeature(), "caption": texts, "url": Value("string"), "row": Value("int64")}
        self._schema = Features(columns).arrow_schema
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, number: int, image: bytes, caption: Any, url: str) -> None:
        captions = caption if isinstance(caption, list) else [caption]
        self._rows.append({"image": {"bytes": image, "path": None}, "caption": captions, "url": url, "row": number})
        self._bytes += len(image)
        if len(self._rows) >= _GROUP or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0

    def copy(self, path: Path) -> set[int]:
        """Take the rows of an earlier shard over; their numbers."""
        numbers: list[int] = []
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_GROUP):
                self._writer.write_batch(batch)
                numbers += batch.column("row").to_pylist()
        return set(numbers)

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


FORMATS: dict[str, Any] = {"tar": _TarWriter, "parquet": _ParquetWriter}


@dataclass
class Preparation:
    """Shards to be made of a table, `shard_size` of its rows each.

    Args:
        table: The table, or a pattern of several.
        directory: Folder of the shards, and of what is told about them, in `.reports`.
        image_column, caption_column: As for [`load_captioned_images`].
        format: "tar" or "parquet".
        shard_size: Rows of the table in a shard.
        size: Pixels that the fetcher reduces the shorter side to; the folder remembers it.
        allow_outside_paths: Whether paths may lead out of the folder of the table. By default a table cannot have any
            picture of this machine copied into shards that are meant to be published.
    """

    table: str
    directory: Path
    image_column: str | None = None
    caption_column: str | None = None
    format: str = "tar"
    shard_size: int = 10_000
    size: int | None = None
    allow_outside_paths: bool = False

    def run(self, fetcher: Fetcher, retry_failed: bool = False) -> dict[str, Any]:
        """Make the shards that are missing; with `retry_failed` fetch again what the others lack.

        Returns:
            The report: `rows`, `images`, `shards`, `failures` by reason, and `list`, the file that names them.

        Raises:
            ValueError: The table cannot be read; or the folder has shards of another table or of other options, or
                another run writes into it.
        """
        files = find_files(self.table)
        if not files:
            raise ValueError(f"There is no file {self.table}. Check the path.")
        reports = self.directory / REPORTS
        reports.mkdir(parents=True, exist_ok=True)
        with self._locked(reports):
            return self._make_shards(files, reports, fetcher, retry_failed)

    @contextmanager
    def _locked(self, reports: Path) -> Iterator[None]:
        lock = FileLock(reports / "lock")  # the system's: a process that is killed holds it no longer
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another `fromage prepare` is writing into {self.directory}. Wait for it or end it, or give another "
                "folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _make_shards(self, files: list[Path], reports: Path, fetcher: Fetcher, retry_failed: bool) -> dict[str, Any]:
        self._check_manifest(reports / "prepare.json", files)
        rows = ShardedExamples(
            files, self.image_column, self.caption_column, keep_problems=True, index_dir=reports / "shard_indexes"
        )
        starts = range(0, len(rows), self.shard_size)
        shards = []
        for number, start in enumerate(tqdm(starts, desc="Shards")):
            kept = reports / f"{number:05d}.json"
            report = _read_report(kept, self._shard(number))
            if report is None or (retry_failed and report["failures"]):
                report = self._make_shard(number, range(start, min(len(rows), start + self.shard_size)), rows, fetcher)
                replace_file(kept, json.dumps(report).encode())
            shards.append(report)
        return _summarise(shards, reports)

    def _shard(self, number: int) -> Path:
        return self.directory / f"{number:05d}.{self.format}"

    def _check_manifest(self, path: Path, files: list[Path]) -> None:
        manifest = {
            "table": [[file.name, file.stat().st_size] for file in files],
            "columns": [self.image_column, self.caption_column],
            "format": self.format,
            "shard_size": self.shard_size,
            "size": self.size,
        }
        if not path.is_file():
            replace_file(path, json.dumps(manifest).encode())
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name in manifest if manifest[name] != found.get(name)]:
            told = "; ".join(f"{name} {found.get(name)!r}, not {manifest[name]!r}" for name in wrong)
            raise ValueError(f"{self.directory} has shards with {told}. Give another folder.")

    def _make_shard(self, shard: int, numbers: range, rows: ShardedExamples, fetcher: Fetcher) -> dict[str, Any]:
        """Write a shard, with what an earlier one has, and return its report."""
        path, failures = self._shard(shard), []
        folders = {os.path.abspath(table.path.parent) for table in rows.shards}
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a run that was killed
            left.unlink()
        with replacing(path) as temporary:
            writer = FORMATS[self.format](temporary)
            there = writer.copy(path) if path.is_file() else set()  # it is whole, if its report is missing
            wanted: dict[int, dict[str, Any]] = {}
            for number in numbers:
                if number not in there:
                    row = rows[number]
                    if (reason := self._what_is_wrong(row, folders)) is None:
                        wanted[number] = row
                    else:
                        failures.append(_failure(number, row, reason, row.get("problem", "")))
            made = len(there)
            with tqdm(total=len(wanted), desc=path.name, leave=False) as progress:

                def receive(number: int, image: bytes | UnreadableImageError) -> None:
                    nonlocal made
                    row = wanted[number]
                    if isinstance(image, UnreadableImageError):
                        failures.append(_failure(number, row, image.reason, image.detail))
                    else:
                        url = row["image"] if len(row["image"]) < 2000 else ""
                        writer.add(number, image, row["caption"], url)
                        made += 1
                    progress.update()

                fetcher.fetch_all([(number, row["image"]) for number, row in wanted.items()], receive)
            writer.close()
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        failures.sort(key=lambda failure: failure["row"])
        return {"rows": len(numbers), "images": made, "failures": failures}

    def _what_is_wrong(self, row: dict[str, Any], folders: set[str]) -> str | None:
        """Why a row cannot be had, in a few words; `None` where it may be, with its captions alone in it."""
        if "problem" in row:
            return "malformed row"
        image, is_list = row["image"], isinstance(row["caption"], list)
        if not isinstance(image, str):
            return "no URL"
        if not _is_unicode(image) or "\0" in image:
            return "malformed URL"
        texts = [text for text in (row["caption"] if is_list else [row["caption"]]) if isinstance(text, str)]
        texts = [text for text in texts if text.strip()]
        captions = [text for text in texts if _is_unicode(text)]
        if not captions:
            return "caption is not Unicode" if texts else "empty caption"
        row["caption"] = captions if is_list else captions[0]
        if not is_url(image) and not self.allow_outside_paths:
            row["image"] = os.path.normpath(image)  # as it is checked: behind a link, ".." is another folder
            if not any(Path(os.path.abspath(row["image"])).is_relative_to(folder) for folder in folders):
                return "outside the table's folder"
        return None


def _read_report(path: Path, shard: Path) -> dict[str, Any] | None:
    """The report of a shard; `None` where one of them is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and shard.is_file() else None


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON may have half of a pair of surrogates, where a text was cut."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _failure(number: int, row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    url = row["image"][:2000] if isinstance(row["image"], str) else None
    return {"row": number, "place": row["place"], "url": url, "reason": reason, "detail": detail}


def _summarise(shards: list[dict[str, Any]], reports: Path) -> dict[str, Any]:
    """The report of all shards, which is written beside the list of failures."""
    failures = [failure for shard in shards for failure in shard["failures"]]
    listed = reports / "failures.jsonl"
    replace_file(listed, "".join(json.dumps(failure) + "\n" for failure in failures).encode())
    report = {
        "rows": sum(shard["rows"] for shard in shards),
        "images": sum(shard["images"] for shard in shards),
        "shards": len(shards),
        "failures": dict(Counter(failure["reason"] for failure in failures).most_common()),
        "list": str(listed),
    }
    replace_file(reports / "report.json", json.dumps(report, indent=1).encode())
    return report


def describe_report(report: dict[str, Any]) -> str:
    """A report as a table."""
    lines = [f"{report['images']:>12,}  images in {report['shards']:,} shards"]
    lines += [f"{count:>12,}  {reason}" for reason, count in report["failures"].items()]
    lines.append(f"{report['rows']:>12,}  rows")
    if report["failures"]:
        lines.append(f"{report['list']} names what failed; --retry-failed fetches it again.")
    return "\n".join(lines)


__all__ = ["FORMATS", "REPORTS", "Preparation", "describe_report"]
