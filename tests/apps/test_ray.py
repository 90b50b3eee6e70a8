"""An index built by Ray actors of this machine, some of which are killed."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from hub_scripts import build_image_index, index_on_ray
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageImageIndex

ray = pytest.importorskip("ray")
IMAGES = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    make_tiny_checkpoint(folder / "tiny")
    (folder / "images").mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
    (folder / "images" / "007.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR")
        yield
        ray.shutdown()


def command(folder, output: str, *arguments: str) -> list[str]:
    return [str(folder / "tiny" / "fromage"), str(folder / "images"), str(folder / output), "--batch-size", "2",
            "--dtype", "float32", *arguments]  # fmt: skip


def kill_one(parts: Path, killed: list[int]) -> None:
    """Kill an actor that builds one of these parts, once another is finished."""
    while not killed:
        time.sleep(0.01)
        for process in psutil.process_iter(["cmdline"]) if list(parts.glob("*/index.json")) else ():
            with suppress(psutil.Error):
                if (process.info["cmdline"] or [""])[0] == "ray::PartBuilder.build" and any(
                    Path(file.path).is_relative_to(parts) for file in process.open_files()
                ):
                    process.kill()
                    killed.append(process.pid)
                    return


def test_an_actor_is_killed(cluster, folder):
    build_image_index.main(command(folder, "plain"))
    killed: list[int] = []
    threading.Thread(target=kill_one, args=[folder / "killed.parts", killed], daemon=True).start()
    build_image_index.main(command(folder, "killed", "--ray", "--actors", "2", "--parts", "6"))
    plain, found = (FromageImageIndex.from_pretrained(folder / name) for name in ("plain", "killed"))
    assert killed and sorted(found.ids) == plain.ids and len(plain) == IMAGES - 1
    order = [found.ids.index(name) for name in plain.ids]
    torch.testing.assert_close(found.embeds[order], plain.embeds, atol=1e-6, rtol=0)
    assert [found.metadata[place] for place in order] == plain.metadata and found.skipped == plain.skipped
    assert not (folder / "killed.parts").exists()
    listing = (folder / "killed" / "index.json").stat().st_mtime_ns
    build_image_index.main(command(folder, "killed", "--ray"))
    assert (folder / "killed" / "index.json").stat().st_mtime_ns == listing  # it was finished


def test_what_actors_cannot_do_is_told(cluster, folder, capsys):
    for arguments, message in (
        (["--actors", "3"], r"Room for 2 actors of 1 CPUs and 0 GPUs .*3 were asked for"),
        (["--gpus-per-actor", "1"], "Room for 0 actors of 1 CPUs and 1 GPUs"),
    ):
        with pytest.raises(SystemExit):
            build_image_index.main(command(folder, "index", "--ray", *arguments))
        assert message.split(" .*")[0] in capsys.readouterr().err


def test_a_model_that_actors_cannot_load(cluster, folder, capsys):
    (folder / "empty").mkdir(exist_ok=True)
    arguments = command(folder, "index", "--ray", "--actors", "1", "--parts", "1")
    with pytest.raises(SystemExit):
        build_image_index.main([str(folder / "empty"), *arguments[1:]])
    error = capsys.readouterr().err
    assert "All actors died, with 1 of 1 parts left: " in error and str(folder / "empty") in error


def test_threads_of_an_actor(cluster, folder):
    options = build_image_index.make_parser().parse_args(command(folder, "index", "--ray", "--cpus-per-actor", "2"))
    (actor,) = index_on_ray._start(ray, index_on_ray._for_actors(options), 1)
    assert ray.get(actor.__ray_call__.remote(lambda _: torch.get_num_threads())) == 2
    ray.kill(actor)
