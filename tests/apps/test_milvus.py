"""Indexes in Milvus: real collections of Milvus Lite, compared with exact search on this machine."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_scripts import build_image_index
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageImageIndex
from modeling_fromage.index import milvus_store, saving
from modeling_fromage.index.backends.milvus import MilvusCollection, MilvusIndexError, MilvusOptions
from modeling_fromage.index.folder import CorruptIndexError
from tests.helpers import pages
from tests.helpers.backbones import make_model
from tests.helpers.indexes import (
    DIM,
    WHERES,
    Entry,
    Killed,
    assert_searches,
    columns,
    contents,
    index_of,
    make_entries,
    picture,
    write_pictures,
)


@pytest.fixture(scope="module")
def model():
    return make_model("opt_clip")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A file of Milvus Lite that tests share, each with collections of its own."""
    return str(tmp_path_factory.mktemp("milvus") / "images.db")


@pytest.fixture
def place(database, request):
    """Options of a collection that is not there yet."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return {"uri": database, "collection": name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_searches_as_flat_search_does(place, dtype, monkeypatch):
    monkeypatch.setattr(milvus_store, "_ROWS_AT_A_TIME", 70)
    monkeypatch.setattr(milvus_store, "_ANSWER_BYTES", 4 * DIM * 18 * 2)  # two queries at a time
    entries, queries = make_entries(300, distinct=250), torch.randn(5, DIM)
    index = index_of(entries[:250], dtype=dtype).use_backend("milvus", **place)
    assert index.backend == "milvus" and index.dtype == dtype
    index.add(*columns(entries[250:]))
    assert_searches(index, entries, queries, 10)
    best = index.search(queries, 40).ids
    assert_searches(index, entries, queries, 10, exclude_ids=best)
    assert_searches(index, entries, queries, 10, exclude_ids=best[0], where=WHERES[1])
    deleted = {name for names in best for name in names}
    index.delete(list(deleted))
    entries = [entry for entry in entries if entry.id not in deleted]
    changed = entries[7]._replace(row=queries[0], facts={"kind": "new"})
    index.update(changed.id, changed.facts, changed.row[None])
    entries = [*entries[:7], *entries[8:], changed]  # it moves to the end
    assert_searches(index, entries, queries, 10)
    assert_searches(index, entries, queries, 3, where={"kind": "new"})
    flat = index_of(entries, dtype=dtype)
    assert contents(index.use_backend("flat")) == contents(flat) and index.backend == "flat"


@pytest.mark.parametrize("where", WHERES)
def test_filters(place, where):
    entries = make_entries(60)
    index = index_of(entries).use_backend("milvus", **place)
    assert_searches(index, entries, torch.randn(3, DIM), 60, where=where)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**53, 2**53 + 1, 2.0**53, 2**63 - 1, -(2**63), 2.0**63, 0.1, -0.0, 1e300]),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.sampled_from(['["a"]', "1", "true", 'say "x"', "\\"]))
FACTS = st.one_of(SCALARS, st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=3),
                  st.dictionaries(TEXT, SCALARS, max_size=2))  # fmt: skip
NAMES = st.sampled_from(["a", 'a "quoted" name', "$.path", "", "b]["])
WANTED = st.one_of(SCALARS, st.lists(st.one_of(SCALARS, st.sampled_from([2**63, 2**64, 2**2000])), max_size=4))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(NAMES, FACTS, max_size=4), min_size=1, max_size=12),
       st.lists(st.dictionaries(NAMES, WANTED, min_size=1, max_size=2), min_size=1, max_size=5))  # fmt: skip
def test_any_filter_finds_what_it_finds_elsewhere(place, metadata, wheres):
    collection = MilvusCollection(MilvusOptions.of(place))
    if collection.exists():
        collection.drop()
    flat = FromageImageIndex(torch.randn(len(metadata), DIM), [f"{i}" for i in range(len(metadata))], metadata)
    index = copy.copy(flat).use_backend("milvus", **place)
    assert index.metadata == metadata
    for where in wheres:
        found, expected = (each.search(torch.ones(2, DIM), 12, where=where) for each in (index, flat))
        assert found.ids == expected.ids and found.metadata == expected.metadata
        assert torch.equal(found.scores, expected.scores)


def test_what_is_in_it(place):
    names = ["a", 'it\'s "b" \\', "c\n\u00e9\0", "d"]
    index = FromageImageIndex(torch.eye(4, DIM), names, [{"n": n} for n in range(4)], backend="milvus", **place)
    assert index.ids == names and index.metadata == [{"n": n} for n in range(4)] and len(index) == 4
    assert torch.equal(index.embeds, torch.eye(4, DIM)) and index.get(names[1]) == {"n": 1}
    assert names[2] in index and "e" not in index and [] not in index
    assert [entry.id for entry in index] == names
    assert index.search(torch.eye(4, DIM)[1:2], 1, exclude_ids=[names[2]]).ids == [[names[1]]]
    for call, error, message in (
        (lambda: index.get("e"), KeyError, "no image 'e'"),
        (lambda: index.delete(["a", "e"]), KeyError, r"no images \['e'\]; nothing was removed"),
        (lambda: index.update(["a", "e"], [{}, {}]), KeyError, "nothing was updated"),
        (lambda: index.add(torch.eye(2, DIM), ["f", "a"]), ValueError, "unique"),
        (lambda: index.add(torch.eye(2, DIM), ["f", "f"]), ValueError, "unique"),
        (lambda: index.add(torch.eye(2, DIM), ["f", "g"], [{}, {"n": 2**70}]), ValueError, "64 bits"),
        (lambda: index.add(torch.eye(2, DIM), ["f", "g"], [{}, {"n": ["\udce9"]}]), ValueError, "no Unicode"),
        (lambda: index.add(torch.eye(1, DIM), ["f"], [{"n": "x" * 70_000}]), ValueError, "65,535 bytes"),
        (lambda: index.add(torch.eye(1, DIM), ["f"], [{"n": list(range(5000))}]), ValueError, "4,096 values"),
        (lambda: index.search(torch.eye(1, DIM), 5), ValueError, r"has 4 images to choose from \(of 4\)"),
        (lambda: index.search(torch.eye(1, DIM), 3, exclude_ids=["a", "d", "x"]), ValueError, "has 2 images"),
        (lambda: index.search(torch.eye(1, DIM), 0), ValueError, "16,384"),
        (lambda: index.search(torch.eye(1, DIM), 1, where={"n": {"b": 1}}), ValueError, "compares texts"),
        (lambda: index.to("cuda"), ValueError, "not on cuda"),
        (lambda: copy.copy(index), ValueError, "is not copied"),
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match="64 bits"):
        FromageImageIndex(torch.eye(1, DIM), ["a"], [{"n": 2**70}], backend="milvus", **place | {"collection": "other"})
    for name in ("other", "other_unfinished"):
        assert not MilvusCollection(MilvusOptions.of(place | {"collection": name})).exists()
    assert index.ids == names
    index.delete("a")
    assert index.ids == names[1:] and len(index) == 3
    assert pickle.loads(pickle.dumps(index)).ids == names[1:]
    assert index.search(torch.empty(0, DIM), 1).ids == []


def test_an_addition_that_fails_leaves_nothing(place, monkeypatch):
    entries = make_entries(40)
    index = index_of(entries[:10], backend="milvus", **place)
    before = contents(index)
    monkeypatch.setattr("modeling_fromage.index.backends.milvus._BATCH_BYTES", 1000)
    put, calls = MilvusCollection._put, []

    def fails(self, batch, done, replace):
        put(self, batch, done, replace)
        calls.append(len(batch))
        if len(calls) == 3:
            raise Killed

    monkeypatch.setattr(MilvusCollection, "_put", fails)
    with pytest.raises(Killed):
        index.add(*columns(entries[10:]))
    assert contents(index) == before and len(index) == 10
    calls.clear()
    with pytest.raises(Killed):
        index.update([entry.id for entry in entries[:10]], embeds=torch.randn(10, DIM))
    assert contents(index) == before
    monkeypatch.undo()
    index.add(*columns(entries[10:]))
    assert index.ids == [entry.id for entry in entries]


def test_the_folder_is_a_header_alone(tmp_path, monkeypatch):
    entries, queries = make_entries(50), torch.randn(3, DIM)
    folder, options = tmp_path / "index", {"uri": str(tmp_path / "index" / "images.db"), "collection": "pictures"}
    index = index_of(entries, model_fingerprint="m")
    index.image_root = tmp_path
    index.save_pretrained(folder)
    expected = index.search(queries, 5).ids
    index.use_backend("milvus", token="secret", **options).save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["images.db", "index.json"]
    text = (folder / "index.json").read_text()
    state = json.loads(text)
    assert "secret" not in text and b"secret" not in pickle.dumps(index)
    assert (state["model"], state["dim"], state["format"]) == ("m", DIM, 2)
    assert state["milvus"] == {"uri": "images.db", "collection": "pictures", "index_type": "FLAT", "index_params": {},
                               "search_params": {}}  # fmt: skip
    opened = FromageImageIndex.from_pretrained(folder)
    assert (opened.backend, opened.model_fingerprint, opened.dtype) == ("milvus", "m", torch.float32)
    assert opened.search(queries, 5).ids == expected
    opened.add(torch.randn(1, DIM), ["later"])  # the collection is the truth
    assert "later" in FromageImageIndex.from_pretrained(folder) and "later" in index
    merged = FromageImageIndex.merge([folder, index_of(make_entries(2, name="other"), model_fingerprint="m")])
    assert merged.backend == "flat" and len(merged) == 53
    opened.use_backend("flat").save_pretrained(folder)
    assert "images.db" in {path.name for path in folder.iterdir()}  # it is not ours to remove
    assert len(FromageImageIndex.from_pretrained(folder)) == 51


def test_headers_that_are_refused(tmp_path, monkeypatch):
    options = {"uri": str(tmp_path / "images.db"), "collection": "pictures"}
    index_of(make_entries(5), backend="milvus", **options).save_pretrained(tmp_path)
    text = (tmp_path / "index.json").read_text()

    def opened_with(**changes):
        state = json.loads(text)
        state["milvus"].update({name: value for name, value in changes.items() if name != "dim"})
        (tmp_path / "index.json").write_text(json.dumps({**state, **{"dim": changes.get("dim", DIM)}}))
        return FromageImageIndex.from_pretrained(tmp_path)

    for changes, error, message in (
        ({"collection": "nothing"}, MilvusIndexError, "no such collection"),
        ({"uri": "nothing.db"}, MilvusIndexError, "no such file"),
        ({"dim": 7}, MilvusIndexError, "embeddings of width 16, not 7"),
        ({"uri": "ftp://x"}, CorruptIndexError, "http"),
        ({"uri": "http://me:secret@host:1"}, CorruptIndexError, "no password"),
        ({"uri": 3}, CorruptIndexError, "uri is .3"),
        ({"index_type": "DISKANN"}, CorruptIndexError, "Milvus Lite has the index types"),
        ({"other": 1}, CorruptIndexError, "takes the options"),
    ):
        with pytest.raises(error, match=message):
            opened_with(**changes)
    assert not (tmp_path / "nothing.db").exists()
    asked = []
    monkeypatch.setattr(milvus_store, "MilvusCollection", lambda options: asked.append(options) or pytest.skip)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    monkeypatch.setenv("MILVUS_URI", "http://mine:19530")
    for uri in ("http://mine:19530", "http://theirs:19530"):
        with pytest.raises(AttributeError):
            opened_with(uri=uri)
    assert [options.token for options in asked] == ["secret", None]


def test_vectors_that_are_none_are_refused(place):
    index = index_of(make_entries(5), backend="milvus", **place)
    collection = MilvusCollection(MilvusOptions.of(place))
    row = collection.rows(["x" * 32], ["id"])
    assert row == {}
    entry = Entry("long", torch.ones(DIM), {})
    [made] = index._store._new_rows(entry.row[None], [(entry.id, "{}")])
    collection.put([made], [])
    with pytest.raises(MilvusIndexError, match="not of unit norm"):
        index.search(torch.ones(1, DIM), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs `uri`"),
        ({"uri": "here"}, r"a file whose name ends in \.db"),
        ({"uri": "x.db", "nprobe": 3}, r"takes the options \['uri', 'collection'.*got \['nprobe'\]"),
        ({"uri": "x.db", "index_type": "IVF_PQ"}, "has the index types"),
        ({"uri": "http://me:word@host"}, "may hold no password"),
        ({"uri": "x.db", "index_params": 3}, "`index_params` is a"),
        ({"uri": "x.db", "search_params": {"nprobe": 3}}, r"`search_params` of FLAT are \[\], got \['nprobe'\]"),
        (
            {"uri": "x.db", "index_type": "IVF_FLAT", "index_params": {"nlists": 3}},
            r"are \['nlist'\], got \['nlists'\]",
        ),
        ({"uri": "x.db", "index_type": "HNSW", "search_params": {"ef": 0}}, "`ef` of HNSW is a whole number"),
    ],
)
def test_refused_options(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = index_of(make_entries(3))
    with pytest.raises(ValueError, match=message):
        index.use_backend("milvus", **options)
    assert index.backend == "flat" and not list(tmp_path.iterdir())


def test_no_server():
    with pytest.raises(MilvusIndexError, match="127.0.0.1:9, collection 'fromage'.*is the server there"):
        index_of(make_entries(3)).use_backend("milvus", uri="http://127.0.0.1:9", token="secret")


def test_images_go_along_as_paths(tmp_path, model, processor, place):
    write_pictures(tmp_path / "photos", "a.png", "broken.png", "b.png")
    build = {"images": tmp_path / "photos", "save_directory": tmp_path / "index", "show_progress": False}
    index = FromageImageIndex.build(model, processor, **build, backend="milvus", **place)
    index.image_root = tmp_path / "photos"
    assert index.load_image("a.png").tobytes() == picture(0).tobytes()
    assert [row["id"] for row in index.skipped] == ["broken.png"]
    opened = FromageImageIndex.from_pretrained(tmp_path / "index", image_root=tmp_path / "photos")
    assert opened.load_image("b.png").tobytes() == picture(2).tobytes() and opened.skipped == index.skipped
    opened.check_model(model)
    again = FromageImageIndex.build(model, processor, **build, backend="milvus", **place)  # opens it
    assert again.backend == "milvus" and again.ids == ["a.png", "b.png"]
    dataset = opened.to_dataset()
    assert [row.tobytes() for row in dataset["image"]] == [picture(0).tobytes(), picture(2).tobytes()]
    write_pictures(tmp_path / "more", "c.png")
    again.add_images(model, processor, tmp_path / "more", show_progress=False)
    assert again.load_image("c.png").size == (9, 8)
    with pytest.raises(ValueError, match="keeps 1 images themselves"):
        again.add_images(model, processor, [picture(5)], ids=["memory"], show_progress=False)
    with pytest.raises(ValueError, match="There is a collection"):
        FromageImageIndex(torch.eye(1, DIM), ["a"]).use_backend("milvus", **place)


@pytest.mark.parametrize(
    ("kind", "built", "few", "many"),
    [
        ("HNSW", {"M": 4, "efConstruction": 20}, {"ef": 10}, {"ef": 400}),
        ("IVF_FLAT", {"nlist": 16}, {"nprobe": 2}, {"nprobe": 16}),
        ("IVF_SQ8", {"nlist": 16}, {"nprobe": 2}, {"nprobe": 16}),
    ],
)
def test_approximate_indexes(place, tmp_path, kind, built, few, many):
    entries, queries = make_entries(2000), torch.randn(20, DIM)
    index = index_of(entries)
    exact = index.search(queries, 10).ids
    index.use_backend("milvus", **place, index_type=kind, index_params=built, search_params=few)

    def recall() -> float:
        return sum(len({*a} & {*b}) for a, b in zip(index.search(queries, 10).ids, exact, strict=True)) / 200

    low = recall()
    index.set_search_options(**many)
    assert low < recall() and recall() > 0.9
    with pytest.raises(ValueError, match="`search_params` of"):
        index.set_search_options(probes=3)
    index.save_pretrained(tmp_path)
    assert FromageImageIndex.from_pretrained(tmp_path)._store.options.search_params == many


def test_what_an_approximate_index_does_not_find(place):
    index = index_of(make_entries(2000))
    index.use_backend("milvus", **place, index_type="IVF_FLAT", index_params={"nlist": 64}, search_params={"nprobe": 1})
    with pytest.raises(ValueError, match="IVF_FLAT index found .* of 900 images.*nprobe"):
        index.search(torch.randn(1, DIM), 900)


def test_threads(place):
    entries = make_entries(100)
    index, errors = index_of(entries[:20]), []

    def run(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    works = [lambda: index.use_backend("milvus", **place)]
    works += [lambda n=n: index.add(*columns(entries[n : n + 10])) for n in range(20, 100, 10)]
    works += [lambda: [index.search(torch.randn(2, DIM), 5) for _ in range(10)]] * 2
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and index.backend == "milvus"
    assert sorted(index.ids) == sorted(entry.id for entry in entries)  # none went to the store that was left


def test_an_unfinished_move_is_made_anew(place, monkeypatch, caplog):
    entries = make_entries(30)
    index = index_of(entries)
    monkeypatch.setattr("modeling_fromage.index.stores.finish", lambda store: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.use_backend("milvus", **place)
    assert index.backend == "flat" and not MilvusCollection(MilvusOptions.of(place)).exists()
    monkeypatch.undo()
    assert index.use_backend("milvus", **place).ids == [entry.id for entry in entries]
    assert "made anew" in caplog.text


def test_a_move_that_was_killed_before_its_folder_was_written(place):
    """The error says what to do, and that works."""
    entries = make_entries(5)
    index_of(entries).use_backend("milvus", **place)  # of which nobody knows any more
    with pytest.raises(ValueError, match="There is a collection .* drop it: pymilvus.MilvusClient") as error:
        index_of(entries).use_backend("milvus", **place)
    exec("import pymilvus; " + str(error.value).partition("drop it: ")[2])  # noqa: S102
    assert index_of(entries).use_backend("milvus", **place).ids == [entry.id for entry in entries]


ADDING = """
import sys, torch
from modeling_fromage import FromageImageIndex
index = FromageImageIndex(torch.randn(3, 16), ["a", "b", "c"], backend="milvus", uri=sys.argv[1] + "/images.db")
index.save_pretrained(sys.argv[1])
for number in range(10_000):
    index.add(torch.randn(5, 16), [f"{number} {part}" for part in range(5)])
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    folder, acknowledged = tmp_path / "index", {"a", "b", "c"}
    with subprocess.Popen([sys.executable, "-c", ADDING, str(folder)], stdout=subprocess.PIPE) as process:
        for line in process.stdout or ():
            acknowledged |= {f"{int(line)} {part}" for part in range(5)}
            if int(line) >= 20:
                process.kill()
                break
    index = FromageImageIndex.from_pretrained(folder)
    assert acknowledged <= set(index.ids) and len(index) == len(index.ids) >= 108
    assert len(index.search(torch.randn(1, 16), len(acknowledged)).ids[0]) == len(acknowledged)


