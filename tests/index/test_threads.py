"""An image index that threads search, change and save at once, and folders that are saved anew under their readers."""

import contextlib
import copy
import functools
import itertools
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.index import reading as reading_module
from modeling_fromage.index import shards as shards_module
from modeling_fromage.index import writer as writer_module
from modeling_fromage.index.backends import flat as flat_module
from modeling_fromage.index.backends.faiss import FaissBackend
from modeling_fromage.index.backends.flat import search_flat
from modeling_fromage.index.folder import CorruptIndexError, ReplacedIndexError

DIM, SECONDS = 32, 10
ROOT = Path(__file__).parents[2]


@functools.cache
def row_of(image_id: str) -> torch.Tensor:
    """Every image has its own direction, which can be told from its id."""
    generator = torch.Generator().manual_seed(int(image_id.split()[1]))
    return F.normalize(torch.randn(DIM, generator=generator), dim=-1)


def rows_of(ids: list[str]) -> torch.Tensor:
    return torch.stack([row_of(image_id) for image_id in ids])


def index_of(ids: list[str], **kwargs) -> FromageImageIndex:
    return FromageImageIndex(rows_of(ids), ids, [{"name": name} for name in ids], **kwargs)


def assert_finds_all(index: FromageImageIndex, ids: list[str]):
    """It holds `ids` and nothing else, each found by its own vector, with its own metadata, at its own row."""
    assert sorted(index.ids) == sorted(ids) and len(index) == len(ids)
    assert index.metadata == [{"name": name} for name in index.ids]
    torch.testing.assert_close(index.embeds, rows_of(index.ids))
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        found, scores, metadata = index.search(rows_of(some), 1)
        assert found == [[name] for name in some] and metadata == [[{"name": name}] for name in some]
        assert (scores > 0.999).all()


@pytest.fixture
def small_shards(monkeypatch):
    for module in (shards_module, writer_module):
        monkeypatch.setattr(module, "SHARD_ROWS", 300)


