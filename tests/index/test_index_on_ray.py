"""What the driver does with actors, without Ray: those here run in this process. `tests/apps` has Ray itself."""

import sys
from types import SimpleNamespace

import pytest

from hub_scripts import build_image_index, index_on_ray
from modeling_fromage import FromageImageIndex
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.indexes import write_pictures


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class FakeRay:
    """Runs the methods of actors when they are waited for. `dies(name, arguments)` may raise what the driver gets."""

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError)

    def __init__(self, dies=lambda name, arguments: None):
        self.dies, self.calls = dies, []

    def wait(self, refs, num_returns):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        name, arguments, _ = ref
        self.calls.append(name)
        self.dies(name, arguments)
        return self.builder.fingerprint() if name == "fingerprint" else self.builder.build(*arguments)

    def actors(self, options, count):
        self.builder = index_on_ray.PartBuilder(options)

        def method(name):
            return SimpleNamespace(remote=lambda *arguments: (name, arguments, object()))

        return [SimpleNamespace(fingerprint=method("fingerprint"), build=method("build")) for _ in range(count)]


def is_part(name: str, arguments: tuple, *numbers: int) -> bool:
    return name == "build" and arguments[1][0] in numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    make_model("opt_clip").save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    write_pictures(folder / "images", *(f"{i}.png" for i in range(7)), "broken.png")
    return folder


@pytest.fixture
def build(folder, tmp_path, monkeypatch):
    """Build on a fake Ray, with further arguments of the command."""

    def build(ray: FakeRay, *arguments: str) -> FromageImageIndex:
        options = build_image_index.make_parser().parse_args(
            [str(folder / "model"), str(folder / "images"), str(tmp_path / "index"), "--ray", *arguments]
        )
        with monkeypatch.context() as patch:
            patch.setattr(index_on_ray, "_cluster", lambda options: _Within(ray))
            patch.setattr(index_on_ray, "_room", lambda ray, options: 2)
            patch.setattr(index_on_ray, "_start", lambda ray, options, count: ray.actors(options, count))
            return index_on_ray.build_on_ray(options)

    return build


class _Within:
    def __init__(self, ray):
        self.ray = ray

    def __enter__(self):
        return self.ray

    def __exit__(self, *error):
        pass


def check(index: FromageImageIndex) -> None:
    assert sorted(index.ids) == [f"{i}.png" for i in range(7)]
    assert [row["id"] for row in index.skipped] == ["broken.png"]
    assert index.load_image("3.png").size == (9, 8)


def test_parts_are_merged_and_removed(build, tmp_path):
    ray = FakeRay()
    check(build(ray))
    assert ray.calls.count("build") == 8 and [path.name for path in tmp_path.iterdir()] == ["index"]
    again, other = FakeRay(), tmp_path / "index.parts" / "notes.txt"
    other.parent.mkdir()
    other.touch()
    check(build(again))
    assert again.calls == ["fingerprint"] and other.exists()


def test_a_driver_that_died_goes_on(build, tmp_path):
    def dies(name, arguments):
        if is_part(name, arguments, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(FakeRay(dies), "--parts", "5")
    parts = tmp_path / "index.parts"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*/index.json")}
    assert sorted(path.parent.name for path in finished) == [f"{i:05d}-of-00005" for i in range(3)]
    with pytest.raises(ValueError, match=r"unfinished index in \[5\] parts, and 4 were asked for. Go on with those"):
        build(FakeRay(), "--parts", "4")

    def stops_late(name, arguments):
        if is_part(name, arguments, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(FakeRay(stops_late))
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    check(build(FakeRay(), "--actors", "3"))


@pytest.mark.parametrize("part", range(4))
def test_the_part_of_an_actor_that_died_goes_to_another(build, part):
    """To one that had nothing left to do, in the end."""
    lost = []

    def dies(name, arguments):
        if is_part(name, arguments, part) and not lost:
            lost.append(part)
            raise RayActorError("killed")

    ray = FakeRay(dies)
    check(build(ray, "--parts", "4"))
    assert ray.calls.count("build") == 5 and lost


def test_when_all_actors_died(build):
    def never(name, arguments):
        raise RayActorError("in its start\nValueError: no such model")

    with pytest.raises(ValueError, match=r"All actors died, with 8 of 8 parts left: ValueError: no such model"):
        build(FakeRay(never))
    left = [2]

    def dies(name, arguments):
        if name == "build" and not left[0]:
            raise RayActorError("no memory")
        left[0] -= name == "build"

    with pytest.raises(ValueError, match=r"with 6 of 8 parts left: no memory What is finished is kept"):
        build(FakeRay(dies), "--parts", "8")
    check(build(FakeRay()))


def test_a_part_that_fails_stops_no_other(build, tmp_path):
    def fails(name, arguments):
        if is_part(name, arguments, 0, 2):
            error = RayError("traceback")
            error.cause = OSError("the disk is full")
            raise error

    with pytest.raises(ValueError, match=r"2 of 4 parts failed. Part 0: the disk is full What is finished is kept"):
        build(FakeRay(fails), "--parts", "4")
    assert len(list(tmp_path.glob("index.parts/*/index.json"))) == 2
    check(build(FakeRay()))


def test_the_output_of_another_build_is_kept(build, folder, tmp_path):
    write_pictures(folder / "images", *(f"{i}.png" for i in range(7)), "broken.png")
    FromageImageIndex.merge([build(FakeRay())]).save_pretrained(tmp_path / "index")
    with pytest.raises(ValueError, match="index of other images"):
        build(FakeRay())


def nodes(*resources):
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": each} for each in resources])


def test_room(monkeypatch, caplog):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def options(**given):
        return SimpleNamespace(
            **{"cpus_per_actor": 4, "gpus_per_actor": 0, "actors": None, "ray_address": None} | given
        )

    cluster = nodes({"CPU": 7.0}, {"CPU": 8.0, "GPU": 1.0}, {})
    assert index_on_ray._room(cluster, options()) == 3
    assert index_on_ray._room(cluster, options(gpus_per_actor=0.5, cpus_per_actor=1)) == 2
    with pytest.raises(ValueError, match=r"Room for 3 actors of 4 CPUs and 0 GPUs .*7 CPUs and 0 GPUs.*4 were asked"):
        index_on_ray._room(cluster, options(actors=4))
    with pytest.raises(ValueError, match="Room for 0 actors"):
        index_on_ray._room(cluster, options(gpus_per_actor=2))
    assert index_on_ray._room(cluster, options(actors=4, ray_address="head:6379")) == 3
    assert "start once it has grown" in caplog.text


def test_ray_is_asked_for(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit):
        build_image_index.main([str(folder / "model"), str(folder / "images"), str(tmp_path / "index"), "--ray"])
    assert "`--ray` needs pip install 'modeling-fromage[ray]'" in capsys.readouterr().err
