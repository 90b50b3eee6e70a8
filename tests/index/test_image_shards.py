"""Indexes built from tar and Parquet shards, here and in a store."""

import io
import json
import tarfile

import fsspec
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import builder as builder_module
from modeling_fromage.index import image_shards
from modeling_fromage.index.image_shards import find_shards
from modeling_fromage.index.sources import image_sources
from modeling_fromage.io.tar_shards import add_member
from tests.helpers.indexes import Killed, contents, dies_at, picture, png


def tar_bytes(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, data in members.items():
            add_member(tar, name, data)
    return buffer.getvalue()


def parquet_bytes(columns: dict, **options) -> bytes:
    parquet.write_table(pa.table(columns), buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def write_shards(where: str, count: int = 4, each: int = 3) -> None:
    """Pictures 0, 1, ... in `count` tar and Parquet files by turns, at an address that fsspec knows."""
    for shard in range(count):
        seeds = range(shard * each, (shard + 1) * each)
        if shard % 2:
            rows = [{"bytes": png(seed), "path": None} for seed in seeds]
            data = parquet_bytes({"image": rows, "seed": list(seeds), "wide": [[1, 2]] * each})
        else:
            pairs = [(f"{seed}.png", png(seed)) for seed in seeds] + [
                (f"{seed}.json", json.dumps({"seed": seed, "tags": [1]}).encode()) for seed in seeds
            ]
            data = tar_bytes(dict(pairs))
        with fsspec.open(f"{where}/{shard:03}.{'parquet' if shard % 2 else 'tar'}", "wb") as file:
            file.write(data)


@pytest.fixture
def build(model, processor):
    def build(images, **options) -> FromageImageIndex:
        return FromageImageIndex.build(model, processor, images, batch_size=2, show_progress=False, **options)

    return build


@pytest.fixture
def store():
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_shards_here_and_in_a_store(tmp_path, build, store):
    write_shards(str(tmp_path)), write_shards(store)
    index = build(tmp_path)
    assert index.ids == [f"{s:03}.tar/{s * 3 + i}.png" if s % 2 == 0 else f"{s:03}.parquet/{i}"
                         for s in range(4) for i in range(3)]  # fmt: skip
    assert index.get("002.tar/7.png") == {"shard": "002.tar", "member": "7.png", "seed": 7}
    assert index.get("003.parquet/1") == {"shard": "003.parquet", "member": 1, "seed": 10}
    plain = build([picture(seed) for seed in range(12)])
    assert torch.equal(index.embeds, plain.embeds) and not index.skipped
    whole = contents(index)
    named = [f"{tmp_path}/00{n}.{'parquet' if n % 2 else 'tar'}" for n in range(4)]
    for images in (named, store, f"{store}/*", f"{tmp_path}/*"):
        assert contents(build(images)) == whole
    assert build(f"{store}/{{000,002}}.tar").ids == [name for name in index.ids if ".tar" in name]
    assert build([f"{store}/001.parquet", f"{store}/000.tar"]).ids == index.ids[3:6] + index.ids[:3]
    assert index.image_root == tmp_path and build(store).image_root is None


@pytest.mark.parametrize("count", [2, 3, 7, 15])
def test_every_nth_shard_or_image(tmp_path, build, store, count):
    write_shards(store)
    whole = build(store)
    parts = [build(store, shard=(i, count), save_directory=tmp_path / str(i)) for i in range(count)]
    if count <= 4:
        assert all(len({row["shard"] for row in part.metadata}) in (1, 2) for part in parts)
        assert parts[0].ids == [name for n, name in enumerate(whole.ids) if n // 3 % count == 0]
    assert sum(map(len, parts)) == 12 and {len(part) for part in parts[12:]} <= {0}
    merged = FromageImageIndex.merge([tmp_path / str(i) for i in range(count)])
    order = [merged.ids.index(name) for name in whole.ids]
    assert len(merged) == 12 and torch.allclose(merged.embeds[order], whole.embeds, atol=1e-6)
    assert [merged.metadata[place] for place in order] == whole.metadata


def test_what_cannot_be_read_is_skipped(tmp_path, build):
    good = tar_bytes({"a.png": png(0), "a.txt": b"first", "a.json": b'{"id": "x", "path": "/etc/a.png", "n": 1}'})
    bad = {"b.png": b"no image", "c.png": png(1), "c.json": b"{", "d.txt": b"alone", "e.png": png(2),
           "e.txt": b"\xff"}  # fmt: skip
    (tmp_path / "0.tar").write_bytes(good)
    (tmp_path / "1.tar").write_bytes(tar_bytes(bad) + b"\1" * 700)
    (tmp_path / "2.parquet").write_bytes(b"PAR1" + b"x" * 100)
    rows = parquet_bytes({"jpg": [png(3), b"no", None], "id": ["y", None, "z"], "text": ["one", "two", None]})
    (tmp_path / "3.parquet").write_bytes(rows)
    index = build(tmp_path)
    assert index.ids == ["x", "y"]
    assert index.get("x") == {"shard": "0.tar", "member": "a.png", "caption": "first", "n": 1}
    assert index.get("y") == {"shard": "3.parquet", "member": 0, "text": "one"}
    reasons = {row["id"]: row["reason"] for row in index.skipped}
    assert reasons == {
        "1.tar/b.png": "no image", "1.tar/c.png": "broken metadata", "1.tar/d.txt": "no image",
        "1.tar/e.png": "broken metadata", "1.tar/4": "damaged shard", "2.parquet/0": "damaged shard",
        "3.parquet/1": "no image", "z": "not found",
    }  # fmt: skip


def test_damage_within_a_parquet_file(tmp_path, build):
    columns = {"image": [{"bytes": png(seed), "path": None} for seed in range(8)]}
    columns["n"] = list(range(8))
    path, data = tmp_path / "a.parquet", bytearray(parquet_bytes(columns, row_group_size=3, compression="gzip"))
    path.write_bytes(data)
    pages = parquet.read_metadata(path).row_group(1).column(0)
    start = pages.dictionary_page_offset or pages.data_page_offset
    data[start : start + pages.total_compressed_size] = bytes(pages.total_compressed_size)
    path.write_bytes(data)
    for images, prefix in ((tmp_path, "a.parquet/"), (path, "")):
        index = build(images)
        lost, kept = [[f"{prefix}{n}" for n in numbers] for numbers in ((3, 4, 5), (0, 1, 2, 6, 7))]
        assert [(row["id"], row["reason"]) for row in index.skipped] == [(name, "damaged shard") for name in lost]
        assert index.ids == kept and [row["n"] for row in index.metadata] == [0, 1, 2, 6, 7]


def test_one_table_has_numbers_for_ids(tmp_path, build):
    (tmp_path / "a.png").write_bytes(png(0))
    columns = {"image": ["a.png", None, "a.png"], "url": [None, "", None], "n": [1, 2, 3]}
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(columns))
    index = build(tmp_path / "t.parquet", ids=["x", "y", "z"])
    assert index.ids == ["x", "z"] and index.get("z") == {"n": 3, "url": None, "path": "a.png"}
    assert build(tmp_path / "t.parquet", shard=(2, 3)).ids == ["2"]
    with pytest.raises(ValueError, match=r"2 ids for 3 images"):
        build(tmp_path / "t.parquet", ids=["x", "y"])
    (tmp_path / "t.parquet").write_bytes(parquet_bytes({"n": [1]}))
    with pytest.raises(ValueError, match=r"t.parquet needs one of the columns"):
        build(tmp_path / "t.parquet")


def test_files_beside_the_shards_of_a_store_are_not_read(tmp_path, build, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(0))
    columns = {"image": [{"bytes": b"", "path": "a.png"}, {"bytes": png(1), "path": "a.png"}, None],
               "path": [None, None, "a.png"]}  # fmt: skip
    with fsspec.open(f"{store}/a.parquet", "wb") as file:
        file.write(parquet_bytes(columns))
    index = build(f"{store}/a.parquet")
    assert index.ids == ["a.parquet/1"] and {row["reason"] for row in index.skipped} == {"not in the shard"}


@pytest.mark.parametrize("call", [1, 2, 5, 6])
def test_a_killed_build_goes_on(tmp_path, monkeypatch, model, build, store, call):
    monkeypatch.setattr(builder_module, "CHECKPOINT_EVERY", 4)
    write_shards(store)
    whole, calls = contents(build(store)), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model, "get_image_embeds", dies_at(call, model.get_image_embeds, []))
        build(store, save_directory=tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(model, "get_image_embeds", dies_at(0, model.get_image_embeds, calls))
        assert contents(build(store, save_directory=tmp_path / "index")) == whole
    assert len(calls) == 6 - (call - 1) // 2 * 2
    with monkeypatch.context() as patch:
        patch.setattr(image_shards, "_local_copies", None)  # a finished one is recognised without a shard being read
        assert contents(build(store, save_directory=tmp_path / "index")) == whole
    with fsspec.open(f"{store}/002.tar", "wb") as file:
        file.write(tar_bytes({"a.png": png(0)}))
    with pytest.raises(ValueError, match="index of other images"):
        build(store, save_directory=tmp_path / "index")


def test_fetched_shards_are_removed(tmp_path, monkeypatch, store):
    monkeypatch.setattr(image_shards.tempfile, "tempdir", str(tmp_path))
    write_shards(store, count=6)
    left = []
    for source in image_sources(store).images:
        left.append(len(list(tmp_path.glob("*/*"))))
        assert source.image["bytes"]
    assert max(left) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("memory://bucket/none/*.tar", ValueError, "no shard .*at memory://bucket/none"),
        ("memory://bucket/none.tar", ValueError, "no shard .*at memory://bucket/none.tar"),
        ("nothing://a.tar", ValueError, "nothing"),
        ("{0..1}.tar", ValueError, "no file 0.tar"),
        (["memory://bucket/000.tar", __file__.replace(".py", ".tar")], ValueError, "Expected|no image|one store"),
    ],
)
def test_addresses_of_nothing(build, store, tmp_path, monkeypatch, images, error, message):
    write_shards(store)
    monkeypatch.chdir(tmp_path)
    if isinstance(images, list):
        images[1] = tmp_path / "here.tar"
        images[1].write_bytes(tar_bytes({"a.png": png(0)}))
    with pytest.raises(error, match=message):
        build(images)


def test_images_are_preferred_to_shards_in_a_folder(tmp_path):
    write_shards(str(tmp_path), count=1)
    assert len(find_shards(tmp_path)[0]) == 1
    (tmp_path / "a.png").write_bytes(png(0))
    assert [source.id for source in image_sources(tmp_path).images] == ["a.png"]