def test_the_contents_are_published_and_not_the_header(tmp_path, monkeypatch, place):
    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, *args, **kwargs):
            pass

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / "hub", dirs_exist_ok=True)
            return SimpleNamespace(commit_url="done")

    monkeypatch.setattr(saving, "HfApi", Api)
    monkeypatch.setattr(saving, "snapshot_download", lambda *args, **kwargs: str(tmp_path / "hub"))
    index = index_of(make_entries(20), backend="milvus", **place)
    assert index.push_to_hub("org/pictures") == "done"
    published = FromageImageIndex.from_pretrained("org/pictures")
    assert published.backend == "flat" and contents(published) == contents(index)
    index.save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match="names a collection of Milvus at .*images.db"):
        FromageImageIndex.from_pretrained("org/pictures")


def test_the_page_and_the_command(tmp_path, monkeypatch, capsys):
    """docs/milvus.md, on pictures of ours; its command with a file in the place of a server."""
    monkeypatch.chdir(tmp_path)
    model = make_tiny_checkpoint(tmp_path / "org")
    write_pictures(tmp_path / "photos", *(f"{letter}.png" for letter in "abcdef"))
    command = [str(model), "photos", "photos-index", "--device", "cpu"]
    build_image_index.main(command)
    scope = {}
    exec(compile("\n".join(pages.blocks("docs/milvus.md", "python")), "milvus.md", "exec"), scope)  # noqa: S102
    assert (
        len(scope["index"]) == 6
        and scope["ids"][0][0] == scope["index"].ids[0]
        and scope["index"].load_image("b.png").size
    )
    assert [path.name for path in (tmp_path / "photos-in-milvus").iterdir()] == ["index.json"]
    for _ in range(2):  # the second time it is there
        build_image_index.main([*command, "--milvus", "milvus/images.db", "--collection", "by_command"])
        assert "6 images, 16 dimensions, torch.float16, milvus" in capsys.readouterr().out
    assert sorted(FromageImageIndex.from_pretrained("photos-index").ids) == [f"{letter}.png" for letter in "abcdef"]
    with pytest.raises(SystemExit):
        build_image_index.main([str(model), "photos-index", "merged", "--merge", "--milvus", "http://127.0.0.1:9"])
    assert "error: Milvus at http://127.0.0.1:9" in capsys.readouterr().err


def test_an_index_of_nothing(place):
    index = FromageImageIndex(torch.empty(0, DIM), [], backend="milvus", **place)
    assert len(index) == 0 and index.ids == [] and index.embeds.shape == (0, DIM)
    assert index.search(torch.eye(1, DIM), 1, where={"a": 1}).ids == [[]]
    with pytest.raises(ValueError, match="has 0 images"):
        index.search(torch.eye(1, DIM), 1)
    index.add(torch.eye(2, DIM), ["a", "b"])
    assert index.search(torch.eye(1, DIM), 1).ids == [["a"]]
