"""HTML pages as documents: reading order, what is left out, and which side a picture is on."""

import json

import pytest
from PIL import Image

from modeling_fromage import FromageDataCollator
from tests.helpers.backbones import make_processor
from training.data.captioned_images import load_captioned_images
from training.manual_pages import main

PAGE = """<html><head><title>Not this</title><style>p {}</style></head><body>
<div class="navheader"><p>Back</p><img src="nav.png"/></div>
<h1>{title} &amp; more</h1><p>Some
  text <b>in bold</b>.<p>Unclosed <img src="{picture}" alt="x"> after it
<img src="icon.png"><img src="missing.png"><img src="everywhere.png"><script>var x = "<p>no</p>"</script>
<ul><li>One</li><li>Two</li></ul><div class="navfooter"><p>Next</p></div></body></html>"""


@pytest.fixture
def manual(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    for number in range(40):
        name = f"{number // 2 if number < 4 else number}.png"  # the first pages share pictures, two each
        Image.new("RGB", (80, 80), (number, 0, 0) if number != 1 else (0, 0, 0)).save(folder / name)
        (folder / f"page{number}.html").write_text(PAGE.replace("{title}", f"T{number}").replace("{picture}", name))
    Image.new("RGB", (16, 80)).save(folder / "icon.png")
    Image.new("RGB", (90, 90)).save(folder / "everywhere.png")
    Image.new("RGB", (91, 91)).save(folder / "nav.png")
    (folder / "text.html").write_text("<p>No picture</p>")
    (folder / "begins.html").write_text('<img src="9.png"><p>A picture that nothing precedes</p>')
    return folder


def test_pages_become_documents(manual, tmp_path, capsys):
    main([str(manual), str(tmp_path / "pages")])
    sides = {name: [json.loads(line)["document"] for line in (tmp_path / "pages" / f"{name}.jsonl").open()]
             for name in ("train", "test")}  # fmt: skip
    assert sum(map(len, sides.values())) == 40 and 3 <= len(sides["test"]) <= 20
    assert f"train: {len(sides['train'])} pages" in capsys.readouterr().out
    for documents in sides.values():
        for document in documents:
            text = "".join(part.get("text", "<image>\n") for part in document)
            number = text.partition(" ")[0].removeprefix("T")
            assert text == f"T{number} & more\nSome text in bold.\nUnclosed\n<image>\nafter it\nOne\nTwo\n"
    shown = {name: {part["image"] for document in own for part in document if part["type"] == "image"}
             for name, own in sides.items()}  # fmt: skip
    assert not shown["train"] & shown["test"]
    dataset = load_captioned_images(str(tmp_path / "pages" / "train.jsonl"))
    assert "ret_targets" in FromageDataCollator(make_processor())([dataset[0]])


def test_long_pages_are_cut_between_parts(manual, tmp_path):
    paragraphs = "".join(f"<p>{'word ' * 40}{n}</p><img src='{n}.png'/>" for n in range(10, 20))
    for page in manual.glob("*.html"):
        page.unlink()
    (manual / "long.html").write_text(paragraphs)
    main([str(manual), str(tmp_path / "pages"), "--max-characters", "700"])
    lines = [(tmp_path / "pages" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    documents = [json.loads(line)["document"] for line in lines[0] or lines[1]]
    assert len(documents) == (4 if lines[0] else 1)
    assert sum(part["type"] == "image" for document in documents for part in document) == 10


def test_a_folder_without_pictures_is_refused(tmp_path, capsys):
    (tmp_path / "a.html").write_text("<p>text</p>")
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "out")])
    assert "no HTML pages with pictures" in capsys.readouterr().err
