"""Indexes as datasets and back."""

import sys

import datasets
import pytest
import torch

from modeling_fromage import FromageImageIndex
from modeling_fromage.images_fromage import UnreadableImageError
from modeling_fromage.index import datasets_bridge
from tests.helpers.indexes import DIM, contents, index_of, make_entries, picture, write_pictures

METADATA = [
    {"label": "cat", "n": 1, "x": 0.5, "ok": True, "mixed": 1, "tags": ["a", "b"], "path": "a.png"},
    {"label": "", "n": -(2**63), "ok": False, "mixed": "1", "none": None, "big": 2**70, "odd": "\udce9"},
    {},
    {"id": 3, "embedding": "e", "image": "i", "metadata": {"deep": [1, {"x": None}]}, "x": 1e300, "mixed": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("through", ["memory", "parquet", "disk"])
def test_round_trip(tmp_path, dtype, through):
    index = FromageImageIndex(torch.randn(4, DIM), ["a", "b", "c", "d"], METADATA, dtype=dtype)
    dataset = index.to_dataset(images=False)
    assert dataset.column_names == ["id", "embedding", "label", "n", "ok", "path", "x", "metadata"]
    assert dataset["label"][:] == ["cat", "", None, None] and dataset.features["n"].dtype == "int64"
    assert dataset.features["embedding"] == datasets.List(datasets.Value(str(dtype).removeprefix("torch.")), length=DIM)
    if through == "parquet":  # as on the Hub
        dataset.to_parquet(tmp_path / "data.parquet")
        dataset = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / "data.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
        )
    if through == "disk":
        dataset.save_to_disk(tmp_path / "data")
        dataset = datasets.load_from_disk(tmp_path / "data")
    again = FromageImageIndex.from_dataset(dataset, model_fingerprint="m", backend="faiss")
    assert again.metadata == METADATA and again.ids == index.ids and torch.equal(again.embeds, index.embeds)
    assert (again.dtype, again.backend, again.model_fingerprint) == (dtype, "faiss", "m")
    again.use_backend("flat")
    assert contents(again) == contents(index)
    shuffled = FromageImageIndex.from_dataset(dataset.select([3, 1]))
    assert shuffled.ids == ["d", "b"] and shuffled.metadata == [METADATA[3], METADATA[1]]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_the_format_of_a_dataset_does_not_matter(kind):
    index = FromageImageIndex(torch.randn(2, DIM), ["a", "b"], [{"n": 1}, {"n": 2, "x": 0.5}])
    dataset = index.to_dataset(images=False).with_format(kind, columns=["embedding", "id"])
    assert contents(FromageImageIndex.from_dataset(dataset)) == contents(index)


def test_a_dataset_is_of_one_moment():
    index = FromageImageIndex(torch.randn(2, DIM), ["a", "b"], [{"n": 1}, {"n": 2}])

    def load(image_id, metadata):
        if image_id == "a":
            index.delete("b")
        return picture(metadata["n"])

    index.image_loader = load
    pictures = index.to_dataset()["image"]
    assert len(index) == 1 and [found.getpixel((0, 0)) for found in pictures] == [
        picture(n).getpixel((0, 0)) for n in (1, 2)
    ]


def test_pictures_go_along(tmp_path, model, processor):
    write_pictures(tmp_path / "photos", "a.png", "b.png")
    index = FromageImageIndex.build(model, processor, tmp_path / "photos", show_progress=False)
    index.add_images(model, processor, [picture(2)], ids=["memory"], show_progress=False)
    index.add(torch.randn(2, DIM), ["nowhere", "gone"], [{}, {"path": "gone.png"}])
    index.image_root = tmp_path / "photos"
    dataset = index.to_dataset()
    assert isinstance(dataset.features["image"], datasets.Image)
    for row, seed in zip(dataset, (0, 1, 2, None, None), strict=True):
        assert row["image"] is None if seed is None else row["image"].tobytes() == picture(seed).tobytes()
    again = FromageImageIndex.from_dataset(dataset)
    again.save_pretrained(tmp_path / "saved")
    (tmp_path / "photos" / "a.png").unlink()
    for one in (again, FromageImageIndex.from_pretrained(tmp_path / "saved")):
        for name, seed in (("a.png", 0), ("b.png", 1), ("memory", 2)):
            assert one.load_image(name).tobytes() == picture(seed).tobytes()
        with pytest.raises(UnreadableImageError):
            one.load_image("nowhere")


def test_pictures_that_may_not_be_read_stay_out(tmp_path, monkeypatch):
    write_pictures(tmp_path, "secret.png")
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / "secret.png"), "secret.png", "../" + tmp_path.name + "/secret.png"]
    own = FromageImageIndex(torch.randn(3, DIM), list("abc"), [{"path": path} for path in paths])
    own.save_pretrained(tmp_path / "index")
    assert all(own.to_dataset()["image"])
    opened = FromageImageIndex.from_pretrained(tmp_path / "index")
    assert opened.to_dataset()["image"][:] == [None] * 3
    # Nor by a dataset that someone wrote: neither by its metadata, nor by a picture that is a path.
    dataset = datasets.Dataset.from_dict(
        {
            "id": ["a"], "embedding": [[1.0] * DIM], "path": [paths[0]], "image": [{"bytes": None, "path": paths[0]}]
        }
    ).cast_column("image", datasets.Image())  # fmt: skip
    index = FromageImageIndex.from_dataset(dataset)
    with pytest.raises(UnreadableImageError, match="local files are refused"):
        index.load_image("a")
    assert index.to_dataset()["image"][:] == [None]
    index.image_root = tmp_path
    assert index.load_image("a").tobytes() == picture(0).tobytes()