class Traffic:
    """What the threads do, again and again until time is up; the first error of any stops all."""

    def __init__(self, folder: Path, backend: str):
        self.numbers, self.rng, self.lock = itertools.count(), random.Random(0), threading.Lock()
        self.fixed = self.new_ids(40)  # which nobody deletes
        self.alive: list[str] = []
        self.folder, self.index = folder, index_of(self.fixed, backend=backend)
        self.errors: list[BaseException] = []
        self.calls: Counter[str] = Counter()
        self.stop = threading.Event()

    def run(self, seconds: float, **counts: int):
        actions = [getattr(self, name) for name, count in counts.items() for _ in range(count)]
        threads = [threading.Thread(target=self.repeat, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        assert all(self.calls[name] > 3 for name in counts), self.calls

    def repeat(self, action: Callable[[], object]):
        while not self.stop.is_set():
            try:
                action()
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()
            with self.lock:
                self.calls[action.__name__] += 1

    def new_ids(self, count: int) -> list[str]:
        return [f"image {next(self.numbers)}" for _ in range(count)]

    def put(self, ids: list[str]):
        self.index.add(rows_of(ids), ids, [{"name": name} for name in ids])
        with self.lock:
            self.alive += ids

    def add(self):
        with self.lock:
            ids = self.new_ids(self.rng.randrange(1, 30))
        self.put(ids)
        time.sleep(0.005)

    def delete(self):
        with self.lock:
            self.rng.shuffle(self.alive)
            ids = [self.alive.pop() for _ in range(min(len(self.alive), self.rng.randrange(20)))]
        self.index.delete(ids)
        if ids:
            self.put(ids[:1])  # at another position
        time.sleep(0.005)

    def search(self):
        ids = random.sample(self.fixed, 3)
        found, scores, metadata = self.index.search(rows_of(ids), 5)
        for names, values, facts, name in zip(found, scores, metadata, ids, strict=True):
            assert names[0] == name and len(set(names)) == 5 and facts == [{"name": each} for each in names]
            torch.testing.assert_close(values, rows_of(names) @ row_of(name))

    def filter(self):
        ids = random.sample(self.fixed, 4)
        query = row_of(ids[0])[None]
        found = self.index.search(query, 6, exclude_ids=ids[:1])[0][0]
        assert ids[0] not in found and len(found) == 6
        found = self.index.search(query, 9, where={"name": ids})[0][0]
        assert found[0] == ids[0] and sorted(found) == sorted(ids)

    def save(self):
        self.index.save_pretrained(self.folder)
        time.sleep(0.02)

    def copy(self):
        other = copy.deepcopy(self.index)
        ids = other.ids
        assert set(self.fixed) <= set(ids) and other.search(rows_of(ids), 1)[0] == [[name] for name in ids]
        time.sleep(0.02)

    def open(self):
        with contextlib.suppress(ReplacedIndexError):  # which says to open it again
            other = FromageImageIndex.from_pretrained(self.folder)
            ids = other.ids
            assert set(self.fixed) <= set(ids) and other.search(rows_of(ids), 1)[0] == [[name] for name in ids]
        time.sleep(0.02)


@pytest.mark.parametrize(("backend", "seconds"), [("flat", SECONDS), ("faiss", SECONDS / 2)])
def test_all_at_once(tmp_path, small_shards, backend, seconds):
    traffic = Traffic(tmp_path, backend)
    index = traffic.index
    index.save_pretrained(tmp_path)
    traffic.run(seconds, add=2, delete=1, search=2, filter=1, save=2, copy=1, open=1)
    ids = traffic.fixed + traffic.alive
    assert_finds_all(index, ids)
    index.save_pretrained(tmp_path)
    again = FromageImageIndex.from_pretrained(tmp_path)
    assert again.backend == backend
    for other in (again, pickle.loads(pickle.dumps(index)), copy.deepcopy(again)):  # noqa: S301
        assert_finds_all(other, ids)
    assert len(list(tmp_path.iterdir())) == -(-len(ids) // 300) + 2 + (backend == "faiss")  # nothing else is left


def test_searches_run_side_by_side_and_beside_changes(monkeypatch):
    """Each waits, in the middle of its matrix product, for the other, and for what is added and deleted meanwhile."""
    ids = [f"image {i}" for i in range(20)]
    index, inside, changed = index_of(ids), threading.Barrier(3), threading.Event()

    def slow(*args):
        inside.wait(10)
        assert changed.wait(10)
        return search_flat(*args)

    monkeypatch.setattr(flat_module, "search_flat", slow)
    with ThreadPoolExecutor(2) as pool:
        searches = [pool.submit(index.search, rows_of(ids[:3]), 4) for _ in range(2)]
        inside.wait(10)
        index.delete(ids[:3])
        index.add(rows_of(ids[:1]), ids[:1], [{"new": True}])
        changed.set()
        for search in searches:  # of what there was when they began
            found, _, metadata = search.result()
            assert [names[0] for names in found] == ids[:3] and metadata[0][0] == {"name": ids[0]}
    assert index.get(ids[0]) == {"new": True} and ids[1] not in index and len(index) == 18


def test_faiss_proposes_nothing_that_came_later(monkeypatch):
    ids, new = [f"image {i}" for i in range(9)], [f"image {i}" for i in range(9, 12)]
    index = index_of(ids, backend="faiss")

    find = FaissBackend._find

    def late(*args):
        if len(index) == len(ids):
            index.add(rows_of(new), new)
        return find(*args)

    monkeypatch.setattr(FaissBackend, "_find", late)
    found, scores, _ = index.search(rows_of(new), 9)  # the new ones would come first
    assert [sorted(names) for names in found] == [ids] * 3
    torch.testing.assert_close(
        scores, torch.stack([rows_of(names) @ row_of(n) for names, n in zip(found, new, strict=True)])
    )


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_a_save_is_of_one_moment(tmp_path, monkeypatch, small_shards, backend):
    ids = [f"image {i}" for i in range(700)]
    index, write = index_of(ids, backend=backend), writer_module.IndexWriter.add
    numbers = itertools.count(1000)

    def change(writer, *args):
        write(writer, *args)
        index.delete(index.ids[:5])
        names = [f"image {next(numbers)}" for _ in range(5)]
        index.add(rows_of(names), names, [{"name": name} for name in names])

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.IndexWriter, "add", change)
        index.save_pretrained(tmp_path)
    assert_finds_all(FromageImageIndex.from_pretrained(tmp_path), ids)
    assert_finds_all(index, [*ids[15:], *(f"image {i}" for i in range(1000, 1015))])


def test_a_save_refuses_rows_without_entries(tmp_path):
    index = index_of(["image 0", "image 1"])
    index.save_pretrained(tmp_path)
    index._store.entries.connection.execute("DELETE FROM entries WHERE position = 1")
    with pytest.raises(CorruptIndexError, match="2 embeddings from position 0 on have 1 entries"):
        index.save_pretrained(tmp_path)
    assert_finds_all(FromageImageIndex.from_pretrained(tmp_path), ["image 0", "image 1"])
    writer = writer_module.IndexWriter(tmp_path, {"dim": DIM, "dtype": "float32"})
    with pytest.raises(ValueError, match="2 embeddings, 1 ids and 1 metadata"):
        writer.add(torch.zeros(2, DIM), ["image 0"], [{}])


@pytest.mark.parametrize("added", [False, True])
def test_an_addition_that_fails_leaves_nothing(monkeypatch, added):
    ids, new = [f"image {i}" for i in range(9)], [f"image {i}" for i in range(9, 14)]
    index = index_of(ids, backend="faiss")
    add = FaissBackend.add

    def fail(backend, rows, entries):
        if added:
            add(backend, rows[:2], entries)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(FaissBackend, "add", fail)
        index.add(rows_of(new), new, [{"name": name} for name in new])
    assert_finds_all(index, ids)
    index.add(rows_of(new[::-1]), new[::-1], [{"name": name} for name in new[::-1]])
    assert_finds_all(index, ids + new)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([{}, {"when": object()}], "JSON cannot hold the metadata of image 'image 9'"),
        ([{}, ["no dict"]], "is a dict, got"),
        ([{}], "2 ids and 1 metadata"),
    ],
)
def test_bad_metadata_leaves_nothing(metadata, message):
    index = index_of(["image 0"])
    with pytest.raises(ValueError, match=message):
        index.add(rows_of(["image 8", "image 9"]), ["image 8", "image 9"], metadata)
    assert_finds_all(index, ["image 0"])


