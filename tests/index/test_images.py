"""The images themselves: which files are read, and what is kept with the index."""

import copy
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_fromage import FromageImageIndex
from modeling_fromage.images_fromage import ImageLimits, UnreadableImageError
from modeling_fromage.index import builder as builder_module
from modeling_fromage.index import writer as writer_module
from modeling_fromage.index.writer import IndexWriter
from tests.helpers.indexes import (
    DIM,
    Killed,
    contents,
    dies_at,
    index_of,
    make_entries,
    picture,
    small_shards,
    write_pictures,
)


def test_images_are_found_from_whatever_they_were_added_by(tmp_path, monkeypatch, model, processor):
    small_shards(monkeypatch, 1)
    for name in ("one", "two"):
        write_pictures(tmp_path / name, f"{name}.png", f"broken {name}.png")
    first, second = (FromageImageIndex.build(model, processor, tmp_path / name) for name in ("one", "two"))
    merged = FromageImageIndex.merge([first, second])
    first.add_images(model, processor, tmp_path / "two")
    for index in (merged, first):
        index.add_images(model, processor, [tmp_path / "one" / "one.png"], ids=["listed"])
        index.add_images(model, processor, [picture(3)], ids=["memory"])
        before = contents(index)
        with pytest.raises(ValueError, match="unique"):
            index.add_images(model, processor, [picture(4), picture(5)], ids=["new", "memory"])
        assert contents(index) == before  # not in part either
        assert index.ids == ["one.png", "two.png", "listed", "memory"]
        assert [row["id"] for row in index.skipped] == ["broken one.png", "broken two.png"]
        for name, seed in zip(index.ids, (0, 0, 0, 3), strict=True):
            assert np.array_equal(index.load_image(name), picture(seed))
        assert torch.equal(index.embeds[0], index.embeds[1]) and torch.equal(index.embeds[0], index.embeds[2])


def test_images_from_elsewhere():
    index = index_of(make_entries(3))
    with pytest.raises(UnreadableImageError, match="image_loader"):
        index.load_image("image 1")
    index.image_loader = lambda image_id, facts: Image.new("RGB", (len(image_id), 2))
    assert index.load_image("image 1").size == (7, 2)


@pytest.mark.parametrize("where", ["cwd", "home"])
def test_images_of_a_folder_are_not_read_on_its_word(tmp_path, monkeypatch, model, processor, where):
    """Of an index that was opened: neither by its `image_root`, nor by absolute paths, links or ways up."""
    write_pictures(tmp_path / "photos", "a.png", "sub/b.png")
    write_pictures(tmp_path, "secret.png")
    built = FromageImageIndex.build(model, processor, tmp_path / "photos", save_directory=tmp_path / "index")
    assert np.array_equal(built.load_image("a.png"), picture(0))  # of this process's own images
    again = FromageImageIndex.build(model, processor, tmp_path / "photos", save_directory=tmp_path / "index")
    assert np.array_equal(again.load_image("sub/b.png"), picture(1))  # as it is of the same call, which opens it
    names = {
        "up": "../secret.png",
        "absolute": str(tmp_path / "secret.png"),
        "link": "link.png",
        "nul": "\0",
    }
    built.add(torch.randn(4, DIM), list(names), [{"path": path} for path in names.values()])
    built.save_pretrained(tmp_path / "index")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "index" / "link.png").symlink_to(tmp_path / "secret.png")
    write_pictures(tmp_path / "index", "own.png")

    monkeypatch.chdir(tmp_path / ("photos" if where == "cwd" else "."))
    alone, rooted = (FromageImageIndex.from_pretrained(tmp_path / "index", image_root=root)
                     for root in (None, tmp_path / "photos"))  # fmt: skip
    for index, refused in ((alone, ["a.png", "sub/b.png", *names]), (rooted, names)):
        index.add(torch.randn(2, DIM), ["own", "own absolute"],
                  [{"path": "own.png"}, {"path": str(tmp_path / "index" / "own.png")}])  # fmt: skip
        for name in refused:
            with pytest.raises(UnreadableImageError, match="local files are refused") as error:
                index.load_image(name)
            assert repr(str(tmp_path / "photos")) in str(error.value)  # what to pass
        assert np.array_equal(index.load_image("own absolute"), picture(0))
    assert np.array_equal(alone.load_image("own"), picture(0)) and alone.image_root is None
    assert np.array_equal(rooted.load_image("a.png"), picture(0))
    merged = FromageImageIndex.merge([tmp_path / "index"])
    merged.save_pretrained(tmp_path / "merged")
    for index in (merged, FromageImageIndex.from_pretrained(tmp_path / "merged")):
        with pytest.raises(UnreadableImageError, match=re.escape(repr(str(tmp_path / "photos")))):
            index.load_image("a.png")
        index.image_root = tmp_path / "photos"
        assert np.array_equal(index.load_image("a.png"), picture(0))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]