def test_folders_of_this_machine_stay_out(tmp_path):
    index = FromageImageIndex(torch.randn(1, DIM), ["a"], [{"path": str(tmp_path / "x.png"), "deep": [str(tmp_path)]}])
    assert str(tmp_path) not in str(index.to_dataset(images=False)[0])
    index.add(torch.randn(1, DIM), [str(tmp_path / "id.png")])
    with pytest.raises(ValueError, match="Ids that are paths of this machine"):
        index.to_dataset()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"]}, "no column 'embedding'"),
        ({"embedding": [[1.0]]}, "no column 'id'"),
        ({"id": [], "embedding": []}, "is empty"),
        ({"id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0, 3.0]]}, "of one length"),
        ({"id": ["a", "b"], "embedding": [[1.0], None]}, "of one length"),
        ({"id": ["a"], "embedding": [3.0]}, "of one length"),
        ({"id": ["a"], "embedding": [[float("nan")]]}, "NaN"),
        ({"id": ["a", "a"], "embedding": [[1.0], [1.0]]}, "unique"),
        ({"id": ["a"], "embedding": [[1.0]], "metadata": ["[1]"]}, "JSON objects"),
        ({"id": ["a"], "embedding": [[1.0]], "metadata": ["{"]}, "JSON objects"),
    ],
)
def test_datasets_that_are_no_index(columns, message):
    with pytest.raises(ValueError, match=message):
        FromageImageIndex.from_dataset(datasets.Dataset.from_dict(columns))


def test_other_datasets_are_normalised():
    dataset = datasets.Dataset.from_dict({"name": [1, 2], "v": [[3, 4], [0, 2]], "author": [None, "me"]})
    index = FromageImageIndex.from_dataset(dataset, embedding_column="v", id_column="name")
    assert index.ids == ["1", "2"] and index.metadata == [{}, {"author": "me"}]
    torch.testing.assert_close(index.embeds, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_without_datasets(monkeypatch):
    index = index_of(make_entries(2))
    monkeypatch.setattr(datasets_bridge, "is_datasets_available", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for use in (index.to_dataset, lambda: FromageImageIndex.from_dataset(None)):
        with pytest.raises(ImportError, match=r"pip install 'modeling-fromage\[train\]'"):
            use()
