"""Building from folders, tables, datasets and lists."""

import base64
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex
from modeling_fromage.images_fromage import UnreadableImageError
from modeling_fromage.index import builder as builder_module
from modeling_fromage.index.sources import image_sources
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.indexes import (
    DIM,
    picture,
    png,
    write_pictures,
)


def make_source(kind: str, folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, str]]:
    """`images` with pictures 0 and 2, and some that cannot be indexed; more arguments for `build`; and what to expect:
    metadata by id, and reasons by id."""
    write_pictures(folder, "a.png", "broken.png", "sub dir/b.png", "notes.txt")
    a, broken, b = (str(folder / name) for name in ("a.png", "broken.png", "sub dir/b.png"))
    url, urls = (f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}" for seed in (2, 0))
    table, cells = folder / f"table.{kind}", [("id", "image", "caption"), ("x", "a.png", "one"), ("y",)]
    if kind == "tsv":
        table.write_text("\n".join(map("\t".join, [*cells, ("z", b, "three")])))
    if kind == "csv":  # with the mark that spreadsheets begin it with
        cells = [("image", "url", "id"), ("", urls, "x, 1"), ("gone.png", "", "y"), ("", url, "z")]
        table.write_text("\ufeff" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in cells), "utf-8")
    photos = {"photo": [{"bytes": png(0)}, {"bytes": b"no"}, {"path": b}], "id": [7, 8, 9], "label": [0, 1, 2]}
    rows = [
        {"image": picture(0), "id": "x", "score": 0.5, "missing": float("nan"), "box": [1, 2]},
        {"path": Path(broken), "id": "y"},
        {"url": url, "id": "z"},
        {"image": {"bytes": png(3)}, "id": "x"},
    ]
    lists = {"ids": ["x", "y", "z", "x"], "metadata": [{"n": n} for n in range(4)]}
    images = [picture(0), "gone.png", picture(2), picture(3)]
    twice, of_rows = {"y": "no image", "x": "id occurs twice"}, {"x": {"score": 0.5}, "z": {"url": url}}
    return {
        "folder": (folder, {}, {name: {"path": name} for name in ("a.png", "sub dir/b.png")},
                   {"broken.png": "no image"}),
        "tsv": (table, {}, {"x": {"caption": "one", "path": "a.png"},
                            "z": {"caption": "three", "path": "sub dir/b.png"}}, {"y": "not found"}),
        "csv": (table, {}, {"x, 1": {"image": "", "url": urls}, "z": {"image": "", "url": url}}, {"y": "not found"}),
        "dataset": (datasets.Dataset.from_dict(photos).cast_column("photo", datasets.Image()), {},
                    {"7": {"label": 0}, "9": {"label": 2, "path": b}}, {"8": "no image"}),
        "images": (images, lists, {"x": {"n": 0}, "z": {"n": 2}}, {**twice, "y": "not found"}),
        "paths": ([a, broken, Path(b)], {}, {"0": {"path": a}, "2": {"path": b}}, {"1": "no image"}),
        "rows": (rows, {}, of_rows, twice),
        "generator": ((row for row in rows), {}, of_rows, twice),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tsv", "csv", "dataset", "images", "paths", "rows", "generator"])
@pytest.mark.parametrize("saved", [False, True])
def test_build(tmp_path, model, processor, caplog, kind, saved):
    images, kwargs, metadata, reasons = make_source(kind, tmp_path / "images")
    kwargs = {**kwargs, "batch_size": 3 if saved else 4, "save_directory": tmp_path / "index" if saved else None}
    index = FromageImageIndex.build(model, processor, images, show_progress=False, **kwargs)
    assert dict(zip(index.ids, index.metadata, strict=True)) == metadata
    assert {row["id"]: row["reason"] for row in index.skipped} == reasons and len(index.skipped) == len(reasons)
    assert f"Indexed 2 of {2 + len(reasons)} images; skipped {len(reasons)}: 1 " in caplog.text
    assert all(f"1 {reason}" in caplog.text for reason in reasons.values())
    pixels = processor.image_processor([picture(0), picture(2)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.allclose(index.embeds, model.get_image_embeds(pixels), atol=1e-5)
    for image_id, seed in zip(index.ids, (0, 2), strict=True):
        if metadata[image_id].keys() & {"path", "url"} or kind in ("images", "rows"):
            assert np.array_equal(index.load_image(image_id), picture(seed))
        else:
            with pytest.raises(UnreadableImageError, match="no path or url"):
                index.load_image(image_id)


def test_images_in_memory_tie_and_are_forgotten(model, processor):
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    index = FromageImageIndex.build(model, processor, [red, blue, red], batch_size=2)
    assert index.search(index.embeds[:1], top_k=3)[0] == [["0", "2", "1"]]
    index.delete(["1"])
    index.add(index.embeds[:1], ["1"])
    with pytest.raises(UnreadableImageError, match="no path or url"):
        index.load_image("1")


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        ([], {}, "at least one image. Indexed 0 of 0"),
        (["gone.png", "gone.jpg"], {}, "Indexed 0 of 2 images; skipped 2: 2 not found"),
        *((images, {}, "Expected a folder") for images in ("picture.png", b"bytes", {"image": "a.png"}, 5)),
        ([{"picture": 1}], {}, "Row 0 has none of the columns"),
        ([picture(0)], {"ids": ["a", "b"]}, "2 ids for 1 images"),
        ([picture(0)], {"metadata": []}, "0 metadata entries for 1 images"),
        (iter([picture(0)]), {"ids": ["a"]}, "1 ids for a stream"),
        ([picture(0)], {"dtype": torch.bfloat16}, "float32 or torch.float16"),
    ],
)
def test_bad_builds(tmp_path, monkeypatch, model, processor, images, kwargs, message):
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 1)
    with pytest.raises(ValueError, match=message):
        FromageImageIndex.build(model, processor, images, save_directory=tmp_path, **kwargs)
    assert len(FromageImageIndex.build(model, processor, [picture(0)], save_directory=tmp_path)) == 1  # no trace