def pil_images() -> list[Image.Image]:
    """One of every mode, and some whose metadata says how they look."""
    images = [picture(seed).convert("L" if mode == "I;16" else mode if mode != "PA" else "RGB")
              for seed, mode in enumerate(MODES)]  # fmt: skip
    images = [
        image.convert(mode) if mode in ("PA", "I;16") else image for image, mode in zip(images, MODES, strict=True)
    ]
    transparent = picture(20).convert("P")
    transparent.info["transparency"] = 3
    opaque = picture(21)
    opaque.info["transparency"] = opaque.getpixel((0, 0))
    return [*images, transparent, opaque]


def test_images_in_memory_are_saved(tmp_path, monkeypatch, model, processor):
    small_shards(monkeypatch, 4)
    images = pil_images()
    index = FromageImageIndex.build(model, processor, images, show_progress=False)
    index.delete(["2"])
    index.add(torch.randn(1, DIM), ["2"])  # has no image
    pixels = {name: np.asarray(index.load_image(name)) for name in index.ids if name != "2"}
    metadata = index.metadata
    for folder in ("first", "first", "second"):  # over itself, too
        index.save_pretrained(tmp_path / folder)
        index = FromageImageIndex.from_pretrained(tmp_path / folder)
        for one in (index, FromageImageIndex.merge([index]), copy.deepcopy(index)):
            assert {name: np.asarray(one.load_image(name)).tolist() for name in pixels} == {
                name: pixels[name].tolist() for name in pixels
            }
            with pytest.raises(UnreadableImageError, match="no path or url"):
                one.load_image("2")
        assert index.metadata == metadata
        assert len(list((tmp_path / folder).glob("index-images-*"))) == 1  # the older ones are gone
        assert len(list((tmp_path / folder).glob("index-images-*/*"))) == len(images) - 1
    index.delete(index.ids)
    other = tmp_path / "second" / "index-images-mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    FromageImageIndex(torch.randn(1, DIM), ["a"]).save_pretrained(tmp_path / "second")
    assert [path.name for path in (tmp_path / "second").rglob("index-images-*")] == [other.name]  # not ours


def red(index: FromageImageIndex) -> int:
    return index.load_image("0").getpixel((0, 0))[0]


def test_images_outlive_saves_over_themselves(tmp_path, model, processor):
    """An index that is opened, changed and saved into its own folder again and again, as an application does."""
    images = [Image.new("RGB", (9, 9), (level, 0, 0)) for level in (11, 22, 33)]
    index = FromageImageIndex.build(
        model, processor, images, save_directory=tmp_path, backend="faiss", show_progress=False
    )
    for number in range(3):
        assert red(index) == 11 and red(FromageImageIndex.from_pretrained(tmp_path)) == 11
        index.add(torch.randn(1, DIM), [f"new {number}"])
        index.delete([str(number)] if number else [])
        index.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("index-images-*/*"))) == 1
    index, other = (FromageImageIndex.from_pretrained(tmp_path) for _ in range(2))
    assert len(other.embeds) == len(other.ids) == 4  # opened, all but its images
    index.save_pretrained(tmp_path)
    index.save_pretrained(tmp_path / "copy")
    assert red(index) == red(FromageImageIndex.from_pretrained(tmp_path / "copy")) == 11
    with pytest.raises(UnreadableImageError, match="not found .*was saved anew, reopen it"):
        other.load_image("0")
    with pytest.raises(UnreadableImageError, match="not found"):
        other.save_pretrained(tmp_path)  # which would remove the images
    assert red(FromageImageIndex.from_pretrained(tmp_path)) == 11


