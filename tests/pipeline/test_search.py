"""The pipeline's index: any object with `search`; `pipe.index` and `pipe.search`; and strangers without the package."""

import os
import subprocess
import sys

import pytest
import torch

from modeling_fromage import FromageImageIndex, FromagePipeline
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.pipelines import COLOURS, RET, kinds, picture, plain, scripted


@pytest.fixture(scope="module")
def index():
    model, processor = make_model("opt_clip"), make_processor()
    metadata = [{"warm": colour in ("red", "orange")} for colour in COLOURS]
    images = [picture(colour) for colour in COLOURS]
    return FromageImageIndex.build(model, processor, images, COLOURS, metadata, show_progress=False)


@pytest.fixture
def pipe(index):
    return FromagePipeline(model=make_model("opt_clip"), processor=make_processor(), index=index, max_new_tokens=4)


def ids(hits):
    return [hit["id"] for hit in hits]


# ---- searching ----


@pytest.mark.parametrize("prompt", ["a red square", "a red square[RET]", ["a red", " square"]])
def test_search_is_the_indexs_own(pipe, index, prompt):
    inputs = pipe.processor(text="a red square[RET]", return_tensors="pt")
    expected, scores, metadata = index.search(pipe.model.get_text_embeds(**inputs), 3)
    hits = pipe.search(prompt, top_k=3)
    assert ids(hits) == expected[0] and [hit["metadata"] for hit in hits] == metadata[0]
    assert [hit["score"] for hit in hits] == pytest.approx(scores[0].tolist(), abs=1e-5)
    assert all(hit["type"] == "image" and hit["image"].size == (40, 30) for hit in hits)


def test_search_with_images_and_filters(pipe, index):
    prompt = [picture("blue"), "in winter"]
    inputs = pipe.processor(text="<|image|>in winter[RET]", images=[picture("blue")], return_tensors="pt")
    expected = index.search(pipe.model.get_text_embeds(**inputs), len(COLOURS))[0][0]
    hits = pipe.search(prompt, top_k=len(COLOURS), load_images=False)
    assert ids(hits) == expected and all(hit["image"] is None for hit in hits)
    assert ids(pipe.search(prompt, 2, exclude_ids=expected[0])) == expected[1:3]
    warm = [colour for colour in expected if colour in ("red", "orange")]
    assert ids(pipe.search(prompt, 5, where={"warm": True})) == warm
    assert ids(pipe.search(prompt, 99, exclude_ids=expected[:3])) == expected[3:]  # no more are left


def test_search_of_an_image_alone_is_no_request_for_a_caption(pipe):
    pipe.processor.set_caption_format(caption_prefix="A picture of")
    inputs = pipe.processor(text="<|image|>[RET]", images=[picture("red")], return_tensors="pt")
    expected = pipe.index.search(pipe.model.get_text_embeds(**inputs))[0][0]
    assert ids(pipe.search(picture("red"))) == expected


def test_an_unreadable_hit_keeps_its_rank(pipe, tmp_path):
    for colour in COLOURS:
        picture(colour).save(tmp_path / f"{colour}.png")
    pipe.index = FromageImageIndex.build(pipe.model, pipe.processor, tmp_path, show_progress=False)
    before = ids(pipe.search("x", top_k=3))
    (tmp_path / before[0]).unlink()
    hits = pipe.search("x", top_k=3)
    assert ids(hits) == before and [hit["image"] is None for hit in hits] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prompt": "x", "top_k": 0}, "`top_k` must be at least 1, got 0"), ({"prompt": ""}, "empty")],
)
def test_bad_searches(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.search(**options)


# ---- the index ----


def test_index_can_be_set_later(pipe, index, tmp_path):
    bare = FromagePipeline(model=pipe.model, processor=pipe.processor)
    assert bare.index is None
    with pytest.raises(ValueError, match="no index to search.*pipe.index"):
        bare.search("x")
    expected = plain(pipe(["x"], **scripted([RET])))
    bare.index = index
    assert bare.index is index and plain(bare(["x"], **scripted([RET]))) == expected
    index.save_pretrained(tmp_path / "index")
    bare.index = tmp_path / "index"
    assert plain(bare(["x"], **scripted([RET]))) == expected
    bare.index = None
    assert bare(["x"], **scripted([RET])) == [{"type": "text", "text": "[RET]"}]


class Shelf:
    """An index of somebody else's: it has `search` alone."""

    def __init__(self, embeds, ids):
        self.embeds, self.ids = embeds, ids

    def search(self, embeds, top_k=1, exclude_ids=None, where=None):
        rows = []
        for query, excluded in zip(embeds, exclude_ids, strict=True):
            order = (self.embeds @ query).argsort(descending=True).tolist()
            rows.append([i for i in order if self.ids[i] not in excluded][:top_k])
        width = max(map(len, rows))
        scores = [[float(self.embeds[i] @ query) for i in row] for row, query in zip(rows, embeds, strict=True)]
        scores = torch.tensor([row + [-torch.inf] * (width - len(row)) for row in scores])
        return [[self.ids[i] for i in row] for row in rows], scores, [[{} for _ in row] for row in rows]


class Library(Shelf):
    def load_image(self, image_id, limits):
        if image_id == "red":
            raise ValueError("red is lent")
        return picture(image_id)


def test_any_object_with_search_is_an_index(pipe, index, caplog):
    expected = ids(pipe.search("x", top_k=len(COLOURS)))
    shelf, library = (kind(index.embeds, COLOURS) for kind in (Shelf, Library))
    pipe.index = shelf
    assert ids(pipe.search("x", top_k=99, load_images=False)) == expected
    assert pipe(["x"], load_images=False, **scripted([RET]))[0]["id"] == expected[0]
    with pytest.raises(ValueError, match="no method `load_image`.*load_images=False"):
        pipe.search("x")
    pipe.index = library
    answer = pipe(["x"], images_per_ret=len(COLOURS), **scripted([RET]))
    assert kinds(answer) == ["image"] * len(COLOURS) and sorted(ids(answer)) == sorted(COLOURS)
    assert [segment["id"] for segment in answer if segment["image"] is None] == ["red"]
    assert "red is lent" in caplog.text
    pipe.index = {"red": picture("red")}
    with pytest.raises(ValueError, match="`index` must have a method `search`"):
        pipe.search("x")


# ---- where the package is not installed ----

STRANGER = """
import sys
sys.modules["modeling_fromage"] = None  # not installed here
from PIL import Image
from transformers import pipeline

folder = sys.argv[1]
pipe = pipeline(model=folder, trust_remote_code=True)
print(pipe(Image.new("RGB", (40, 30), "red"), max_new_tokens=4, max_num_rets=0)[0]["text"])
for options in ({"inputs": "x", "index": "org/index"}, {"inputs": [{"type": "image", "url": "https://example.com/a.png"}]}):
    try:
        pipe(**options)
    except (ImportError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
"""  # noqa: E501


def test_a_stranger_captions_and_is_told_what_to_install(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    caption, no_index, no_url = run.stdout.splitlines()[-3:]
    assert caption == pipe(picture("red"), max_new_tokens=4, max_num_rets=0)[0]["text"]
    assert no_index == (
        "ImportError: Install the `modeling-fromage` package to open the index org/index by its name, or pass an "
        "object with `search` and `load_image`."
    )
    assert no_url.startswith("UnreadableImageError: Cannot read the image 'https://example.com/a.png': not fetched")
    assert "install the `modeling-fromage` package to read URLs, or download the image" in no_url
