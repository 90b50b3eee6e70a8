"""Hard negatives from an index: what is mined is what brute force finds, and trains."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_fromage import FromageDataCollator, FromageImageIndex, FromageProcessor
from tests.helpers.checkpoints import assemble
from tests.helpers.paths import PARITY
from training.data.captioned_images import load_captioned_images
from training.mine_negatives import main

CAPTIONS = ["a red square", "a cold night", "two dogs", "a red square", "nothing", "a boat", "the sea", "a house"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, a table of pairs, and an index of its images."""
    folder = tmp_path_factory.mktemp("mining")
    torch.manual_seed(0)
    model, processor = assemble(PARITY / "case_a_opt_tied")
    model.save_pretrained(folder / "model", save_backbones=True)
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rows = []
    for number, caption in enumerate(CAPTIONS):
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{number}.png")
        rows.append({"image": f"images/{number}.png", "caption": caption, "source": "here"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    FromageImageIndex.build(model, processor, str(folder / "pairs.jsonl")).save_pretrained(folder / "index")
    return folder


def mine(place: Path, name: str = "mined.jsonl", *options: str) -> list[dict]:
    output = place / name
    main([str(place / "model"), "--data", str(place / "pairs.jsonl"), "--index", str(place / "index"),
          "--output", str(output), *options])  # fmt: skip
    return [json.loads(line) for line in output.read_text().splitlines()]


def cosines(place: Path) -> torch.Tensor:
    """(captions, images), by the model's plain methods."""
    model, _ = assemble(PARITY / "case_a_opt_tied")
    model = type(model).from_pretrained(place / "model").eval()
    processor = FromageProcessor.from_pretrained(place / "model")
    pictures = [Image.open(place / "images" / f"{number}.png") for number in range(len(CAPTIONS))]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    texts = FromageDataCollator(processor).retrieval_inputs(CAPTIONS)
    with torch.no_grad():
        return model.get_text_embeds(*texts.values()) @ model.get_image_embeds(pixels).t()


@pytest.mark.parametrize("skip_above", [0.95, 1.0, 50.0])
def test_negatives_are_those_of_brute_force(place, skip_above, monkeypatch):
    scores, mined = cosines(place), mine(place, "mined.jsonl", "--per-example", "3", "--skip-above", str(skip_above))
    assert [{**row, "negative_images": None} for row in mined] == [
        {"image": f"images/{number}.png", "caption": caption, "source": "here", "negative_images": None}
        for number, caption in enumerate(CAPTIONS)
    ]
    for number, row in enumerate(mined):
        own = scores[number, number].item()
        limit = own - (1 - skip_above) * abs(own)
        others = [i for i, caption in enumerate(CAPTIONS) if caption != CAPTIONS[number]]
        near = sorted((i for i in others if scores[number, i] <= limit), key=lambda i: -scores[number, i])[:3]
        assert row["negative_images"] == [f"images/{i}.png" for i in near], number
    assert any(row["negative_images"] for row in mined)


def test_a_deep_search_finds_what_a_shallow_one_lacks(place, monkeypatch):
    expected = mine(place)
    monkeypatch.setattr("training.data.negative_mining._DEPTH", -7)
    assert mine(place) == expected


def test_an_index_that_lacks_the_own_images(place, tmp_path):
    """Their cosines are those of the images themselves; one that cannot be read has no negatives."""
    expected = mine(place, "mined.jsonl", "--skip-above", "0.95")
    index = FromageImageIndex.from_pretrained(place / "index")
    index.delete(["0", "1"])
    index.save_pretrained(place / "smaller")
    options = ["--index", str(place / "smaller")]
    found = mine(place, "smaller.jsonl", *options)
    for number in range(len(CAPTIONS)):
        left = [name for name in expected[number]["negative_images"] if name[7] not in "01"]
        assert found[number]["negative_images"] == left, number
    (place / "images" / "1.png").rename(tmp_path / "1.png")
    try:
        assert mine(place, "smaller.jsonl", *options)[1]["negative_images"] == []
    finally:
        (tmp_path / "1.png").rename(place / "images" / "1.png")


def test_what_is_mined_trains(place):
    (place / "elsewhere").mkdir(exist_ok=True)
    rows = mine(place, "elsewhere/mined.jsonl", "--skip-above", "50")
    assert rows[0]["image"] == "../images/0.png" and all(row["negative_images"] for row in rows)
    data = load_captioned_images(str(place / "elsewhere" / "mined.jsonl"))
    processor = FromageProcessor.from_pretrained(place / "model")
    batch = FromageDataCollator(processor)([data[0], data[1]])
    assert batch["negative_pixel_values"].shape == batch["pixel_values"].shape


def test_what_cannot_be_mined_is_refused(place, tmp_path, capsys):
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            mine(place, *options)
        return capsys.readouterr().err

    assert "written as JSON lines" in refused("mined.parquet")
    embeds = torch.randn(4, 16)
    FromageImageIndex(embeds, list("abcd")).save_pretrained(tmp_path / "nameless")
    assert "has a path or a URL" in refused("mined.jsonl", "--index", str(tmp_path / "nameless"))
    FromageImageIndex(embeds, list("abcd"), model_fingerprint="another").save_pretrained(tmp_path / "other")
    assert "was made by the model another" in refused("mined.jsonl", "--index", str(tmp_path / "other"))
    (tmp_path / "table.jsonl").write_text('{"image": "a.png", "caption": null}')
    assert "line 1: expected a path or URL" in refused("mined.jsonl", "--data", str(tmp_path / "table.jsonl"))
