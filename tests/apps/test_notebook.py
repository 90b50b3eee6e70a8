"""Every cell of docs/quickstart.ipynb runs, with few pictures and steps, and does what it says."""

import json

import pytest
import torch

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from tests.helpers.store_notebook import clean, execute, printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def notebook(folder):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FROMAGE_NOTEBOOK_SMALL", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        return clean(execute(folder))


def test_it_trains_searches_and_answers(notebook, folder):
    metrics = json.loads((folder / "outputs/notebook/model/all_results.json").read_text(encoding="utf-8"))
    count = metrics["eval_num_pairs"]
    assert count == 30
    # 5 of 30 by chance.
    assert metrics["eval_text_to_image_R@5"] > 0.35 and metrics["eval_image_to_text_R@5"] > 0.35
    told = printed(notebook)
    assert "The loaded model finds the same pictures: True" in told
    (answers,) = [cell for cell in notebook.cells if cell.source.startswith("def answer(")]
    assert any("image/png" in output.get("data", {}) for output in answers.outputs)


def test_what_it_saves_loads(notebook, folder):
    place = folder / "outputs" / "notebook"
    model = FromageForConditionalGeneration.from_pretrained(place / "model")
    index = FromageImageIndex.from_pretrained(place / "index", image_root=place / "pictures")
    assert len(index) == 30 and index.load_image(index.ids[0]).size == (224, 224)
    assert index.model_fingerprint == model.retrieval_fingerprint()
    assert FromageProcessor.from_pretrained(place / "model").caption_prefix == "A picture of"
    staged = FromageForConditionalGeneration.from_pretrained(place / "staged").state_dict()
    for name, saved in model.adapter.state_dict().items():
        torch.testing.assert_close(staged[f"adapter.{name}"], saved, rtol=8e-3, atol=1e-4)  # bfloat16
    assert "loaded them without this package" in printed(notebook)
