"""The table of input forms in docs/train.md: every row is loaded as it says, and refusals say what to do."""

import json
import re

import pytest
import yaml
from datasets import Dataset, Features, Image, Value

from modeling_fromage import FromageDataCollator
from modeling_fromage.io.file_patterns import expand_braces, find_files
from modeling_fromage.io.option_files import to_dataclasses
from modeling_fromage.messages_fromage import as_parts, image_source
from modeling_fromage.trainer.documents import document_of
from tests.helpers.backbones import make_processor
from tests.helpers.captioned_data import CAPTIONS, COUNT, hub_files, number_in, picture, write_all_forms, write_tar
from tests.helpers.hub import run
from tests.helpers.hub_server import hub_server
from tests.helpers.paths import ROOT
from training.arguments import DataArguments
from training.data.captioned_images import load_captioned_images
from training.data.sources import paths_of_split
from training.data.training_data import DataLoading
from training.evaluation.documents import read_documents


def table() -> dict[str, str]:
    """The lines of a training file by what they load."""
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (`(?:train_data|eval_fraction).+?) \|$", text, re.MULTILINE)
    return {form: "\n".join(re.findall("`(.+?)`", lines)) for form, lines in rows}


FORMS = table()


def loaded(lines: str) -> dict[int, str]:
    """The captions of what a training file's lines load, by the numbers of their pictures."""
    (arguments,) = to_dataclasses(yaml.safe_load(lines), (DataArguments,))
    found, evaluation = DataLoading(arguments).train_and_eval(lambda dataset, directory: dataset)
    examples = [*found, *(evaluation or [])]
    assert len(examples) == COUNT if isinstance(arguments.train_data, str) else 2 * COUNT
    return dict(map(picture_and_caption, examples))


def picture_and_caption(example: dict) -> tuple[int, str]:
    """Of a pair, or of a document of a caption and its picture."""
    document = document_of(example)
    if document is None:
        return number_in(example["image"]), example["caption"]
    parts = document["document"] if "document" in document else document["messages"][0]["content"]
    text, image, *_ = as_parts(parts)
    return number_in(image_source(image)), text["text"]


def test_the_table_is_whole():
    assert len(FORMS) >= 18
    lines = "\n".join(FORMS.values())
    for form in (".tsv", ".csv", ".jsonl", ".parquet", ".tar", "{", "*", "saved", "weight", "eval_fraction", "org/"):
        assert form in lines


@pytest.mark.parametrize("form", [form for form in FORMS if "org/" not in FORMS[form]])
def test_every_form_of_the_table_loads(form, tmp_path, monkeypatch):
    write_all_forms(tmp_path)
    monkeypatch.chdir(tmp_path)
    captions = [[caption] * 2 for caption in CAPTIONS] if "several captions" in form else CAPTIONS
    assert loaded(FORMS[form]) == dict(enumerate(captions))


def test_the_forms_on_the_hub_load(tmp_path):
    lines = [FORMS[form] for form in FORMS if "org/" in FORMS[form]]
    code = "import sys; from tests.training.test_data_forms import loaded; print([loaded(x) for x in sys.argv[1:]])"
    with hub_server() as hub:
        hub.commit("datasets/org/pairs", hub_files())
        printed = run(hub, tmp_path, "-c", code, *lines)
    assert printed.splitlines()[-1] == repr([dict(enumerate(CAPTIONS))] * len(lines))


def test_patterns(tmp_path):
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("a{b}c{}") == ["a{b}c{}"]
    for name in ("p-0.tsv", "p-1.tsv", "{0..1}.tsv"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(f"{tmp_path}/p-*.tsv")] == ["p-0.tsv", "p-1.tsv"]
    assert [path.name for path in find_files(f"{tmp_path}/{{0..1}}.tsv")] == ["{0..1}.tsv"]  # there is such a file
    with pytest.raises(ValueError, match="There is no file .*p-2.tsv"):
        find_files(f"{tmp_path}/p-{{0..2}}.tsv")


def test_refusals_say_what_to_do(tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    with pytest.raises(ValueError, match="no images.*metadata.csv"):
        load_captioned_images(str(folder))
    (folder / "a cat.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="1 images, but no captions: names of files .*metadata.csv.*NAME.txt"):
        load_captioned_images(str(folder))
    (folder / "b.png").write_bytes(picture(0))
    (folder / "b.txt").write_text("a cat")
    with pytest.raises(ValueError, match="a cat.png has no caption: there is no a cat.txt"):
        load_captioned_images(str(folder))
    kept = load_captioned_images(str(folder), keep_problems=True)
    assert kept["caption"] == [None, "a cat"] and kept["place"] == ["a cat.png", "b.png"]
    (folder / "a cat.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a cat.png has no caption: its caption is not UTF-8"):
        load_captioned_images(str(folder))
    kept = load_captioned_images(str(folder), keep_problems=True)
    assert kept[0]["image"] is None and "UTF-8" in kept[0]["problem"] and kept[1]["problem"] is None
    for name, advice in (("x.tar.gz", "Unpack it"), ("x.json", "fromage prepare")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} cannot be read in place.*{advice}"):
            load_captioned_images(str(tmp_path / name))
    table = tmp_path / "t.tsv"
    table.write_text("picture\tcaption\na\tb\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="t.tsv needs a column 'image' .*image_column"):
            load_captioned_images(str(table), streaming=streaming)
        with pytest.raises(ValueError, match="needs a column 'photo' and one 'caption'"):
            load_captioned_images(str(table), image_column="photo", streaming=streaming)
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="empty.tar has no examples"):
        load_captioned_images(str(tmp_path / "empty.tar"))


def test_rows_with_one_caption_and_with_several(tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.png", "caption": "one"}\n{"image": "b.png", "caption": ["two", "three"]}\n')
    assert load_captioned_images(str(table))["caption"] == [["one"], ["two", "three"]]
    assert load_captioned_images(str(table), streaming=True)["caption"] == ["one", ["two", "three"]]


@pytest.mark.parametrize("name", ["pages.jsonl", "obelics.jsonl", "mmc4.jsonl", "chats.parquet"])
def test_documents_are_trained_on_from_a_file(name, tmp_path):
    write_all_forms(tmp_path)
    for streaming, keep in ((False, False), (True, True)):
        dataset = load_captioned_images(str(tmp_path / name), streaming=streaming, keep_problems=keep)
        batch = FromageDataCollator(make_processor())([dataset[number] for number in range(COUNT)])
        assert len(batch["pixel_values"]) == COUNT
        assert (batch["ret_targets"] >= 0).sum() == (0 if "chats" in name else COUNT)  # a user shows images
    with pytest.raises(ValueError, match="there are documents in the data.*without `feature_cache`"):
        (arguments,) = to_dataclasses({"train_data": str(tmp_path / name), "feature_cache": "x"}, (DataArguments,))
        DataLoading(arguments).train_and_eval(lambda dataset, directory: dataset)


def test_saved_documents_stay_encoded(tmp_path):
    """So that one broken picture is one bad example, and copies are known by their bytes."""
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    rows = [
        [{"type": "text", "text": f"number {n}", "image": None},
         {"type": "image", "text": None, "image": {"bytes": picture(n) if n else b"broken", "path": None}}]
        for n in range(COUNT)
    ]  # fmt: skip
    Dataset.from_dict({"document": rows}, features=Features({"document": [part]})).save_to_disk(tmp_path / "saved")
    dataset = load_captioned_images(str(tmp_path / "saved"), keep_problems=True)
    collator = FromageDataCollator(make_processor())
    for number in range(COUNT):
        assert dataset[number]["document"][1]["image"]["bytes"] == (picture(number) if number else b"broken")
    with pytest.raises(ValueError, match="image"):
        collator.prepare(dataset[0])
    assert len(collator([dataset[1], dataset[2]])["pixel_values"]) == 2
    copies = read_documents(str(tmp_path / "saved"), make_processor())
    assert len(copies.sources) == COUNT and all(isinstance(source, dict) for source in copies.sources.values())


@pytest.mark.parametrize("place", [2, -1, "1", None])
def test_an_image_that_mmc4_gives_no_place_makes_a_bad_document(place, tmp_path):
    images = [{"image_name": "a.png", "matched_text_index": 0}, {"image_name": "a.png", "matched_text_index": place}]
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "mmc4.jsonl").write_text(json.dumps({"text_list": ["one", "two"], "image_info": images}) + "\n")
    dataset = load_captioned_images(str(tmp_path / "mmc4.jsonl"))
    with pytest.raises(ValueError, match="malformed document"):
        FromageDataCollator(make_processor()).prepare(dataset[0])


def test_documents_with_errors_in_them(tmp_path):
    rows = [
        {"document": ["one", {"type": "image", "image": "a.png"}]},
        {"document": "no list"},
        {"document": None},
        {"images": ["a.png"], "texts": ["two"]},
    ]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "a.png").write_bytes(picture(0))
    dataset = load_captioned_images(str(tmp_path / "pages.jsonl"), keep_problems=True)
    collator = FromageDataCollator(make_processor())
    collator.prepare(dataset[0])
    for number, words in ((1, "malformed document"), (2, "malformed document"), (3, "malformed"), (4, "malformed row")):
        with pytest.raises(ValueError, match=words):
            collator.prepare(dataset[number])
    strict = load_captioned_images(str(tmp_path / "pages.jsonl"))
    with pytest.raises(ValueError, match="line 5: not JSON"):
        strict[4]


def write_split(folder, form: str, split: str) -> None:
    """One example whose caption is the split's name."""
    if form == "tars":
        write_tar(folder / f"cc3m-{split}-0000.tar", [("a.png", picture(0)), ("a.txt", split.encode())])
        return
    (folder / split).mkdir()
    (folder / split / "a.png").write_bytes(picture(0))
    if form == "metadata":
        (folder / split / "metadata.csv").write_text(f"file_name,caption\na.png,{split}\n")
    else:
        (folder / split / "a.txt").write_text(split)


@pytest.mark.parametrize("form", ["tars", "metadata", "texts"])
@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"keep_problems": True}])
def test_a_split_is_never_another(form, options, tmp_path):
    def captions(split: str) -> list[str]:
        return [row["caption"] for row in load_captioned_images(str(tmp_path), split, **options)]

    for split in ("train", "validation"):
        write_split(tmp_path, form, split)
        assert captions(split) == [split]
    with pytest.raises(ValueError, match="test"):
        captions("test")
    with pytest.raises(ValueError, match="extra"):
        captions("extra")


def test_splits_by_other_words(tmp_path):
    def of(split: str, *names: str, by_name: bool = True) -> list[str]:
        files = [tmp_path / name for name in names]
        return [str(file.relative_to(tmp_path)) for file in paths_of_split(tmp_path, files, split, by_name)]

    assert of("train", "0.tar", "restraint.tar", "latest-0.tar") == ["0.tar", "restraint.tar", "latest-0.tar"]
    assert of("validation", "Train-0.tar", "val2014/train.tar", "x_dev_0.tar") == ["val2014/train.tar", "x_dev_0.tar"]
    assert of("my-split", "my-split-0.tar", "train-0.tar") == ["my-split-0.tar"]
    assert of("train", "a/dev.png", "b/1.png", by_name=False) == ["a/dev.png", "b/1.png"]  # pictures may be of anything
    with pytest.raises(ValueError, match="no files of split 'train'.*it has validation"):
        of("train", "val-0.tar", "0.tar")
    with pytest.raises(ValueError, match="no splits: all of it is the split train"):
        of("validation", "0.tar")