@pytest.mark.parametrize("backend", ["flat", "faiss"])
def test_copies_change_by_themselves(backend):
    ids = [f"image {i}" for i in range(5)]
    index = index_of(ids, backend=backend)
    index.add(rows_of(["image 5"]), ["image 5"], [{"name": "image 5"}])  # into a buffer that has room for more
    copies = {"image 6": copy.copy(index), "image 7": copy.deepcopy(index), "image 8": index}
    for name, one in copies.items():
        one.add(rows_of([name]), [name], [{"name": name}])
    for name, one in copies.items():
        assert_finds_all(one, [*ids, "image 5", name])


def test_pickles_hold_each_embedding_once(small_shards):
    index = index_of([f"image {i}" for i in range(1500)])
    assert len(pickle.dumps(index)) < 2 * index.embeds.nbytes


SAVE_ANEW = """
import os, sys, torch
from modeling_fromage import FromageImageIndex

index = FromageImageIndex.from_pretrained(sys.argv[1])
index.add(torch.randn(1, index.dim), ["image 100"], [{"name": "image 100"}])
index.delete(["image 0"])
index.save_pretrained(sys.argv[1])
os._exit(0)  # the libraries' own ways out can take long on a busy machine
"""


def test_a_folder_that_another_process_saves_anew(tmp_path, small_shards):
    ids = [f"image {i}" for i in range(5)]
    index_of(ids, backend="faiss").save_pretrained(tmp_path)
    opened, flat, used, half_used = (FromageImageIndex.from_pretrained(tmp_path) for _ in range(4))
    flat.use_backend("flat")  # its embeddings are mapped
    half_used.use_backend("flat")
    assert half_used.ids == ids and flat._store.now.shards[0].rows().shape == (5, DIM)
    assert_finds_all(used, ids)
    subprocess.run([sys.executable, "-c", SAVE_ANEW, str(tmp_path)], check=True, cwd=ROOT)
    assert_finds_all(used, ids)  # goes on with what it opened
    used.add(rows_of(["image 7"]), ["image 7"], [{"name": "image 7"}])
    assert_finds_all(used, [*ids, "image 7"])
    for use in (
        lambda: opened.search(rows_of(ids), 1),
        lambda: opened.embeds,
        lambda: opened.ids,
        lambda: opened.get("image 1"),
        lambda: opened.save_pretrained(tmp_path / "copy"),
        lambda: flat.search(rows_of(ids), 1),
    ):
        with pytest.raises(ReplacedIndexError, match="saved anew since it was opened. Reopen it.*from_pretrained"):
            use()
    assert sorted(FromageImageIndex.from_pretrained(tmp_path).ids) == ["image 1", "image 100", *ids[2:]]


def test_opening_while_another_saves(tmp_path, monkeypatch):
    """Between reading `index.json` and looking at the files that it lists."""
    index_of(["image 0"]).save_pretrained(tmp_path)
    check, saved = reading_module._check_size, []

    def late(folder, entry):
        if not saved:
            saved.append(index_of(["image 1"]).save_pretrained(tmp_path))
        check(folder, entry)

    monkeypatch.setattr(reading_module, "_check_size", late)
    assert_finds_all(FromageImageIndex.from_pretrained(tmp_path), ["image 1"])
