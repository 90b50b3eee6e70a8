"""One entry at a time: updates and iteration."""

import pytest
import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.images_fromage import UnreadableImageError
from tests.helpers.indexes import DIM, Entry, assert_searches, contents, index_of, make_entries, picture


@pytest.mark.parametrize("backend", ["flat", "faiss"])
@pytest.mark.parametrize("stored", [False, True])
def test_update(tmp_path, shard_rows, backend, stored):
    entries, queries = make_entries(20), torch.randn(3, DIM)
    index = index_of(entries, backend=backend)
    if stored:
        index.save_pretrained(tmp_path)
        index = FromageImageIndex.from_pretrained(tmp_path)
    rows = torch.randn(3, DIM)
    index.update("image 3", metadata={"new": 1})
    index.update("image 5", embeds=rows[:1])
    index.update(["image 9", "image 3"], [{"newer": 2}, {}], rows[1:])
    kept = [entry for entry in entries if entry.id not in ("image 3", "image 5", "image 9")]
    expected = [
        *kept,
        Entry("image 5", rows[0], entries[5].facts),
        Entry("image 9", rows[1], {"newer": 2}),
        Entry("image 3", rows[2], {}),
    ]
    assert_searches(index, expected, queries, 20)
    index.save_pretrained(tmp_path)
    for one in (index, FromageImageIndex.from_pretrained(tmp_path)):
        assert one.ids == [entry.id for entry in expected] and len(one) == 20
        assert one.metadata == [entry.facts for entry in expected]
        assert_searches(one, expected, queries, 20)


def test_an_update_of_metadata_keeps_the_embedding_bit_for_bit():
    for dtype in (torch.float16, torch.float32):
        index = index_of(make_entries(9), dtype=dtype)
        before = index.embeds
        index.update(["image 2", "image 7"], [{}, {}])
        assert torch.equal(index.embeds, before[[0, 1, 3, 4, 5, 6, 8, 2, 7]])


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_refused_updates_change_nothing(backend):
    index, rows = index_of(make_entries(6), backend=backend), torch.randn(2, DIM)
    index.delete(["image 3"])
    before = contents(index)
    for error, arguments, message in [
        (KeyError, (["image 0", "image 3"], [{}, {}]), "image 3.*nothing was updated"),
        (KeyError, ("image 9", {}), "image 9"),
        (ValueError, ("image 0",), "needs `metadata`, `embeds`"),
        (ValueError, (["image 0", "image 0"], [{}, {}]), "occurs twice"),
        (ValueError, (["image 0", "image 1"], [{}]), "2 ids and 1 metadata"),
        (ValueError, ("image 0", None, rows), "2 embeddings for 1 ids"),
        (ValueError, ("image 0", {"x": float("nan")}), "JSON"),
        (ValueError, ("image 0", None, rows[:1] / 0), "infinite"),
        (ValueError, ("image 0", None, rows[:1, :3]), "Expected embeddings"),
    ]:
        with pytest.raises(error, match=message):
            index.update(*arguments)
        assert contents(index) == before


def test_an_update_that_fails_in_the_backend_changes_nothing(monkeypatch):
    index = index_of(make_entries(6), backend="faiss")
    before, backend = contents(index), index._store.now.backend
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(backend, "add", lambda rows, entries: (_ for _ in ()).throw(MemoryError))
        index.update("image 0", metadata={})
    assert contents(index) == before and "image 0" in index
    index.update("image 0", metadata={"now": 1})
    assert index.get("image 0") == {"now": 1} and len(index) == 6


def test_an_updated_image_keeps_its_picture(tmp_path, model, processor):
    index = FromageImageIndex.build(model, processor, [picture(0), picture(1)], show_progress=False)
    index.update("0", metadata={"title": "first"})
    index.save_pretrained(tmp_path)
    for one in (index, FromageImageIndex.from_pretrained(tmp_path)):
        assert one.load_image("0").tobytes() == picture(0).tobytes() and one.get("0") == {"title": "first"}
        assert one.load_image("1").tobytes() == picture(1).tobytes()
    index.delete("0")
    index.add(torch.randn(1, DIM), ["0"])
    with pytest.raises(UnreadableImageError, match="no path or url"):
        index.load_image("0")


def test_an_entry_is_the_callers_own():
    index = FromageImageIndex(torch.randn(3, DIM), ["a", "b", "c"])
    before = index.embeds
    for entry in index:
        entry.embedding.zero_()
    assert torch.equal(index.embeds, before)


def test_iteration_is_of_one_moment(shard_rows):
    entries = make_entries(20)
    index = index_of(entries)
    index.delete("image 4")
    found = []
    for entry in index:
        found.append(entry)
        if len(found) == 1:
            index.delete(["image 9"])
            index.add(torch.randn(1, DIM), ["new"])
    expected = [entry for entry in entries if entry.id != "image 4"]
    assert [(one.id, one.metadata) for one in found] == [(entry.id, entry.facts) for entry in expected]
    torch.testing.assert_close(
        torch.stack([one.embedding for one in found]), F.normalize(torch.stack([e.row for e in expected]), dim=-1)
    )
    assert [one.id for one in index] == index.ids and "new" in index and "image 9" not in index
    assert list(FromageImageIndex(torch.empty(0, DIM), [])) == []