def test_numpy_in_builds(model, processor):
    rows = [{"image": picture(0), "n": np.float32(0.5)}, {"image": picture(1), "n": np.int64(2)}]
    index = FromageImageIndex.build(model, processor, rows, ids=np.array([5, 6]), metadata=np.array([{"a": 1}, {}]))
    assert index.ids == ["5", "6"] and index.metadata == [{"n": 0.5, "a": 1}, {"n": 2}]


def test_names_that_are_not_utf8(tmp_path, model, processor):
    images, name = tmp_path / "images", os.fsdecode(b"caf\xe9.png")
    write_pictures(images, "a.png", name, os.fsdecode(b"broken \xff.png"))
    for options in ({}, {"save_directory": tmp_path / "index"}, {"save_directory": tmp_path / "index"}):
        index = FromageImageIndex.build(model, processor, images, show_progress=False, **options)
        assert index.ids == ["a.png", "caf\\udce9.png"] and name in index
        assert index.metadata == [{"path": "a.png"}, {"path": name}]
        assert [row["id"] for row in index.skipped] == ["broken \\udcff.png"]
        assert np.array_equal(index.load_image(name), picture(1))
        assert index.search(torch.ones(1, DIM), 1, exclude_ids=[name], where={"path": ["a.png", name]})[0] == [
            ["a.png"]
        ]
    index.add(torch.ones(1, DIM), ["\ud800"], [{"caption": "\udce9", "\udce9": 1}])
    index.save_pretrained(tmp_path / "again")
    again = FromageImageIndex.from_pretrained(tmp_path / "again", image_root=images)
    assert again.get("\ud800") == {"caption": "\udce9", "\udce9": 1}
    assert again.search(torch.ones(1, DIM), 3, where={"caption": "\udce9"})[0] == [["\\ud800"]]
    assert np.array_equal(again.load_image(name), picture(1))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_that_are_not_utf8(tmp_path, model, processor, suffix):
    (tmp_path / f"t.{suffix}").write_bytes(b"image\n" + b"a.png\n" * 5000 + b"caf\xe9.png\n")
    with pytest.raises(ValueError, match=rf"t\.{suffix}, line 5002 is not UTF-8"):
        FromageImageIndex.build(model, processor, tmp_path / f"t.{suffix}")


def test_a_pipe_in_a_folder(tmp_path):
    write_pictures(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    found = [source.id for source in image_sources(tmp_path)[0]]
    assert found == ["a.png", "gone.png"]


def test_quotes_in_a_tsv_are_quotes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = ['a "word', '"open', "plain", 'closed"']
    lines = [f"{i}\ta.png\t{row}\n" for i, row in enumerate(rows)]
    (tmp_path / "t.tsv").write_text("id\timage\tcaption\n" + "".join(lines))
    index = FromageImageIndex.build(make_model("opt_clip"), make_processor(), tmp_path / "t.tsv", show_progress=False)
    assert [facts["caption"] for facts in index.metadata] == rows


def test_model_stamp(tmp_path, model, processor):
    model.save_pretrained(tmp_path, save_backbones=True, adapter_dtype=torch.bfloat16)
    other = FromageForConditionalGeneration.from_pretrained(tmp_path)
    weight = other.adapter.visual_projection.weight
    assert not torch.equal(weight, model.adapter.visual_projection.weight)
    index, query = FromageImageIndex.build(model, processor, [picture(0)]), torch.randn(1, DIM)
    assert index.model_fingerprint == model.retrieval_fingerprint() == other.retrieval_fingerprint()
    assert index.search(query, model=other)[0] == [["0"]]
    weight.data[0, 0] += 0.1
    unstamped = FromageImageIndex(index.embeds, ["0"])
    for use in (
        lambda index: index.check_model(other),
        lambda index: index.search(query, model=other),
        lambda index: index.add_images(other, processor, [picture(1)], ids=["1"]),
    ):
        with pytest.raises(ValueError, match="was made by the model"):
            use(index)
        use(unstamped)
    assert len(index) == 1 and len(unstamped) == 2
    with pytest.raises(ValueError, match="width"):
        FromageImageIndex(torch.randn(1, 8), ["0"]).add_images(model, processor, [picture(1)], ids=["1"])
