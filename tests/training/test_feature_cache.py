"""The cache of frozen features: the same training with it as without, refusals, and interrupted or shared work."""

import hashlib
import io
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_fromage import FromageDataCollator
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.trainer.bad_examples import BadExampleError, TooManyBadExamplesError
from tests.helpers.backbones import PARITY, make_processor
from tests.helpers.open_clip import write_vit
from tests.helpers.training import losses
from training import cache_features, train
from training.data import feature_cache as features
from training.data import feature_writing
from training.data.captioned_images import load_captioned_images
from training.data.feature_cache import CachedFeatures
from training.data.feature_writing import VisionEncoder, write_features


@pytest.fixture(autouse=True)
def _errors_as_they_are_raised(monkeypatch):
    monkeypatch.setenv("FROMAGE_TRACEBACK", "1")


@pytest.fixture
def config(tmp_path):
    for name in ("language_model", "vision_model"):
        shutil.copytree(PARITY / "case_a_opt_tied" / name, tmp_path / "backbones" / name)
    images = (PARITY / "common" / "images").resolve()
    lines = [f"a picture of thing {i}\t{images}/img_{i:03d}.png" for i in range(22)]
    (tmp_path / "train.tsv").write_text("caption\timage\n" + "\n".join(lines) + "\n")
    backbones = tmp_path / "backbones"
    (tmp_path / "config.yaml").write_text(
        f"language_model: {backbones / 'language_model'}\nvision_model: {backbones / 'vision_model'}\n"
        f"projection_dim: 16\ntrain_data: {tmp_path / 'train.tsv'}\nmax_steps: 4\nlogging_steps: 1\n"
        "per_device_train_batch_size: 4\nlearning_rate: 0.01\nsave_strategy: 'no'\nreport_to: none\nuse_cpu: true\n"
    )
    return tmp_path / "config.yaml"


def run(config, folder, *options) -> int:
    return cache_features.main([str(config), str(folder), *options, "--shard-size", "5", "--batch-size", "3"])


def opened(dataset: Dataset | Path, folder: Path) -> CachedFeatures:
    """The cache in `folder` as its own encoder's."""
    dataset = dataset if isinstance(dataset, Dataset) else load_captioned_images(str(dataset))
    expected = json.loads((folder / "manifest.json").read_text())
    return CachedFeatures(dataset, folder, {name: expected[name] for name in expected if name != "shard_size"})


def picture(colour: str, size: int = 8) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (size, size), colour).save(file, "BMP")  # of one size, whatever the colour
        return file.getvalue()


def make_pictures(folder: Path, colours: list[str]) -> Path:
    """A table of pictures `0.bmp`, `1.bmp`, ..., all of one size and time."""
    folder.mkdir(parents=True)
    for number, colour in enumerate(colours):
        path = folder / f"{number}.bmp"
        path.write_bytes(picture(colour))
        os.utime(path, (10**9, 10**9))
    rows = [f"picture {i}\t{i}.bmp" for i in range(len(colours))]
    (folder / "train.tsv").write_text("caption\timage\n" + "\n".join(rows) + "\n")
    return folder / "train.tsv"


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_training_with_the_cache_equals_training_without(config, tmp_path, library):
    if library == "open_clip":
        write_vit(tmp_path / "backbones" / "vit")
        name, other = str(tmp_path / "backbones" / "vision_model"), f"open_clip:local-dir:{tmp_path}/backbones/vit"
        config.write_text(config.read_text().replace(name, other))
    assert run(config, tmp_path / "cache") == 5
    first = load_file(tmp_path / "cache" / "features-00000.safetensors")["features"]
    assert first.dtype == torch.float16 and first.shape == (5, 32)
    train.main([str(config), f"output_dir={tmp_path / 'live'}"])
    train.main([str(config), f"output_dir={tmp_path / 'cached'}", f"feature_cache={tmp_path / 'cache'}",
                "dataloader_num_workers=2"])  # fmt: skip
    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert list(cached) == [1, 2, 3, 4]
    assert cached == pytest.approx(live, abs=2e-2)  # features in half precision


