"""The evaluations' files and images: preprocessing by each protocol, and what cannot be read."""

import json

import pytest
import torch
from PIL import Image

from tests.helpers.evaluation import run
from tests.helpers.paths import IMAGES
from training.evaluation import dialogues, vist


def test_images_are_squashed_by_the_authors_protocol_alone(scripts, tmp_path):
    """The same features as of an image that was resized beforehand; and, corrected, as in training."""
    image = Image.open(IMAGES / "img_000.png").convert("RGB").resize((60, 30))
    for name in ("7.png", "VisualDialog_val2018_000000000007.png"):
        image.save(tmp_path / name)

    def features(picture):
        pixels = scripts.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        return scripts.model.get_pooled_image_features(pixels)

    expected = {"paper": features(image.resize((224, 224))), "corrected": features(image)}
    assert not torch.allclose(*expected.values(), atol=1e-3)
    stories = vist.Stories(photos={"7": None})
    some = dialogues.Dialogues([dialogues.Dialogue("7", [])])
    for protocol, wanted in expected.items():
        photos = vist.encode_photos(
            scripts.model, scripts.processor, stories, tmp_path, False, vist.PROTOCOLS[protocol]
        )
        images = dialogues.encode_dialogue_images(
            scripts.model, scripts.processor, some, tmp_path, dialogues.PROTOCOLS[protocol]
        )
        torch.testing.assert_close(photos.features, wanted)
        torch.testing.assert_close(images.features, wanted)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("vist", "{", "cannot be read"),
        ("vist", {"images": [], "annotations": [{}]}, "SIS format"),
        ("vist", {"images": [], "annotations": []}, "no story"),
        ("visdial", {"data": {}}, "VisDial's format"),
        ("visdial", {"data": {"questions": [], "answers": [], "dialogs": None}}, "VisDial's format"),
        ("visdial", {"data": {"questions": [], "answers": [], "dialogs": [{}]}}, "no dialogue that can be used"),
        ("captions", {"images": [{}]}, "COCO's caption format"),
        ("captions", {"images": [], "annotations": []}, "no caption"),
    ],
)
def test_files_of_another_format(task, content, message, checkpoint, tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        run(task, checkpoint[0], "--data", data, "--images", tmp_path, "--output", tmp_path / "out.json")
    assert message in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_an_output_that_is_a_folder(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("vist", tmp_path / "no model", "--data", "x", "--images", "x", "--output", tmp_path)
    assert "is a folder" in capsys.readouterr().err
