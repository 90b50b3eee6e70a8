"""What is published on the Hub, and what comes back."""

import json

import numpy as np
import pytest
import torch

from modeling_fromage import FromageImageIndex
from modeling_fromage.images_fromage import UnreadableImageError
from tests.helpers.indexes import (
    DIM,
    contents,
    picture,
    small_shards,
    write_pictures,
)


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_push_and_pull(tmp_path, monkeypatch, hub, model, processor, backend):
    small_shards(monkeypatch, 2)
    repo, images = "datasets/org/index", tmp_path / "images"
    write_pictures(images, "a.png", "sub/b.png", "broken.png", "c.png")
    write_pictures(tmp_path, "secret.png")
    index = FromageImageIndex.build(model, processor, images, backend=backend)
    index.add(torch.randn(1, DIM), ["escape"], [{"path": "../secret.png"}])
    address = index.push_to_hub("org/index", token="hf_test")
    assert address.endswith(f"/{repo}/commit/{hub.heads[repo]}")

    def pull(**kwargs):
        return FromageImageIndex.from_pretrained("org/index", token="hf_test", cache_dir=tmp_path / "cache", **kwargs)

    first, pulled, rooted = hub.heads[repo], pull(), pull(image_root=images)
    files = hub.repositories[repo][first]
    assert len(files) == 4 + (backend == "faiss") and not any(str(tmp_path).encode() in data for data in files.values())
    assert contents(pulled)[:-1] == contents(index)[:-1]
    assert pulled.skipped == [{"id": "broken.png", "source": "broken.png", "reason": "no image"}]
    assert (pulled.backend, pulled.model_fingerprint) == (backend, model.retrieval_fingerprint())

    # A repository must not be able to name files of the machine that loads it.
    assert np.array_equal(rooted.load_image("a.png"), picture(0))
    assert np.array_equal(index.load_image("escape"), picture(0))
    rooted.add(torch.randn(1, DIM), ["absolute"], [{"path": str(tmp_path / "secret.png")}])
    monkeypatch.chdir(images)
    merged = FromageImageIndex.merge([rooted])
    pulled.save_pretrained(tmp_path / "copy")
    copied = FromageImageIndex.from_pretrained(tmp_path / "copy")
    refused = [(pulled, "a.png"), (copied, "a.png")]
    refused += [(one, name) for one in (rooted, merged) for name in ("escape", "absolute")]
    for one, name in refused:
        with pytest.raises(UnreadableImageError, match="local files are refused"):
            one.load_image(name)

    hub.commit(repo, {**files, "README.md": b"a card"})
    index.delete(["a.png", "escape"])
    index.push_to_hub("org/index", token="hf_test")
    files = hub.repositories[repo][hub.heads[repo]]
    state = json.loads(files["index.json"])
    listed = [entry["file"] for entry in (*state["shards"], state["entries"], state.get("faiss")) if entry]
    assert sorted(files) == sorted(["README.md", "index.json", *listed])  # those of the first are gone
    assert pull().ids == index.ids and pull(revision=first).ids == pulled.ids
    forged = files["index.json"].replace(b'"image_root": null', b'"image_root": "/"')
    hub.commit(repo, {**files, "index.json": forged})
    assert forged != files["index.json"] and pull().image_root is None


def test_published_values_have_no_folders(tmp_path, hub, model, processor):
    write_pictures(tmp_path / "data", "a.png", "b.png", "other.png")
    table = tmp_path / "data" / "table.csv"
    table.write_text("image,file_name,source,label\na.png,other.png,{0}/x,/m/01g317\nb.png,{0}/b.png,see {0}/x.,c\n"
                     .format(tmp_path / "data"))  # fmt: skip
    index = FromageImageIndex.build(model, processor, table)
    assert index.metadata[0]["file_name"] == "other.png"  # as the table has it
    deep = {
        "list": [str(tmp_path / "y"), {str(tmp_path / "k.txt"): r"C:\Users\me\z.png"}],
        "file": f"file://{tmp_path}/f.png",
    }
    index.add(torch.randn(1, DIM), ["deep"], [{**deep, "path": str(tmp_path / "secret.png"), "n": 1, "no": None}])
    index.save_pretrained(tmp_path / "index")
    opened = FromageImageIndex.from_pretrained(tmp_path / "index")
    expected = [
        {"file_name": "other.png", "source": "x", "label": "/m/01g317", "path": "a.png"},
        {"file_name": "b.png", "source": "see x.", "label": "c", "path": "b.png"},
        {"list": ["y", {"k.txt": "z.png"}], "file": "f.png", "path": "secret.png", "n": 1, "no": None},
    ]
    for one in (index, opened):
        one.push_to_hub("org/scrubbed", token="hf_test")
        files = hub.repositories["datasets/org/scrubbed"][hub.heads["datasets/org/scrubbed"]]
        assert not any(str(tmp_path).encode() in data or b"Users" in data for data in files.values())
        pulled = FromageImageIndex.from_pretrained("org/scrubbed", token="hf_test", cache_dir=tmp_path / "cache")
        assert pulled.metadata == expected
    index.add(torch.randn(1, DIM), [str(tmp_path / "id.png")])
    with pytest.raises(ValueError, match="Ids that are paths of this machine"):
        index.push_to_hub("org/scrubbed", token="hf_test")


def test_images_in_memory_are_published(tmp_path, hub, model, processor):
    images = [picture(0), picture(1)]
    for several in (images, images[1:]):
        index = FromageImageIndex.build(model, processor, several, ids=[str(i) for i in range(len(several))])
        index.push_to_hub("org/pil", token="hf_test")
        pulled = FromageImageIndex.from_pretrained("org/pil", token="hf_test", cache_dir=tmp_path / "cache")
        assert all(np.array_equal(pulled.load_image(str(i)), image) for i, image in enumerate(several))
    files = hub.repositories["datasets/org/pil"][hub.heads["datasets/org/pil"]]
    assert sum(name.endswith(".png") for name in files) == 1  # those of the first are gone