def test_interrupted_and_shared_work(config, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run(config, whole)
    assert run(config, shared, "--rank", "0", "--world-size", "2") == 3
    with pytest.raises(ValueError, match="2 of its 5 shards, the first of them features-00001"):
        train.main([str(config), f"output_dir={tmp_path / 'out'}", f"feature_cache={shared}"])
    (shared / "features-00002.safetensors").write_bytes(b"half a file")
    assert run(config, shared, "--rank", "1", "--world-size", "2") == 2
    assert run(config, shared, "--rank", "0", "--world-size", "2") == 1  # the damaged one
    assert run(config, shared) == 0
    for number in range(5):
        name = f"features-{number:05d}.safetensors"
        assert torch.equal(load_file(whole / name)["features"], load_file(shared / name)["features"])
    assert sorted(path.name for path in shared.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_caches_of_something_else_are_refused(config, tmp_path):
    folder = tmp_path / "cache"
    run(config, folder)
    arguments = [str(config), f"output_dir={tmp_path / 'out'}", f"feature_cache={folder}"]
    for key, value, message in [
        ("vision_model_weights", {}, "vision_model_weights"),
        ("num_images", 21, "num_images 21, not 22"),
        ("preprocessing", {}, "preprocessing"),
        ("vision_pooling", "cls", "vision_pooling 'cls', not 'pooler'"),
    ]:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(ValueError, match=message):
            train.main(arguments)
        with pytest.raises(ValueError, match=message):
            run(config, folder)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no feature cache"):
        train.main([*arguments[:2], f"feature_cache={tmp_path}"])


def test_rows_are_those_of_the_data_set(config, tmp_path):
    run(config, tmp_path / "cache")
    dataset = load_captioned_images(str(tmp_path / "train.tsv"))
    expected = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    expected.pop("shard_size")
    cached = CachedFeatures(dataset, tmp_path / "cache", expected)
    assert len(cached) == 22 and cached[17]["caption"] == "a picture of thing 17"
    row = load_file(tmp_path / "cache" / "features-00003.safetensors")["features"][2]
    assert torch.equal(cached[17]["pooled_image_features"], row)


def test_other_pictures_of_the_same_names_are_refused(config, tmp_path):
    """Names, sizes and times are alike, as of files from an archive: the contents decide."""
    red = make_pictures(tmp_path / "red", ["red"] * 7)
    blue = make_pictures(tmp_path / "blue", ["red"] * 5 + ["blue"] * 2)
    cache = tmp_path / "cache"
    assert run(config, cache, f"train_data={red}") == 2
    message = r"of other images: image 5, .*blue/5.bmp, is not that of features-00001.*fromage cache-features CONFIG"
    with pytest.raises(ValueError, match=message):
        train.main([str(config), f"output_dir={tmp_path / 'out'}", f"train_data={blue}", f"feature_cache={cache}"])
    with pytest.raises(ValueError, match=message):
        run(config, cache, f"train_data={blue}")
    (cache / "features-00001.safetensors").unlink()
    assert run(config, cache, f"train_data={blue}") == 1  # a folder for red ones may go on with what is alike
    opened(blue, cache)
    with pytest.raises(ValueError, match=r"image 5, .*red/5.bmp"):
        opened(red, cache)


def test_only_what_differs_is_read(config, tmp_path, monkeypatch):
    table, cache = make_pictures(tmp_path / "images", ["red", "green", "blue", "red", "white", "black"]), tmp_path / "c"
    run(config, cache, f"train_data={table}")
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(features.hashlib, "file_digest", lambda f, kind: read.append(f.name) or digest(f, kind))
    opened(table, cache)
    assert read == []
    os.utime(tmp_path / "images" / "2.bmp")
    opened(table, cache)
    assert [Path(name).name for name in read] == ["2.bmp"]
    shutil.move(tmp_path / "images", tmp_path / "moved")
    opened(tmp_path / "moved" / "train.tsv", cache)
    assert len(read) == 7

    moved = load_captioned_images(str(tmp_path / "moved" / "train.tsv"))
    with pytest.raises(ValueError, match="image 0, .*5.bmp"):
        opened(moved.select(range(5, -1, -1)), cache)
    (tmp_path / "moved" / "3.bmp").write_bytes(picture("red", 9))
    read.clear()
    with pytest.raises(ValueError, match="image 3, .*3.bmp"):
        opened(moved, cache)
    assert [Path(name).name for name in read] == ["0.bmp", "1.bmp", "2.bmp"]  # its size tells


def test_files_that_are_gone_are_known_by_their_paths(config, tmp_path):
    table, cache = make_pictures(tmp_path / "images", ["red"] * 6), tmp_path / "cache"
    run(config, cache, f"train_data={table}")
    elsewhere = Path(shutil.copytree(tmp_path / "images", tmp_path / "elsewhere")) / "train.tsv"
    for folder in ("images", "elsewhere"):
        (tmp_path / folder / "4.bmp").unlink()
    assert len(opened(table, cache)) == 6
    with pytest.raises(ValueError, match="image 4, .*elsewhere/4.bmp"):
        opened(elsewhere, cache)


def test_images_within_the_data_set_and_behind_addresses(config, tmp_path, monkeypatch):
    encoder = VisionEncoder.from_pretrained(str(tmp_path / "backbones" / "vision_model"), ImageVector())

    def dataset(*images):
        return Dataset.from_list([{"image": image, "caption": "a picture"} for image in images])

    held = [{"bytes": picture(colour), "path": "same.bmp"} for colour in ("red", "green", "blue")]
    assert write_features(encoder, dataset(*held), tmp_path / "held") == 1
    opened(dataset(*held), tmp_path / "held")
    with pytest.raises(ValueError, match="image 1, same.bmp"):
        opened(dataset(held[0], held[2], held[1]), tmp_path / "held")
    (tmp_path / "here.bmp").write_bytes(picture("red"))
    opened(dataset({"bytes": None, "path": str(tmp_path / "here.bmp")}, *held[1:]), tmp_path / "held")

    fetched = []
    monkeypatch.setattr(feature_writing, "fetch", lambda url: fetched.append(url) or picture("red"))
    addresses = ["https://example.org/a.bmp", "https://example.org/b.bmp"]
    write_features(encoder, dataset(*addresses), tmp_path / "fetched")
    opened(dataset(*addresses), tmp_path / "fetched")
    with pytest.raises(ValueError, match="image 1, https://example.org/c.bmp"):
        opened(dataset(addresses[0], "https://example.org/c.bmp"), tmp_path / "fetched")
    opened(dataset(addresses[0], str(tmp_path / "here.bmp")), tmp_path / "fetched")  # its own copy
    assert fetched == addresses
    monkeypatch.setattr(feature_writing, "fetch", lambda url: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="https://example.org/a.bmp: no image"):
        write_features(encoder, dataset(*addresses), tmp_path / "script")
    for image, reason in (
        ({"bytes": None, "path": None}, "in memory: no image"),
        (str(tmp_path / "none.bmp"), "none.bmp: No such file"),
        ({"bytes": b"no picture", "path": "x.bmp"}, "x.bmp: no image"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_features(encoder, dataset(image), tmp_path / "unreadable")


def test_caches_that_know_names_alone_are_refused(config, tmp_path):
    cache = tmp_path / "cache"
    run(config, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["image_digests"]
    (cache / "manifest.json").write_text(json.dumps({**manifest, "images": "0" * 64}))
    for number in range(5):
        path = cache / f"features-{number:05d}.safetensors"
        save_file({"features": load_file(path)["features"]}, path)
    message = "by their names alone.*fromage cache-features CONFIG.yaml DIR"
    with pytest.raises(ValueError, match=message):
        train.main([str(config), f"output_dir={tmp_path / 'out'}", f"feature_cache={cache}"])
    with pytest.raises(ValueError, match=message):
        run(config, cache)


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_features_that_half_precision_does_not_hold(config, tmp_path, scale):
    """They trained on infinities, or zeros. Shards of two dtypes make one batch."""
    path = tmp_path / "backbones" / "vision_model" / "model.safetensors"
    weights = load_file(path)
    for name, value in weights.items():
        if "post_layernorm" in name:
            value.mul_(scale)
    save_file(weights, path, metadata={"format": "pt"})
    cache = tmp_path / "cache"
    run(config, cache)
    stored = [load_file(cache / f"features-{number:05d}.safetensors")["features"] for number in range(5)]
    assert {shard.dtype for shard in stored} == {torch.float32}
    assert all(shard.isfinite().all() and (shard != 0).any(-1).all() for shard in stored)
    halves = load_file(cache / "features-00001.safetensors")
    save_file({**halves, "features": torch.rand(5, 32).half()}, cache / "features-00001.safetensors")
    rows = opened(tmp_path / "train.tsv", cache)
    batch = FromageDataCollator(make_processor())([rows[4], rows[5]])["pooled_image_features"]
    assert batch.dtype == torch.float32 and torch.equal(batch[0], stored[0][4])


def test_features_that_are_not_finite_are_refused(config, tmp_path, monkeypatch):
    cache, encode = tmp_path / "cache", ImageVector.encode
    batches = []

    def overflowing(*arguments):
        output, features = encode(*arguments)
        batches.append(features)
        if len(batches) == 4:  # the second of the second shard, of images 8 and 9
            features[1, 3] = float("inf")
        return output, features

    monkeypatch.setattr(ImageVector, "encode", overflowing)
    with pytest.raises(ValueError, match=r"features of image 9, .*img_009.png, are not finite in float32"):
        run(config, cache)
    assert [path.name for path in sorted(cache.iterdir())] == ["features-00000.safetensors", "manifest.json"]
    run(config, cache)
    path = cache / "features-00003.safetensors"
    damaged = load_file(path)
    damaged["features"][2, 7] = float("nan")
    save_file(damaged, path)
    rows = opened(tmp_path / "train.tsv", cache)
    assert rows[16]["pooled_image_features"].isfinite().all()
    with pytest.raises(ValueError, match="row 2 of .*features-00003.safetensors, of image 17, are not finite"):
        rows[17]


def damage(tmp_path) -> None:
    """Of the 22 images of the table: one that is gone, one cut off, one that is text, and a shard of these."""
    lines = (tmp_path / "train.tsv").read_text().splitlines()
    (tmp_path / "cut.png").write_bytes(Path(lines[1].split("\t")[1]).read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    for number, name in ((1, "none.png"), (7, "cut.png"), (8, "text.png"), *((row, "none.png") for row in (20, 21))):
        lines[number + 1] = f"a picture of thing {number}\t{tmp_path / name}"
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")


SKIP = ("on_bad_example=skip", "max_bad_share=0.5")


def test_a_dead_image_costs_its_row_alone(config, tmp_path, capsys):
    run(config, tmp_path / "clean")
    damage(tmp_path)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="none.png: No such file"):
        run(config, cache)
    assert run(config, cache, *SKIP) == 5 and run(config, cache, *SKIP) == 0
    bad = [1, 7, 8, 20, 21]
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["num_bad_images"] == 5 and "5 of them are bad" in capsys.readouterr().out
    rows = [json.loads(line) for line in (cache / "_bad_examples.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == bad
    assert [row["reason"] for row in rows][:3] == ["No such file or directory", "broken", "no image"]
    for shard in range(5):
        here, there = (
            load_file(folder / f"features-{shard:05d}.safetensors") for folder in (cache, tmp_path / "clean")
        )
        valid = here["valid"].bool()
        assert [5 * shard + row for row in range(len(valid)) if not valid[row]] == [n for n in bad if n // 5 == shard]
        assert torch.allclose(here["features"][valid].float(), there["features"][valid].float(), rtol=1e-3, atol=1e-3)
        assert not here["features"][~valid].any() and there.keys() == here.keys() - {"valid"}
    dataset = opened(tmp_path / "train.tsv", cache)
    with pytest.raises(BadExampleError, match="broken: .*cut.png"):
        dataset[7]
    assert dataset[6]["caption"] == "a picture of thing 6"
    (cache / "features-00001.safetensors").unlink()
    assert run(config, cache, *SKIP) == 1  # an interrupted run
    assert json.loads((cache / "manifest.json").read_text()) == manifest


def test_training_on_a_cache_with_dead_images(config, tmp_path):
    damage(tmp_path)
    run(config, tmp_path / "cache", *SKIP)
    arguments = [str(config), f"output_dir={tmp_path / 'out'}", f"feature_cache={tmp_path / 'cache'}"]
    with pytest.raises(BadExampleError, match="example [0-9]+ of the train data.*on_bad_example=skip"):
        train.main(arguments)
    metrics = train.main([*arguments, *SKIP, "max_steps=-1", "num_train_epochs=1", "per_device_train_batch_size=4"])
    assert metrics["bad_examples"] == 5
    rows = [json.loads(line) for line in (tmp_path / "out" / "_bad_examples.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 7, 8, 20, 21]


def test_too_many_dead_images_stop_the_cache(config, tmp_path):
    damage(tmp_path)
    message = "5 of the 22 images that were read so far are bad.*=0.2(?s:.*)  3 No such file.*train.tsv, line 3;"
    with pytest.raises(TooManyBadExamplesError, match=message):
        run(config, tmp_path / "cache", "on_bad_example=skip", "max_bad_share=0.2")


def test_the_share_is_that_of_all_processes(config, tmp_path):
    """Of 3 bad images among 12 and 2 among 10. What is listed is what all have found."""
    damage(tmp_path)
    cache = tmp_path / "cache"

    def encode(rank: int, share: float) -> int:
        return run(config, cache, "on_bad_example=skip", f"max_bad_share={share}", f"--rank={rank}", "--world-size=2")

    assert encode(0, 0.2) == 3
    assert not list(cache.glob("*.jsonl"))
    with pytest.raises(TooManyBadExamplesError, match="5 of the 22 images(?s:.*)1 broken .train.tsv, line 9"):
        encode(1, 0.2)
    assert encode(1, 0.23) == 1
    rows = [json.loads(line) for line in (cache / "_bad_examples.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 7, 8, 20, 21]
    assert json.loads((cache / "manifest.json").read_text())["num_bad_images"] == 5
    assert encode(0, 0.23) == 0
    with pytest.raises(TooManyBadExamplesError):  # of what is there, by a process that has nothing to do
        encode(0, 0.2)


def test_shards_that_another_process_finishes_meanwhile_count(config, tmp_path, monkeypatch):
    damage(tmp_path)
    cache, whole = tmp_path / "cache", feature_writing._encode_shard
    run(config, cache, *SKIP)
    for name in ("features-00001.safetensors", "_bad_examples.jsonl"):
        (cache / name).unlink()
    theirs = cache / "features-00004.safetensors"
    away = theirs.rename(tmp_path / theirs.name)
    monkeypatch.setattr(feature_writing, "_encode_shard", lambda *inputs: (away.rename(theirs), whole(*inputs))[1])
    assert run(config, cache, *SKIP, "--rank=1", "--world-size=2") == 1
    assert len((cache / "_bad_examples.jsonl").read_text().splitlines()) == 5


def test_images_that_a_processor_or_an_encoder_refuses(config, tmp_path, monkeypatch):
    """And rows that are none: each is a row of its own, its neighbours are as they were."""
    encoder = VisionEncoder.from_pretrained(str(tmp_path / "backbones" / "vision_model"), ImageVector())
    colours = ["red", "green", "blue", "white", "black"]
    rows = [{"image": {"bytes": picture(colour), "path": f"{colour}.bmp"}, "caption": "a"} for colour in colours]
    rows.append({"image": None, "caption": None})
    dataset = Dataset.from_list([{**row, "problem": None, "place": f"t.tsv, line {i}"} for i, row in enumerate(rows)])
    dataset = dataset.map(lambda row, i: {"problem": "not UTF-8"} if i == 5 else row, with_indices=True)
    process, encode = encoder.image_processor.preprocess, VisionEncoder.encode

    def refusing(images, *args, **kwargs):
        if any(image.getpixel((0, 0)) == (0, 0, 255) for image in images):
            raise RuntimeError("nothing left")
        return process(images, *args, **kwargs)

    def overflowing(self, pixels):
        features = encode(self, pixels)
        features[pixels.flatten(1).std(-1) == pixels.flatten(1).std(-1).max()] = float("nan")
        return features

    monkeypatch.setattr(encoder.image_processor, "preprocess", refusing)
    monkeypatch.setattr(VisionEncoder, "encode", overflowing)
    write_features(encoder, dataset, tmp_path / "cache", shard_size=4, batch_size=4, max_bad_share=1.0)
    found = [json.loads(line) for line in (tmp_path / "cache" / "_bad_examples.jsonl").read_text().splitlines()]
    reasons = {row["number"]: row["reason"] for row in found}
    assert reasons[2] == "image processor raises" and reasons[5] == "malformed row"
    assert set(reasons.values()) == {"image processor raises", "malformed row", "features not finite"}
    assert found[-1]["place"] == "t.tsv, line 5" and found[-1]["detail"] == "not UTF-8"


def test_files_have_the_users_mode(config, tmp_path):
    umask = os.umask(0o027)
    try:
        run(config, tmp_path / "cache")
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").iterdir()} == {0o640}


def test_files_whose_names_are_not_utf8_are_told_apart():
    names = [os.fsdecode(name) for name in (b"/pictures/caf\xe9.png", b"/pictures/caf\xe8.png")]
    assert features.source_digest(names[0]) != features.source_digest(names[1])
