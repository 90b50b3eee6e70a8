"""What an earlier version wrote still loads and gives the same; see tests/fixtures/earlier/README.md."""

import json

import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageImageIndex,
    FromagePipeline,
    FromageProcessor,
)
from tests.helpers import processes
from tests.helpers.paths import FIXTURES, IMAGES

EARLIER = FIXTURES / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))

STRANGER = """
import json, sys
sys.modules["modeling_fromage"] = None  # not installed here
from PIL import Image
from transformers import pipeline

folder, picture, index = sys.argv[1:]
pipe = pipeline("interleaved-generation", model=folder, trust_remote_code=True, index=index)
print(json.dumps(pipe([Image.open(picture), "a"], max_new_tokens=6, ret_bias=3.0, load_images=False)))
"""


@pytest.fixture(scope="module")
def model():
    return FromageForConditionalGeneration.from_pretrained(EARLIER / "pipeline")


@pytest.fixture(scope="module")
def processor():
    return FromageProcessor.from_pretrained(EARLIER / "pipeline")


@pytest.fixture(scope="module")
def index():
    return FromageImageIndex.from_pretrained(EARLIER / "index", image_root=IMAGES)


def assert_same_answer(answer):
    """Texts, images and metadata are equal, scores to a rounding."""
    (ours, scores), (theirs, expected) = (without_scores(side) for side in (answer, EXPECTED["answer"]))
    assert ours == theirs
    assert scores == pytest.approx(expected, abs=1e-5)


def without_scores(segments):
    rows = [{name: value for name, value in segment.items() if name != "score"} for segment in segments]
    return rows, [segment["score"] for segment in segments if "score" in segment]


def test_model_has_its_losses_and_its_index(model, processor):
    names = sorted(path.name for path in IMAGES.iterdir())[:4]
    examples = [{"image": IMAGES / name, "caption": f"picture number {name[4:7]}"} for name in names]
    batch = FromageDataCollator(processor, concat_captions_prob=0.0)(examples)
    with torch.no_grad():
        output = model(**batch)
    assert {name: getattr(output, name).item() for name in EXPECTED["losses"]} == pytest.approx(EXPECTED["losses"])
    assert model.retrieval_fingerprint() == EXPECTED["fingerprint"]


def test_index_finds_the_same_images(model, processor, index):
    batch = processor(text=["a picture[RET]", "two of them[RET]"], return_tensors="pt", padding=True)
    with torch.no_grad():
        embeds = model.get_text_embeds(batch["input_ids"], batch["attention_mask"])
    ids, scores, _ = index.search(embeds, 3, model=model)
    assert ids == EXPECTED["search"]["ids"]
    torch.testing.assert_close(scores, torch.tensor(EXPECTED["search"]["scores"]), atol=1e-5, rtol=0)
    assert index.load_image(ids[0][0]).size == Image.open(IMAGES / ids[0][0]).size


def test_saved_pipeline_answers_the_same(model, processor, index):
    picture = Image.open(IMAGES / "img_003.png")
    options = {"max_new_tokens": 6, "ret_bias": 3.0, "load_images": False}
    pipe = FromagePipeline(model=model, processor=processor, index=index)
    assert_same_answer(pipe([picture, "a"], **options))
    pipe = pipeline("interleaved-generation", model=str(EARLIER / "pipeline"), trust_remote_code=True, index=index)
    assert_same_answer(pipe([picture, "a"], **options))


def test_saved_pipeline_answers_where_the_package_is_not_installed(tmp_path):
    """By the code that it carries, which reads the index as it did then."""
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    run = processes.run(script, EARLIER / "pipeline", IMAGES / "img_003.png", EARLIER / "index", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_answer(json.loads(run.stdout.splitlines()[-1]))
