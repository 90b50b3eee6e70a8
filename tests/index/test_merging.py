"""Joining the folders of indexes into another folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import writer as writer_module
from modeling_fromage.index.folder import INDEX_FILE
from modeling_fromage.index.merging import is_index_of, merge_folders
from modeling_fromage.index.writer import IndexWriter
from tests.helpers.backbones import make_model
from tests.helpers.indexes import (
    Killed,
    columns,
    contents,
    dies_at,
    index_of,
    make_entries,
    small_shards,
    write_pictures,
)


@pytest.fixture
def build(model, processor):
    def build(images, directory, **options) -> FromageImageIndex:
        return FromageImageIndex.build(
            model, processor, images, save_directory=directory, show_progress=False, **options
        )

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_folders_are_what_merged_indexes_are(tmp_path, monkeypatch, dtype):
    small_shards(monkeypatch, 5)
    for number, count in enumerate((7, 1, 12)):
        index = index_of(make_entries(count, name=f"part {number}"), dtype=dtype)
        index.delete([f"part {number} 0"] if count > 1 else [])
        index.save_pretrained(tmp_path / str(number))
    folders = [tmp_path / str(number) for number in range(3)]
    merge_folders(folders, tmp_path / "all", {"digest": "d"})
    assert contents(FromageImageIndex.from_pretrained(tmp_path / "all")) == contents(FromageImageIndex.merge(folders))
    assert is_index_of(tmp_path / "all", "d", None, str(dtype).removeprefix("torch."))
    for other in (("e", None, "float32"), ("d", "model", "float32"), ("d", None, "int8")):
        with pytest.raises(ValueError, match="index of other images, or by another model"):
            is_index_of(tmp_path / "all", *other)
    assert not is_index_of(tmp_path, "d", None, "float32")


def test_images_and_paths_and_what_was_skipped(tmp_path, build):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for name in ("a", "b"):
        write_pictures(tmp_path / name, f"{name}.png", "broken.png")
    build([red, blue], tmp_path / "memory", ids=["red", "blue"])
    build(tmp_path / "a", tmp_path / "0"), build(tmp_path / "b", tmp_path / "1")
    merge_folders([tmp_path / name for name in ("memory", "0", "1")], tmp_path / "all")
    index = FromageImageIndex.from_pretrained(tmp_path / "all", image_root=tmp_path)
    assert index.ids == ["red", "blue", "a.png", "b.png"]
    assert np.array_equal(index.load_image("blue"), blue) and index.load_image("b.png").size == (9, 8)
    assert [row["id"] for row in index.skipped] == ["broken.png", "broken.png"]
    merge_folders([tmp_path / "0"], tmp_path / "same root")
    assert FromageImageIndex.from_pretrained(tmp_path / "same root").get("a.png") == {"path": "a.png"}


def test_of_images_of_one_id_the_first_is_kept(tmp_path):
    for number in range(2):
        rows, ids, metadata = columns(make_entries(3, name=f"image {number}"))
        metadata[1] = {"n": number, "path": f"{number}.png"}
        FromageImageIndex(rows, ["x", "twice", f"y {number}"], metadata).save_pretrained(tmp_path / str(number))
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
    index = FromageImageIndex.from_pretrained(tmp_path / "all")
    assert index.ids == ["x", "twice", "y 0", "y 1"] and index.get("twice")["n"] == 0
    assert [(row["id"], row["reason"]) for row in index.skipped] == [
        ("x", "id occurs twice"),
        ("twice", "id occurs twice"),
    ]
    assert index.skipped[1]["source"] == "1.png"


def test_shards_that_are_missing_or_empty(tmp_path, build):
    write_pictures(tmp_path / "images", "a.png", "broken.png", "b.png")
    for i in range(4):
        build(tmp_path / "images", tmp_path / str(i), shard=(i, 4))
    folders = [tmp_path / str(i) for i in range(4)]
    merge_folders(folders, tmp_path / "all")
    index = FromageImageIndex.from_pretrained(tmp_path / "all")
    assert index.ids == ["a.png", "b.png"] and [row["id"] for row in index.skipped] == ["broken.png"]
    with pytest.raises(ValueError, match=r"2 shards are missing: 1/4, 2/4\. Build them with --shard"):
        merge_folders([folders[0], folders[3]], tmp_path / "some")
    merge_folders([tmp_path / "all"], tmp_path / "again")  # the whole of them is no shard
    for i, told in ((0, "0/99999999999"), (2, ""), (3, 3)):  # anyone may have written it
        state = json.loads((folders[i] / INDEX_FILE).read_text())
        (folders[i] / INDEX_FILE).write_text(json.dumps(state | {"shard": told}))
    merge_folders([folders[0]], tmp_path / "some")
    with pytest.raises(ValueError, match=r"at least one image; 2 without any left out 1"):
        merge_folders(folders[2:], tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_what_cannot_be_merged(tmp_path, build, processor):
    write_pictures(tmp_path / "images", "a.png")
    build(tmp_path / "images", tmp_path / "0")
    build(tmp_path / "images", tmp_path / "1", dtype=torch.float16)
    other = make_model("opt_clip")
    other.adapter.visual_projection.weight.data *= 2
    FromageImageIndex.build(other, processor, tmp_path / "images", save_directory=tmp_path / "2")
    for folders, error, message in (
        (["0", "1"], ValueError, "one model and kind"), (["0", "2"], ValueError, "one model and kind"),
        ([], ValueError, "at least one index"), (["0", "none"], FileNotFoundError, "holds no image index"),
        (["0", "all"], ValueError, "Write into another folder"),
    ):  # fmt: skip
        merge_folders([tmp_path / "0"], tmp_path / "all")
        with pytest.raises(error, match=message):
            merge_folders([tmp_path / name for name in folders], tmp_path / "all")
        assert len(FromageImageIndex.from_pretrained(tmp_path / "all")) == 1


def test_an_interrupted_merge_leaves_the_old_index(tmp_path, monkeypatch):
    index_of(make_entries(3, name="old")).save_pretrained(tmp_path / "all")
    index_of(make_entries(9)).save_pretrained(tmp_path / "0")
    known = contents(FromageImageIndex.from_pretrained(tmp_path / "all"))
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 4)
    for call in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(IndexWriter, "_list_shard", dies_at(call, IndexWriter._list_shard, []))
            merge_folders([tmp_path / "0"], tmp_path / "all")
        assert contents(FromageImageIndex.from_pretrained(tmp_path / "all")) == known
    merge_folders([tmp_path / "0"], tmp_path / "all")
    assert len(FromageImageIndex.from_pretrained(tmp_path / "all")) == 9
