"""What the page does, without a browser: what it may show, what it saves, and what its server gives away."""

from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import gradio as gr
import pytest

from modeling_fromage import FromageImageIndex
from modeling_fromage.serving.demo import Demo, mount
from modeling_fromage.serving.engine import Engine
from tests.helpers.pipelines import COLOURS, picture
from tests.helpers.serving import serving
from tests.helpers.talking import ALWAYS, NEVER, make_talker


def last_answer(demo: Demo, message: dict, bias: float) -> list:
    return [parts for parts, _ in demo.answer(message, [], None, bias, 2, False)][-1]


def indexed_files(folder: Path, pipe) -> list[Path]:
    """The pipeline's index is one that was opened, of files in `folder`."""
    folder.mkdir()
    files = [folder / f"{name}.png" for name in COLOURS]
    for file in files:
        picture(file.stem).save(file)
    rows = [{"image": str(file), "caption": file.stem} for file in files]
    FromageImageIndex.build(pipe.model, pipe.processor, rows, show_progress=False).save_pretrained(folder.parent / "i")
    return files


def test_pictures_outside_of_the_image_root_are_never_shown(tmp_path):
    pipe, _ = make_talker()
    indexed_files(tmp_path / "images", pipe)
    (tmp_path / "elsewhere").mkdir()
    for root, is_shown in ((tmp_path / "elsewhere", False), (tmp_path / "images", True)):
        pipe.index = FromageImageIndex.from_pretrained(tmp_path / "i", image_root=root)
        (shown,) = last_answer(Demo(Engine(pipe)), {"text": "hello", "files": []}, ALWAYS)
        assert isinstance(shown, gr.Gallery) == is_shown
        assert is_shown or shown.startswith("(Pictures that cannot be read: ")


def test_no_index_and_no_words():
    pipe, _ = make_talker()
    pipe.index = None
    assert last_answer(Demo(Engine(pipe)), {"text": "hello", "files": []}, ALWAYS) == ["[RET]"]
    assert last_answer(Demo(Engine(pipe)), {"text": "", "files": []}, NEVER)[0].startswith("⚠ The prompt is empty.")
    assert Demo(Engine(pipe)).add(["a.png"], None)[0] == "There is no image index to add them to."


def test_an_index_that_is_saved_is_everybodys(tmp_path):
    pipe, _ = make_talker()
    picture("violet").save(tmp_path / "violet.png")
    demo = Demo(Engine(pipe), tmp_path / "saved")
    told, _, conversation = demo.add([str(tmp_path / "violet.png")], None)
    assert told == f"Added 1 (saved in {tmp_path / 'saved'}): violet.png."
    assert conversation.index is pipe.index and "violet.png" in pipe.index
    assert FromageImageIndex.from_pretrained(tmp_path / "saved").load_image("violet.png").size == (40, 30)
    assert demo.add([], None)[0] == "Choose pictures first."


def test_the_server_gives_no_files_away(tmp_path):
    pipe, _ = make_talker()
    (tmp_path / "secret.txt").write_text("secret")
    with serving(pipe, mount=lambda app, service: mount(Demo(service.engine).blocks(), app)) as address:
        with urlopen(address) as answer:  # noqa: S310
            assert "default-src 'self'" in answer.headers["content-security-policy"]
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{address}/gradio_api/file={tmp_path / 'secret.txt'}")  # noqa: S310


def test_an_index_that_cannot_be_copied_says_so(monkeypatch, tmp_path):
    """As one in Milvus, which others write to."""
    pipe, _ = make_talker()

    def refuse(index):
        raise ValueError("It is in Milvus. Copy its collection.")

    monkeypatch.setattr(FromageImageIndex, "__copy__", refuse)
    picture("violet").save(tmp_path / "mine.png")
    assert Demo(Engine(pipe)).add([str(tmp_path / "mine.png")], None)[0] == "⚠ It is in Milvus. Copy its collection."
