"""Visual Storytelling: the original's numbers, and end to end on files with broken entries."""

import base64
import json
import shutil

import pytest
import torch

from tests.helpers.evaluation import (
    png,
    read,
    run,
    sis_file,
)
from tests.helpers.paths import IMAGES
from training.evaluation import vist


def test_vist_of_the_original(scripts):
    golden = scripts.evals["vist"]
    for photo in golden["sis_file"]["images"]:
        if photo.get("url_o"):
            shutil.copy(IMAGES / photo["url_o"], scripts.images / f"{photo['id']}.png")
    (scripts.images / "f38.png").write_bytes(b"no picture")
    sis = [scripts.write("sis.json", golden["sis_file"])]
    evaluator = vist.VistEvaluator(data=sis, images=scripts.images)
    evaluation = evaluator.run(scripts.model, scripts.processor)
    results, manifest = evaluation.results, evaluation.manifest
    recall = results["settings"]["5 captions + 4 images"]["ours"]
    assert {k: recall[f"R@{k}"] for k in (1, 5, 10)} == {int(k): pytest.approx(v) for k, v in golden["recall"].items()}
    assert results["denominator"]["N"] == golden["n_evaluated"] == recall["N"]
    assert manifest["gallery"] == golden["image_ids"] and manifest["stories"] == list(golden["results"])
    assert results["stories"] == {"read": 14, "left_out": {"an image is not usable": 5}}
    assert results["images"]["not_usable"] == {"no image": 1, "missing": 1}

    read = vist.read_stories(sis)
    photos = vist.encode_photos(scripts.model, scripts.processor, read, scripts.images, False, vist.PROTOCOLS["paper"])
    stories, _ = vist.usable(scripts.model, scripts.processor, read, photos, vist.PROTOCOLS["paper"])
    scores = vist.score(
        scripts.model, scripts.processor, stories, photos, "5 captions + 4 images", vist.PROTOCOLS["paper"]
    )
    for story, row in zip(stories, scores, strict=True):
        row = row.clone()
        row[photos.rows_of(story.photos[:-1])] = -torch.inf
        found = [photos.ids[i] for i in row.topk(10).indices]
        assert found == golden["results"][story.id]["topk_preds"]
        assert story.photos[-1] == golden["results"][story.id]["gt"]
    theirs = scripts.eval_tensors["vist.last_story_scores"]
    scale = scripts.model.adapter.logit_scale.exp().item()
    torch.testing.assert_close((scale * scores[-1])[theirs > -1000], theirs[theirs > -1000], atol=2e-4, rtol=0)


def test_vist_prompts(scripts):
    processor = scripts.processor
    story = vist.Story("s", ["one", "two", "three", "four", "five"], list("abcde"))
    image = "<|image|>" * processor.num_image_tokens
    paper = f"</s>one{image}</s>two{image}</s>three{image}</s>four{image}</s>five[RET]"
    assert vist.prompt(processor, story, 5, 4, vist.PROTOCOLS["paper"]) == paper
    corrected = f"</s>one{image} two{image} three{image} four{image} five[RET]"
    assert vist.prompt(processor, story, 5, 4, vist.PROTOCOLS["corrected"]) == corrected
    assert vist.prompt(processor, story, 1, 0, vist.PROTOCOLS["corrected"]) == "</s>five[RET]"
    assert (
        vist.prompt(processor, story, 5, 0, vist.PROTOCOLS["paper"]) == "</s>one</s>two</s>three</s>four</s>five[RET]"
    )


