"""The cache of frozen features: the same training with it as without, refusals, and interrupted or shared work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.backbones import PARITY
from tests.test_resume import losses
from training import cache_features, train
from training.data import load_captioned_images
from training.features import CachedFeatures


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
    return cache_features.main([str(config), str(folder), "--shard-size", "5", "--batch-size", "3", *options])


def test_training_with_the_cache_equals_training_without(config, tmp_path):
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
