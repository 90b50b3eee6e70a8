"""Small captioned images in every form that training reads, and tar files as they come."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from modeling_fromage.images_fromage import load_rgb_image
from modeling_fromage.io.tar_shards import add_member

COUNT = 4
CAPTIONS = [f"picture {number}" for number in range(COUNT)]


def picture(number: int, suffix: str = "png") -> bytes:
    """The contents of a file of one colour, which tells `number`."""
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), (number % 256, number // 256, 100)).save(file, suffix.upper())
    return file.getvalue()


def number_in(image: Any) -> int:
    red, green, _ = np.asarray(load_rgb_image(image))[0, 0].tolist()
    return red + 256 * green


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add_member(tar, name, data)
    return path


def tar_members(numbers: range, caption: str = "txt") -> list[tuple[str, bytes]]:
    members = []
    for number in numbers:
        text = f"picture {number}"
        data = text.encode() if caption == "txt" else json.dumps({"caption": text}).encode()
        members += [(f"{number:06d}.png", picture(number)), (f"{number:06d}.{caption}", data)]
    return members


def write_all_forms(folder: Path) -> None:
    """The files that the table of docs/train.md names."""
    photos = folder / "photos"
    photos.mkdir()
    for number in range(COUNT):
        (photos / f"{number}.png").write_bytes(picture(number))
    rows = [{"caption": CAPTIONS[n], "image": f"photos/{n}.png"} for n in range(COUNT)]
    _write_tables(folder, rows)
    _write_folders(folder, rows)
    for name, kind in (("shards", "txt"), ("img2dataset", "json")):
        (folder / name).mkdir()
        for shard in range(2):
            write_tar(folder / name / f"{shard:05d}.tar", tar_members(range(2 * shard, 2 * shard + 2), kind))


def hub_files() -> dict[str, bytes]:
    """Of a dataset on the Hub."""
    file = io.BytesIO()
    with_bytes().to_parquet(file)
    return {"train-00000-of-00001.parquet": file.getvalue()}


def with_bytes() -> Dataset:
    images = [{"bytes": picture(number), "path": None} for number in range(COUNT)]
    features = Features({"image": Image(), "caption": Value("string")})
    return Dataset.from_dict({"image": images, "caption": CAPTIONS}, features=features)


def _table(rows: list[dict], separator: str) -> str:
    return "\n".join(separator.join(line) for line in [list(rows[0]), *(row.values() for row in rows)]) + "\n"


def _write_tables(folder: Path, rows: list[dict]) -> None:
    (folder / "pairs.tsv").write_text(_table(rows, "\t"))
    (folder / "pairs.csv").write_text(_table(rows, ","))
    _write_lines(folder / "pairs.jsonl", rows)
    several = [{"file_name": row["image"], "captions": [row["caption"]] * 2} for row in rows]
    _write_lines(folder / "several.jsonl", several)
    Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    urls = [f"data:image/png;base64,{base64.b64encode(picture(n)).decode()}" for n in range(COUNT)]
    (folder / "Train_GCC.tsv").write_text("".join(f"{CAPTIONS[n]}\t{urls[n]}\n" for n in range(COUNT)))
    Dataset.from_dict({"URL": urls, "TEXT": CAPTIONS}).to_parquet(folder / "laion.parquet")
    Dataset.from_dict({"photo": [picture(n) for n in range(COUNT)], "alt": CAPTIONS}).to_parquet(
        folder / "bytes.parquet"
    )
    _write_documents(folder, rows)
    (folder / "cc3m").mkdir()
    for part in range(2):
        chosen = [{"title": row["caption"], "url": urls[2 * part + n]} for n, row in enumerate(rows[2 * part :][:2])]
        (folder / "cc3m" / f"part-{part:02d}.tsv").write_text(_table(chosen, "\t"))


def _write_documents(folder: Path, rows: list[dict]) -> None:
    """A caption and its picture each."""
    images = [{"type": "image", "image": row["image"]} for row in rows]
    _write_lines(folder / "pages.jsonl", [{"document": [row["caption"], image]}
                                          for row, image in zip(rows, images, strict=True)])  # fmt: skip
    _write_lines(folder / "obelics.jsonl", [{"images": [None, row["image"]], "texts": [row["caption"], None]}
                                            for row in rows])  # fmt: skip
    _write_lines(folder / "mmc4.jsonl", [{"text_list": [row["caption"], "."], "image_info": [
        {"image_name": row["image"], "matched_text_index": 1}]} for row in rows])  # fmt: skip
    chats = [
        {"role": "user", "content": [{"type": "text", "text": row["caption"], "path": None},
                                     {"type": "image", "text": None, "path": row["image"]}]} for row in rows
    ]  # fmt: skip
    Dataset.from_list([{"messages": [chat]} for chat in chats]).to_parquet(folder / "chats.parquet")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_folders(folder: Path, rows: list[dict]) -> None:
    for name in ("labelled", "with_texts"):
        (folder / name).mkdir()
        for number in range(COUNT):
            (folder / name / f"{number}.png").write_bytes(picture(number))
            if name == "with_texts":
                (folder / name / f"{number}.txt").write_text(CAPTIONS[number] + "\n")
    table = [{"file_name": f"{number}.png", "caption": CAPTIONS[number]} for number in range(COUNT)]
    (folder / "labelled" / "metadata.csv").write_text(_table(table, ","))
    whole = with_bytes()
    (folder / "parquet").mkdir()
    whole.to_parquet(folder / "parquet" / "train-00000-of-00001.parquet")
    whole.save_to_disk(folder / "saved")
    DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(folder / "saved_splits")
