"""Builds that are killed and called again."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import builder as builder_module
from modeling_fromage.index.folder import CorruptIndexError
from modeling_fromage.index.writer import IndexWriter
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.indexes import (
    Killed,
    contents,
    dies_at,
    small_shards,
    write_pictures,
)

NAMES = [f"{i:02}.png" for i in range(5)] + ["broken.png"] + [f"sub/{i:02}.png" for i in range(7)]
BATCHES = 7  # of two
KILLED = """
import os, signal, sys
from modeling_fromage import FromageImageIndex
from modeling_fromage.index import builder
from tests.helpers.backbones import make_model, make_processor

builder.CHECKPOINT_EVERY = 4
model = make_model("opt_clip")
embed, calls = model.get_image_embeds, []
model.get_image_embeds = lambda pixels: (
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 5 else calls.append(1) or embed(pixels)
)
FromageImageIndex.build(model, make_processor(), sys.argv[1], batch_size=2, save_directory=sys.argv[2])
"""


class Build:
    """The same call again and again, with the model's calls counted."""

    def __init__(self, folder: Path, model, processor):
        self.model, self.processor = model, processor
        self.images, self.index = folder / "images", folder / "index"
        write_pictures(self.images, *NAMES)

    def __call__(self, die_at: int = 0, model=None, **kwargs) -> FromageImageIndex:
        model, self.calls = model or self.model, []
        kwargs = {"batch_size": 2, "save_directory": self.index, "show_progress": False, **kwargs}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "get_image_embeds", dies_at(die_at, model.get_image_embeds, self.calls))
            return FromageImageIndex.build(model, self.processor, self.images, **kwargs)

    def killed(self, *args, **kwargs):
        with pytest.raises(Killed):
            self(*args, **kwargs)


@pytest.fixture
def build(tmp_path, monkeypatch, model, processor):
    small_shards(monkeypatch, 5)
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 4)
    return Build(tmp_path, model, processor)


@pytest.mark.parametrize("call", range(1, BATCHES + 1))
def test_a_killed_build_goes_on(build, call):
    kwargs = {"dtype": torch.float16, "backend": "faiss"} if call % 2 else {}
    whole, done = contents(build(save_directory=None, **kwargs)), (call - 1) // 2 * 2  # batches before the checkpoint
    build.killed(call, **kwargs)
    with pytest.raises(FileNotFoundError, match="unfinished.*Call `build`" if done else "no image index"):
        FromageImageIndex.from_pretrained(build.index)
    build.killed(1, **kwargs)  # and again, in the first batch
    assert len(list(build.index.glob("embeds-*"))) <= 3  # those that they have outgrown are gone
    assert contents(build(**kwargs)) == whole and len(build.calls) == BATCHES - done
    assert contents(build(**kwargs)) == whole and not build.calls  # now it opens it
    assert len(list(build.index.iterdir())) == 3 + 2 + call % 2


def test_a_build_killed_between_its_files_goes_on(tmp_path, monkeypatch, build):
    kwargs = {"batch_size": 8, "backend": "faiss"}
    whole = contents(build(save_directory=None, **kwargs))
    for call in itertools.count(1):
        build.index = tmp_path / f"index {call}"
        with monkeypatch.context() as patch:
            calls: list[str] = []
            for place, name in ((os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, dies_at(call, getattr(place, name), calls))
            try:
                build(**kwargs)
                break
            except Killed:
                pass
        assert contents(build(**kwargs)) == whole
    assert call > 12


def test_sigkill(build):
    command = [sys.executable, "-c", KILLED, str(build.images), str(build.index)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    index = build()
    assert len(build.calls) == BATCHES - 4  # two checkpoints of two batches
    assert contents(index) == contents(build(save_directory=None))


@pytest.mark.parametrize("finished", [False, True])
def test_only_the_same_build_goes_on(build, finished):
    known = contents(build()) if finished else build.killed(6)
    other = make_model("opt_clip")
    other.adapter.visual_projection.weight.data *= 2
    for kwargs in ({"model": other}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match="index of other images, or by another" if finished else "other settings"):
            build(**kwargs)
    (build.images / NAMES[1]).rename(build.images / "00b.png")
    with pytest.raises(ValueError, match="index of other images" if finished else "images differ from those"):
        build()
    assert not build.calls
    (build.images / "00b.png").rename(build.images / NAMES[1])
    if finished:
        assert contents(build()) == known and not build.calls
    else:
        next(build.index.glob("entries-*.sqlite")).unlink()
        with pytest.raises(CorruptIndexError, match="entries-"):
            build()


def test_an_interrupted_save_is_no_unfinished_build(monkeypatch, build):
    index = build()
    known = contents(index)
    index.delete([NAMES[0]])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(IndexWriter, "_write", dies_at(1, IndexWriter._write, []))
        index.save_pretrained(build.index)
    assert contents(build()) == known and not build.calls
    index.save_pretrained(build.index)  # which is no longer what was built
    with pytest.raises(ValueError, match="index of other images"):
        build()


@pytest.mark.parametrize("kind", ["pil", "bytes", "file"])
def test_other_images_of_the_same_names(tmp_path, kind):
    model, processor = make_model("opt_clip"), make_processor()

    def images(colours):
        rows = [Image.new("RGB", (8, 8), colour) for colour in colours]
        if kind == "pil":
            return rows
        for i, image in enumerate(rows):
            image.save(tmp_path / f"{i}.png")
        paths = [tmp_path / f"{i}.png" for i in range(len(rows))]
        return paths if kind == "file" else [{"image": {"bytes": p.read_bytes(), "path": None}} for p in paths]

    options = {"save_directory": tmp_path / "index", "show_progress": False}
    FromageImageIndex.build(model, processor, images(["red", "green"]), **options)
    with pytest.raises(ValueError, match="other images"):
        FromageImageIndex.build(model, processor, images(["blue", "black"]), **options)