def test_vist_end_to_end(checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        (photos / f"10{number:02d}.jpg").write_bytes(png(number))
    (photos / "1020.jpg").write_bytes(png(1)[:100])  # cut off

    def story(*ids):
        return [(order, str(photo), f"there was a {order} .") for order, photo in enumerate(ids)]

    stories = {
        "in order": story(1000, 1001, 1002, 1003, 1004),
        "shuffled": [story(1005, 1006, 1007, 1008, 1009)[i] for i in (4, 1, 0, 3, 2)],
        "from the web": story(1000, 1001, 1002, 1003, 1010)[:4] + [(4, "2000", "a picture from the web .")],
        "dead": story(1000, 1001, 1002, 1003, 3000),
        "broken": story(1000, 1001, 1020, 1003, 1004),
        "escapes": story(1000, 1001, "../../escaped", 1003, 1004),
        "short": story(1000, 1001, 1002, 1003),
        "silent": [*story(1000, 1001, 1002, 1003), (4, "1011", " ")],
        "special": [*story(1000, 1001, 1002, 1003), (4, "1004", "a <|image|> .")],
        "long": [*story(1000, 1001, 1002, 1003), (4, "1004", "word " * 200)],
        "wordless": [*story(1000, 1001, 1002, 1003), (4, "1004", None)],
        "without a place": [*story(1000, 1001, 1002, 1003), (None, "1004", "somewhere .")],
    }
    data_url = "data:image/png;base64," + base64.b64encode(png(20)).decode()
    urls = {"2000": {"url_o": data_url}, "../../escaped": {"url_o": data_url}, "1003": {}}
    sis = tmp_path / "val.story-in-sequence.json"
    sis.write_text(json.dumps(sis_file(stories, urls)), encoding="utf-8")
    output = tmp_path / "vist.json"
    options = ["--data", sis, "--images", photos, "--output", output, "--dual-encoder"]

    run("vist", checkpoint[0], *options, "--download")
    results, manifest = read(output), read(tmp_path / "vist.manifest.json")
    assert results["stories"] == {
        "read": 12,
        "left_out": {
            "not of 5 sentences": 1,
            "a sentence without its text, photo or place": 1,
            "an image is not usable": 3,
            "a special token in a text": 1,
            "longer than the language model's context": 1,
        },
    }
    assert manifest["stories"] == ["in order", "shuffled", "from the web", "silent", "without a place"]
    reasons = results["images"]["not_usable"]
    assert sum(reasons.values()) == 3 and reasons.pop("broken") == 1 and reasons.pop("id that is no file name") == 1
    assert next(iter(reasons)).startswith("URL: ")  # the dead one
    assert (
        (photos / "2000.png").read_bytes() == png(20)
        and not list(tmp_path.rglob("*escaped*"))
        and not list(photos.glob(".*"))
    )
    assert results["denominator"]["N"] == 5 and results["gallery"]["N"] == len(manifest["gallery"]) == 12
    for setting in ("1 caption", "5 captions", "5 captions + 4 images"):
        for who in ("ours", "dual encoder"):
            assert results["settings"][setting][who]["N"] == 5
    assert [data["file"] for data in results["data"]] == [sis.name] and len(results["commit"]) in (
        40,
        len("no repository"),
    )
    assert results["dual_encoder"]["texts_cut"] > 0 and results["model"]["fingerprint"]
    assert "5 captions + 4 images, ours: N 5" in capsys.readouterr().out

    # The next run finds the photo of the web in the folder; without it, its story is left out.
    run("vist", checkpoint[0], *options, "--protocol", "corrected", "--mask", "none")
    corrected = read(output)
    assert corrected["denominator"]["N"] == 3 and corrected["masking"] == vist.MASKS["none"]
    assert corrected["stories"]["left_out"]["a sentence is empty"] == 1
    assert corrected["stories"]["left_out"]["a sentence without its text, photo or place"] == 2
    (photos / "2000.png").unlink()
    run("vist", checkpoint[0], *options)
    assert read(output)["denominator"]["N"] == 4 and read(output)["images"]["not_usable"]["missing"] == 3

    order = {name: [s.photos for s in vist.read_stories([sis], vist.PROTOCOLS[name]).stories if s.id == "shuffled"]
             for name in ("paper", "corrected")}  # fmt: skip
    assert order["corrected"] == [["1005", "1006", "1007", "1008", "1009"]]
    assert order["paper"] == [["1009", "1006", "1005", "1008", "1007"]]


def test_vist_masks(scripts):
    """What may be retrieved: with a constant model, the rank is the number of candidates."""
    photos = vist.EncodedImages(list("abcdefg"), torch.zeros(7, 2), None, {})
    stories = [vist.Story("s", ["x"] * 5, list("abcde")), vist.Story("t", ["x"] * 5, list("aacae"))]
    scores = torch.zeros(2, 7)
    for setting, mask, expected in [
        ("5 captions + 4 images", "shown", [3, 5]),
        ("5 captions", "shown", [7, 7]),
        ("1 caption", "story", [3, 5]),
        ("5 captions + 4 images", "none", [7, 7]),
    ]:
        assert vist.ranks(scores, stories, photos, setting, mask).tolist() == expected


def test_vist_scores_are_of_the_models_own_embeddings(scripts):
    """Corrected: `get_text_embeds` of the prompt, whatever layers the model's text projections are of."""
    model, processor = scripts.model, scripts.processor
    photos = vist.EncodedImages(list("abcde"), torch.randn(5, 32), None, {})
    stories = [vist.Story("s", ["one cat", "two", "three dogs", "four", "five"], list("edcba")),
               vist.Story("t", ["a red one", "two", "the old three", "four", "is five"], list("abcde"))]  # fmt: skip
    scores = vist.score(
        model, processor, stories, photos, "5 captions + 4 images", vist.PROTOCOLS["corrected"], batch_size=1
    )
    images = model.get_image_embeds(pooled_image_features=photos.features)
    for story, row in zip(stories, scores, strict=True):
        text = vist.prompt(processor, story, 5, 4, vist.PROTOCOLS["corrected"])
        ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False).input_ids])
        shown = photos.features[photos.rows_of(story.photos[:4])]
        with torch.no_grad():
            expected = model.get_text_embeds(ids, pooled_image_features=shown)[0] @ images.t()
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