def test_images_over_the_limits_are_saved_again(tmp_path, monkeypatch):
    index = FromageImageIndex(torch.randn(1, DIM), ["0"])
    index._store.images[0] = Image.new("RGB", (40, 40), (11, 0, 0))
    index.save_pretrained(tmp_path / "1")
    monkeypatch.setattr(ImageLimits, "max_pixels", 1000)
    for number in (1, 2):
        FromageImageIndex.from_pretrained(tmp_path / str(number)).save_pretrained(tmp_path / str(number + 1))
    assert red(FromageImageIndex.from_pretrained(tmp_path / "3")) == 11


def test_images_of_a_killed_build_are_not_those_of_the_next(tmp_path, monkeypatch, model, processor):
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 2)
    write_pictures(tmp_path, "file.png")
    images = [Image.new("RGB", (9, 9), (level, 0, 0)) for level in (11, 22, 33, 44)]
    options = {"batch_size": 2, "save_directory": tmp_path / "index", "show_progress": False}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(IndexWriter, "add", dies_at(2, IndexWriter.add, []))
        FromageImageIndex.build(model, processor, images, **options)
    assert len(list(tmp_path.glob("index/index-images-*/*"))) == 4
    index = FromageImageIndex.build(model, processor, [*images[:2], str(tmp_path / "file.png")], **options)
    assert red(index) == 11 and np.array_equal(index.load_image("2"), Image.open(tmp_path / "file.png"))
    [folder] = tmp_path.glob("index/index-images-*")
    images[3].save(folder / "3.png")  # whoever put it there
    index = FromageImageIndex.from_pretrained(tmp_path / "index")
    index.add(torch.randn(1, DIM), ["another"])
    with pytest.raises(UnreadableImageError, match="no path or url"):
        index.load_image("another")


def test_a_linked_image_is_refused(tmp_path, model, processor):
    write_pictures(tmp_path, "secret.png")
    FromageImageIndex.build(model, processor, [picture(1)], save_directory=tmp_path / "index")
    [image] = (tmp_path / "index").glob("index-images-*/0.png")
    image.unlink()
    image.symlink_to(tmp_path / "secret.png")
    index = FromageImageIndex.from_pretrained(tmp_path / "index")
    with pytest.raises(UnreadableImageError, match="leads out"):
        index.load_image("0")
    index.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").rglob("*.png"))


@pytest.mark.parametrize("name", ["", ".", "..", "photos"])
def test_only_a_folder_of_images_is_taken_for_one(tmp_path, name):
    """A listing that names the index's own folder, or the one around it, reads no picture and removes none."""
    directory = tmp_path / "around" / "index"
    FromageImageIndex(torch.randn(1, DIM), ["a"]).save_pretrained(directory)
    write_pictures(tmp_path / "around", "0.png", "7.png")
    write_pictures(directory / "photos", "0.png", "7.png")
    (directory / "0.png").symlink_to(tmp_path / "around" / "0.png")
    state = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps({**state, "images": name}))
    with pytest.raises(UnreadableImageError, match="no path or url"):
        FromageImageIndex.from_pretrained(directory).load_image("a")
    (directory / "index.json").rename(directory / "building.json")
    IndexWriter(directory, {}, resume=True)
    assert all((folder / "7.png").is_file() for folder in (directory.parent, directory / "photos"))


def test_an_interrupted_save_keeps_the_images(tmp_path, monkeypatch, model, processor):
    old, new = (FromageImageIndex.build(model, processor, [picture(seed)]) for seed in (0, 1))
    for call in itertools.count(1):
        old.save_pretrained(tmp_path)
        with monkeypatch.context() as patch:
            calls: list[str] = []
            for place, name in ((writer_module, "save_file"), (Image.Image, "save"), (os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, dies_at(call, getattr(place, name), calls))
            try:
                new.save_pretrained(tmp_path)
                break
            except Killed:
                found = FromageImageIndex.from_pretrained(tmp_path)
                assert np.array_equal(found.load_image("0"), picture(0 if torch.equal(found.embeds, old.embeds) else 1))
    assert call > 6
