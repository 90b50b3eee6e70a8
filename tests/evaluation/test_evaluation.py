"""The paper's evaluations: the original's numbers, and end to end on data in the real file formats, broken entries
included."""

import base64
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from tests.helpers.backbones import PARITY
from tests.helpers.parity import CASES, Inference
from tests.helpers.paths import IMAGES
from training import evaluate
from training.evaluation import answers, captioning, dialogues, visdial, vist
from training.evaluation.dual_encoder import DualEncoder
from training.evaluation.metrics import retrieval_metrics
from training.publishing import results as stored_results
from training.publishing import tables as table

ROOT = Path(__file__).parents[2]
PAGES = [page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
LOSSES = 5e-4  # a sum of up to ten tokens' losses, each within the logits' tolerance


class Scripts(Inference):
    """A parity case with what the original's evaluation scripts were run on, in files."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.evals = json.loads((PARITY / name / "evals.json").read_text(encoding="utf-8"))
        self.eval_tensors = load_file(PARITY / name / "evals.safetensors")
        self.images = folder / "images"
        self.images.mkdir()
        self.folder = folder

    def write(self, name, content):
        path = self.folder / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return path


@pytest.fixture(scope="module", params=sorted(CASES))
def scripts(request, tmp_path_factory):
    return Scripts(request.param, tmp_path_factory.mktemp("scripts"))


def dialogue_images(scripts):
    for number, name in enumerate(scripts.evals["visdial_t2i"]["images"], start=1):
        shutil.copy(IMAGES / name, scripts.images / f"VisualDialog_val2018_{number:012d}.png")


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


def test_visdial_answers_of_the_original(scripts):
    golden, tensors = scripts.evals["visdial_it2t"], scripts.eval_tensors
    dialogue_images(scripts)
    data = scripts.write("answers.json", golden["dialogs_file"])
    dense = scripts.write("dense.json", golden["dense"][::-1])  # annotations need not be sorted
    evaluator = visdial.VisdialEvaluator(data=data, images=scripts.images, dense=dense, tasks=["answers"])
    results = evaluator.run(scripts.model, scripts.processor).results
    metrics, printed = results["answers"]["ours"], golden["metrics_printed"]
    assert {name: round(metrics[name], 5) for name in ("R@1", "R@5", "R@10", "MRR", "NDCG")} == {
        name: printed[name] for name in ("R@1", "R@5", "R@10", "MRR", "NDCG")
    }
    assert metrics["mean_rank"] == sum(golden["ranks"]) / 30 and metrics["NDCG_N"] == 3
    assert "retrieval" not in results

    read = dialogues.read_dialogues(data)
    images = dialogues.encode_dialogue_images(
        scripts.model, scripts.processor, read, scripts.images, dialogues.PROTOCOLS["paper"]
    )
    losses, ranks = [], []
    for dialogue in read.dialogues:
        row = images.features[images.rows[dialogue.image]]
        rounds = answers.answered_rounds(dialogue)
        scores = answers.score_answers(
            scripts.model, scripts.processor, dialogue, rounds, row, dialogues.PROTOCOLS["paper"]
        )
        losses += [-row for row in scores]
        ranks += [int((row >= row[dialogue.turns[i].target]).sum()) for i, row in zip(rounds, scores, strict=True)]
    torch.testing.assert_close(torch.stack(losses), tensors["visdial_it2t.losses"], atol=LOSSES, rtol=0)
    assert ranks == golden["ranks"]


def test_visdial_retrieval_of_the_original(scripts):
    golden, tensors = scripts.evals["visdial_t2i"], scripts.eval_tensors
    dialogue_images(scripts)
    content = {"data": {name: golden[name] for name in ("questions", "answers", "dialogs")}}
    data = scripts.write("retrieval.json", content)
    evaluator = visdial.VisdialEvaluator(data=data, images=scripts.images, tasks=["retrieval"], rounds=[1, 10])
    results = evaluator.run(scripts.model, scripts.processor).results
    recall = results["retrieval"]["10"]["image_to_dialogue"]["ours"]  # what the script calls text to image
    assert {name: round(recall[name], 5) for name in ("R@1", "R@5", "R@10")} == golden["metrics_printed"]
    assert results["retrieval"]["1"] != results["retrieval"]["10"] and set(results["retrieval"]) == {"1", "10"}
    theirs = tensors["visdial_t2i.scores"]
    image_rows = torch.nn.functional.normalize(tensors["visdial_t2i.visual_embs"], dim=-1)
    cosines = image_rows @ tensors["visdial_t2i.text_embs"].t()
    assert torch.equal(theirs.topk(10).indices, cosines.topk(10).indices)
    other = results["retrieval"]["10"]["dialogue_to_image"]["ours"]
    ranks = (cosines >= cosines.diagonal()).sum(0)
    assert other["R@1"] == pytest.approx((ranks == 1).double().mean().item())
    assert other["mean_rank"] == pytest.approx(ranks.double().mean().item())


# ---- the protocols ----


@pytest.mark.parametrize("protocol", ["paper", "corrected"])
def test_answers_are_scored_as_by_whole_passes(protocol, scripts):
    """The definition of both protocols: one pass over image, dialogue and answer, and a sum over the answer."""
    model, processor, rules = scripts.model, scripts.processor, dialogues.PROTOCOLS[protocol]
    turns = [
        dialogues.Turn("is it red", "no"),
        dialogues.Turn("what is it", "a cat", ["a cat", "", "tree", "a cat"], 0),
    ]
    features = model.get_pooled_image_features(scripts.processor.image_processor(
        Image.open(IMAGES / "img_000.png").convert("RGB"), return_tensors="pt")["pixel_values"])  # fmt: skip
    (scores,) = answers.score_answers(model, processor, dialogues.Dialogue("1", turns), [1], features[0], rules)
    dialogue = "Q: is it red?\nA: no\nQ: what is it?\nA:" + (" " if protocol == "paper" else "")
    bos = processor.tokenizer.bos_token_id
    start = [processor.image_token_id] * processor.num_image_tokens + [bos]
    start += processor.tokenizer(dialogue, add_special_tokens=False).input_ids
    for text, score in zip(turns[1].options, scores.tolist(), strict=True):
        shift = 0 if protocol == "paper" else 1
        answer = ([bos] if protocol == "paper" else []) + processor.tokenizer(
            text if protocol == "paper" or not text else f" {text}", add_special_tokens=False
        ).input_ids
        if not answer:
            assert score == -math.inf
            continue
        with torch.no_grad():
            logits = model(torch.tensor([start + answer]), pooled_image_features=features).logits[0].log_softmax(-1)
        expected = sum(logits[len(start) + i - shift, token].item() for i, token in enumerate(answer))
        assert score == pytest.approx(expected, abs=LOSSES)
    assert scores[0] == pytest.approx(scores[3].item(), abs=1e-4)
    # Rounds with other numbers of candidates, none with a text among them.
    turns += [dialogues.Turn("how many", "two", ["", ""], 1), dialogues.Turn("any dogs", "no", ["no"], 0)]
    dialogue = dialogues.Dialogue("1", turns)
    many = answers.score_answers(model, processor, dialogue, [1, 2, 3], features[0], rules)
    assert [len(row) for row in many] == [4, 2, 1]
    torch.testing.assert_close(many[0], scores, atol=LOSSES, rtol=0)
    (alone,) = answers.score_answers(model, processor, dialogue, [2], features[0], rules)
    torch.testing.assert_close(alone, many[1], atol=LOSSES, rtol=0)
    assert bool(alone.isinf().all()) == (protocol == "corrected")


def test_dense_annotations_are_of_the_round_they_name():
    """Rounds count from 1 in the files: the authors' script takes the round behind, or the next dialogue's first."""
    turns = [dialogues.Turn("q", "a", ["a", "b"], 0)] * 10
    some = [
        dialogues.Dialogue("7", turns, (10, [1.0, 0.0])),
        None,
        dialogues.Dialogue("8", turns, (3, [0.0, 1.0])),
        dialogues.Dialogue("9", turns, (10, [1.0, 1.0])),
    ]
    corrected, paper = (dict(answers.dense_rows(some, dialogues.PROTOCOLS[name])) for name in ("corrected", "paper"))
    assert corrected == {(0, 9): [1.0, 0.0], (2, 2): [0.0, 1.0], (3, 9): [1.0, 1.0]}
    assert paper == {(1, 0): [1.0, 0.0], (2, 3): [0.0, 1.0], (4, 0): [1.0, 1.0]}
    scores = {(n, i): torch.tensor([2.0, 1.0]) for n in (0, 2, 3) for i in range(10)}
    metrics, left_out = answers.answer_metrics(scores, some, dialogues.PROTOCOLS["paper"])
    assert metrics["NDCG_N"] == 1 and left_out == {"dense annotation of a round without scores": 2}
    metrics, left_out = answers.answer_metrics(scores, some, dialogues.PROTOCOLS["corrected"])
    assert metrics["NDCG_N"] == 3 and not left_out


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


# ---- end to end, on made-up data in the real formats ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A FROMAGe whose vision tower has a text half: (checkpoint, the CLIP)."""
    folder = tmp_path_factory.mktemp("models")
    backbones = PARITY / "case_a_opt_tied"
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 512, "max_position_embeddings": 20, "eos_token_id": 3},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    clip = folder / "clip"
    CLIPModel(config).save_pretrained(clip)
    AutoImageProcessor.from_pretrained(backbones / "vision_model").save_pretrained(clip)
    AutoTokenizer.from_pretrained(backbones / "language_model").save_pretrained(clip)
    language_model = str(shutil.copytree(backbones / "language_model", folder / "lm"))
    processor = FromageProcessor.from_vision_text_pretrained(str(clip), language_model)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        str(clip), language_model, processor=processor, projection_dim=16
    )
    model.save_pretrained(folder / "fromage")
    processor.save_pretrained(folder / "fromage")
    return folder / "fromage", clip


def run(*arguments):
    evaluate.main([str(argument) for argument in arguments])


def png(number):
    return (IMAGES / f"img_{number:03d}.png").read_bytes()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sis_file(stories, urls):
    """As VIST's: every annotation in a list of its own, photos with their URLs."""
    annotations = [
        [{"story_id": story, "photo_flickr_id": photo, "text": text, "worker_arranged_photo_order": order,
          "album_id": "1", "tier": "story-in-sequence"}]
        for story, rows in stories.items() for order, photo, text in rows
    ]  # fmt: skip
    photos = {photo for rows in stories.values() for _, photo, _ in rows}
    images = [
        {"id": photo, **urls.get(photo, {"url_o": f"http://127.0.0.1:9/{photo}.jpg"})} for photo in sorted(photos)
    ]
    return {"images": images, "annotations": annotations, "albums": [], "info": {}, "type": "story-in-sequence"}


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


def visdial_file(count, images):
    """As VisDial 1.0's: texts by number, ten rounds, candidates by number."""
    questions = ["is it day", "how many", "what is it", "any dogs"]
    texts = ["yes", "no", "two", "a cat", "", "in the park", "i can't tell", "a small bird", "green", "3"]
    dialogs = []
    for number in range(count):
        rounds = []
        for i in range(10):
            options = [(number + i + j) % len(texts) for j in range(len(texts))]
            target = (3 * i + number) % len(texts)
            rounds.append({"question": (i + number) % 4, "answer": options[target], "answer_options": options,
                           "gt_index": target})  # fmt: skip
        dialogs.append({"image_id": images[number], "caption": "a picture", "dialog": rounds})
    return {"version": "1.0", "split": "val2018", "data": {"questions": questions, "answers": texts,
                                                          "dialogs": dialogs}}  # fmt: skip


def spy(function, calls):
    def wrapped(*args):
        calls.append(args)
        return function(*args)

    return wrapped


def test_visdial_end_to_end(checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "VisualDialog_val2018"
    folder.mkdir()
    images = [254080, 11, 500, 600, 700, 800]
    for image in images[:4]:
        (folder / f"VisualDialog_val2018_{image:012d}.jpg").write_bytes(png(image % 40))
    (folder / f"VisualDialog_val2018_{700:012d}.jpg").write_bytes(b"no image")
    content = visdial_file(6, images)
    content["data"]["dialogs"][3]["dialog"][2]["answer_options"][0] = 1000  # of no answer
    content["data"]["answers"] += ["[RET]", "word " * 200]
    for text in (10, 11):
        content["data"]["dialogs"].append(visdial_file(1, [11])["data"]["dialogs"][0])
        content["data"]["dialogs"][-1]["dialog"][4]["answer_options"][0] = text
    content["data"]["dialogs"].append({"image_id": 11, "dialog": []})
    del content["data"]["dialogs"][2]["dialog"][9]["gt_index"]
    data, dense = tmp_path / "visdial_1.0_val.json", tmp_path / "dense.json"
    data.write_text(json.dumps(content), encoding="utf-8")
    relevance = [0.0] * 9 + [1.0]
    dense.write_text(json.dumps([
        {"image_id": 11, "round_id": 10, "gt_relevance": relevance},
        {"image_id": 254080, "round_id": 1, "gt_relevance": relevance},
        {"image_id": 500, "round_id": 4, "gt_relevance": [0.0] * 10},
        {"image_id": 999, "round_id": 4, "gt_relevance": relevance},
    ]), encoding="utf-8")  # fmt: skip
    output = tmp_path / "visdial.json"
    options = ["--data", data, "--dense", dense, "--images", folder, "--output", output, "--protocol", "corrected"]
    run("visdial", checkpoint[0], *options, "--dual-encoder", checkpoint[1], "--rounds", "1", "5")
    results, manifest = read(output), read(tmp_path / "visdial.manifest.json")
    assert manifest["dialogues"] == ["254080", "11", "500"] == manifest["images"]
    assert results["dialogues"]["read"] == 9
    assert results["dialogues"]["left_out"] == {
        "dialogue with a broken entry (IndexError)": 2,
        "dialogue with a special token in a text": 1,
        "dialogue longer than the language model's context": 1,
        "dense annotation of no dialogue": 1,
        "dialogue whose image is not usable": 2,
        "round without candidates or answer": 1,
        "dense annotation without a relevant candidate": 1,
    }
    assert results["images"]["not_usable"] == {"no image": 1, "missing": 1}
    assert results["answers"]["empty_candidates"] == 29
    for who in ("ours", "dual encoder"):
        metrics = results["answers"][who]
        assert metrics["N"] == 29 and metrics["NDCG_N"] == 2 and len(metrics["MRR_by_round"]) == 10
        assert metrics["R@10"] == 1.0 and 1 <= metrics["mean_rank"] <= 10
        for direction in ("image_to_dialogue", "dialogue_to_image"):
            assert results["retrieval"]["5"][direction][who]["N"] == 3
    assert "answers, ours: N 29" in capsys.readouterr().out

    # Scores are kept as they come: the next run computes those that are not there, and of other data all.
    kept = tmp_path / "visdial.scores.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    kept.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    scored = []
    monkeypatch.setattr(answers, "score_answers", spy(answers.score_answers, scored))
    again = [*options, "--dual-encoder", checkpoint[1], "--tasks", "answers"]
    run("visdial", checkpoint[0], *again)
    assert len(scored) == 2 and read(output)["answers"] == results["answers"]
    assert kept.read_bytes().splitlines(keepends=True) == lines
    run("visdial", checkpoint[0], *again, "--protocol", "paper")
    assert len(scored) == 5

    run("visdial", checkpoint[0], *options[:-2], "--tasks", "retrieval", "--rounds", "10", "--sample", "3")
    results = read(output)
    assert results["dialogues"]["sampled"] == 3 and "answers" not in results and results["protocol"] == "paper"


def test_captions_end_to_end(checkpoint, tmp_path, capsys):
    folder = tmp_path / "val2014"
    folder.mkdir()
    for number in range(5):
        (folder / f"COCO_val2014_{number:012d}.jpg").write_bytes(png(number))
    (folder / f"COCO_val2014_{5:012d}.jpg").write_bytes(b"")
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "height": 1, "width": 1} for i in range(8)]
    captions = [(0, "a red cat on a mat"), (1, "two dogs , running"), (5, "an unreadable picture"), (6, "no file"),
                (2, "a bird"), (0, "a cat"), (4, "a tree"), (3, " "), (2, "says [RET]"), (99, "of no image"),
                (3, "a house"), (4, None)]  # fmt: skip
    annotations = [{"id": 7 * i % 12, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]
    data = tmp_path / "captions_val2014.json"
    data.write_text(json.dumps({"images": images, "annotations": annotations, "licenses": []}), encoding="utf-8")
    output = tmp_path / "captions.json"
    options = ["--images", folder, "--output", output, "--dual-encoder", "--max-new-tokens", "6"]
    run("captions", checkpoint[0], "--data", data, *options)
    results, manifest = read(output), read(tmp_path / "captions.manifest.json")
    assert results["denominator"]["images"] == 5 and results["denominator"]["captions"] == 6
    assert results["left_out"] == {
        "caption that is empty": 2,
        "caption of an image that is not listed": 1,
        "image without a caption": 1,
        "caption with a special token": 1,
    }
    assert results["images"] == {"used": 5, "not_usable": {"no image": 1, "not found": 1}}
    assert results["captions"].keys() == {"N", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert results["captions"]["N"] == 5 == len(manifest["captions"])
    assert results["perplexity"]["perplexity"] == pytest.approx(math.exp(results["perplexity"]["loss"]))
    for direction, count in (("text_to_image", 6), ("image_to_text", 5)):
        for who in ("ours", "dual encoder"):
            metrics = results["retrieval"][direction][who]
            assert metrics["N"] == count and 1 <= metrics["median_rank"] <= 6
    assert "CIDEr" in capsys.readouterr().out

    # The same images and captions as Conceptual Captions publishes them: captions and URLs, no header.
    def url(name):
        path = folder / name
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    rows = [(text, url(images[image]["file_name"]))
            for image, text in sorted(captions[i] for i in (0, 1, 4, 5, 6, 10))]  # fmt: skip
    rows.append(("dead", "http://127.0.0.1:9/x.jpg"))
    tsv = tmp_path / "Validation_GCC.tsv"
    tsv.write_text("".join(f"{caption}\t{address}\n" for caption, address in rows), encoding="utf-8")
    run("captions", checkpoint[0], "--data", tsv, *options[2:])
    table_results = read(output)
    assert table_results["denominator"]["images"] == 5 and table_results["denominator"]["captions"] == 6
    (reason,) = table_results["images"]["not_usable"]
    assert reason.startswith("URL: ")
    assert table_results["perplexity"]["loss"] == pytest.approx(results["perplexity"]["loss"], abs=1e-4)
    assert table_results["retrieval"]["text_to_image"] == results["retrieval"]["text_to_image"]


def test_rows_are_of_one_image_where_they_name_it(scripts, tmp_path):
    """Long addresses that begin alike are of two images; the same path twice is of one."""
    start = "data:image/png;base64," + "A" * 5000
    rows = [("a", f"{start}B"), ("b", f"{start}C"), ("c", f"{start}B")]
    tsv = tmp_path / "addresses.tsv"
    tsv.write_text("".join(f"{caption}\t{address}\n" for caption, address in rows), encoding="utf-8")
    found = captioning.read_captions(scripts.processor, str(tsv))
    assert list(found.captions.values()) == [["a", "c"], ["b"]]
    assert [source[-1] for source in found.sources.values()] == ["B", "C"]
    assert all(len(image_id) < 100 for image_id in found.sources)
    table = tmp_path / "paths.tsv"
    table.write_text("caption\timage\na\tx.png\nb\ty.png\nc\tx.png\n", encoding="utf-8")
    assert list(captioning.read_captions(scripts.processor, str(table)).captions.values()) == [["a", "c"], ["b"]]


def test_captions_and_images_find_each_other():
    """Both directions against brute force: several captions an image, an image without one, in any order."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=-1) for n in (6, 9))
    rows = [4, 0, 2, 2, 4, 1, 0, 5, 4]  # none is of image 3
    pairs = {"ours": (images, texts)}
    found = {
        direction: of["ours"]
        for direction, of in retrieval_metrics(pairs, torch.tensor(rows), captioning.DIRECTIONS).items()
    }
    scores = texts @ images.t()
    to_image = [1 + int((line > line[row]).sum()) for line, row in zip(scores, rows, strict=True)]
    to_text = []
    for image in (0, 1, 2, 4, 5):
        own = torch.tensor([row == image for row in rows])
        to_text.append(1 + int((scores[~own, image] > scores[own, image].max()).sum()))
    for direction, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
        assert found[direction]["N"] == len(ranks)
        assert found[direction]["mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
        assert found[direction]["R@1"] == pytest.approx(ranks.count(1) / len(ranks))
    assert found["text_to_image"] != found["image_to_text"]


def test_written_captions_are_read_with_their_images(scripts):
    """Loss and embeddings of each caption and its own image, equal to one pass each."""
    model, processor = scripts.model, scripts.processor
    features = torch.randn(3, 32)
    rows, captions = [2, 0, 0, 1], ["a red cat", "two dogs run", "a bird", "an old tree by the sea"]
    collator = captioning.FromageDataCollator(processor, training=False)
    loss, count, embeds = captioning.score_captions(model, collator, features, rows, captions, batch_size=3)
    total, tokens = 0.0, 0
    bos, ret = processor.tokenizer.bos_token_id, processor.ret_token_id
    for row, text, embed in zip(rows, captions, embeds, strict=True):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        k = processor.num_image_tokens
        whole = torch.tensor([[processor.image_token_id] * k + [bos] + ids])
        with torch.no_grad():
            logits = model(whole, pooled_image_features=features[row][None]).logits[0].log_softmax(-1)
            expected = model.get_text_embeds(torch.tensor([[bos] + ids + [ret]]))[0]
        total -= sum(logits[k - 1 + i, token].item() for i, token in enumerate([bos] + ids))
        tokens += 1 + len(ids)
        torch.testing.assert_close(embed, expected, atol=1e-5, rtol=0)
    assert count == tokens and loss == pytest.approx(total / tokens, abs=1e-4)


class FakeDualEncoder:
    """Texts to vectors that are known."""

    def __init__(self, **vectors):
        self.vectors = vectors

    def text_embeds(self, texts, **kwargs):
        return torch.stack([self.vectors[text] for text in texts])


def test_baselines_by_hand():
    e = torch.eye(4)
    encoder = FakeDualEncoder(**{"one two three four five": e[0], "five": e[3]})
    story = vist.Story("s", ["one", "two", "three", "four", "five"], list("abcab"))
    photos = vist.EncodedImages(list("abc"), torch.zeros(3, 2), torch.stack([e[1], e[2], e[0]]), {})
    # The joined captions and four images: a twice, b and c once.
    mean = e[0] + 2 * e[1] + e[2] + e[0]
    expected = (mean / mean.norm()) @ photos.dual_embeds.t()
    torch.testing.assert_close(vist.score_dual(encoder, [story], photos, "5 captions + 4 images")[0], expected)
    assert vist.score_dual(encoder, [story], photos, "5 captions")[0].tolist() == [0, 0, 1]
    assert vist.score_dual(encoder, [story], photos, "1 caption")[0].tolist() == [0, 0, 0]

    turns = [dialogues.Turn("one", "yes"), dialogues.Turn("two", "no", ["no", "yes"], 0)]
    encoder = FakeDualEncoder(**{"Q: two? A: no": e[1], "Q: two? A: yes": -e[0]})
    (row,) = answers.score_answers_dual(encoder, dialogues.Dialogue("1", turns), [1], e[1] * 0.6 + e[0] * 0.8)
    assert row.tolist() == pytest.approx([0.6, -0.8])


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


def test_caption_metrics():
    """COCO's own figures for texts whose scores are known, whatever their punctuation and lines."""
    references = {"a": ["A cat sits on the mat.", "the cat is on a mat"], "b": ["Two dogs\nrun!", "dogs are running"]}
    perfect = captioning.caption_metrics(references, {"a": "a cat sits on the mat", "b": "two dogs run"})
    assert [perfect[f"BLEU-{n}"] for n in (1, 2, 3)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert perfect["ROUGE-L"] == pytest.approx(1)
    assert perfect["CIDEr"] > 2
    wrong = captioning.caption_metrics(references, {"a": "", "b": "seven"})
    assert wrong["BLEU-1"] < 1e-6 and wrong["CIDEr"] == 0
    # Unigrams: "the cat" of "the cat sleeps" are in a reference; brevity 3 against 6 words.
    partial = captioning.caption_metrics({"a": references["a"], "c": ["x y z"]}, {"a": "the cat sleeps", "c": "x y z"})
    assert partial["BLEU-1"] == pytest.approx(5 / 6 * math.exp(1 - 9 / 6), abs=1e-6)


def test_generated_captions_follow_the_training_layout(scripts):
    """The prompt is the image, then BOS, and the caption ends at a newline."""
    model, processor = scripts.model, scripts.processor
    pixels = processor.image_processor(
        [Image.open(IMAGES / f"img_{i:03d}.png").convert("RGB") for i in range(3)], return_tensors="pt"
    )["pixel_values"]
    features = model.get_pooled_image_features(pixels)
    texts = captioning.generate_captions(model, processor, features, max_new_tokens=5, batch_size=2)
    for row, text in zip(features, texts, strict=True):
        ids = [processor.image_token_id] * processor.num_image_tokens + [processor.tokenizer.bos_token_id]
        for _ in range(5):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), pooled_image_features=row[None]).logits[0, -1]
            logits[processor.image_token_id :] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in (2, 202):  # end, newline
                break
        written = processor.tokenizer.decode(ids[processor.num_image_tokens + 1 :], skip_special_tokens=True)
        assert text == written.split("\n")[0].strip()


# ---- what cannot be evaluated ----


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


def test_a_tower_without_a_text_half(tmp_path):
    with pytest.raises(ValueError, match="no text half"):
        DualEncoder.from_pretrained(str(PARITY / "case_a_opt_tied" / "vision_model"))


def test_dual_encoder_is_transformers_own(checkpoint):
    dual_encoder = DualEncoder.from_pretrained(str(checkpoint[1]))
    clip = CLIPModel.from_pretrained(checkpoint[1])
    images = [Image.open(IMAGES / f"img_{i:03d}.png").convert("RGB") for i in range(3)]
    texts = ["a cat", "two dogs run in the park"]
    pixels = torch.stack([dual_encoder.pixels(image) for image in images])
    inputs = dual_encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(pixel_values=pixels, **inputs).logits_per_image / clip.logit_scale.exp()
    cosines = dual_encoder.image_embeds(pixels) @ dual_encoder.text_embeds(texts).t()
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)


# ---- the README's table ----


def test_readme_table_is_rendered(tmp_path, monkeypatch):
    page = next(text for text in PAGES if "<!-- evaluate: rendered by training.evaluate -->" in text)
    assert stored_results.replace_between(page, "evaluate", [table.table()], "training.evaluate") == page
    published = read(stored_results.STORED / "published.json")["rows"]
    assert len(published) == 8
    rendered = table.table()
    stored = list(stored_results.STORED.glob("evaluate_*.json"))
    cells = [line.split("|")[-2].strip() for line in rendered.splitlines()[2:10]]
    assert any(cells) == bool(stored)  # nothing stands there without a run

    metrics = {"R@1": 0.183, "R@5": 0.4, "R@10": 0.5, "N": 4990, "MRR": 0.22, "NDCG": 0.166}
    model = {"language_model": "facebook/opt-6.7b", "vision_model": "openai/clip-vit-large-patch14",
             "num_image_tokens": 1}  # fmt: skip
    sis, visual = [{"file": "val.story-in-sequence.json"}], [{"file": "visdial_1.0_val.json"}]
    of_vist = {"table": "vist", "protocol": "paper", "model": model, "data": sis, "masking": vist.MASKS["shown"]}
    other = {"settings": {"1 caption": {"ours": {**metrics, "N": 1}}}}
    (tmp_path / "published.json").write_text(json.dumps({"rows": published}), encoding="utf-8")
    for name, result in {
        "a": {**of_vist, "settings": {"5 captions + 4 images": {"ours": metrics}}},
        "b": {"table": "visdial", "protocol": "corrected", "model": model, "data": visual,
              "answers": {"ours": metrics}},
        # Not of the paper's kind:
        "c": {**of_vist, **other, "model": {**model, "language_model": "another"}},
        "d": {**of_vist, **other, "model": {**model, "num_image_tokens": 4}},
        "e": {**of_vist, **other, "masking": vist.MASKS["none"]},
        "f": {**of_vist, **other, "data": [{"file": "test.story-in-sequence.json"}]},
        "g": {"table": "visdial", "protocol": "paper", "model": model, "data": visual,
              "dialogues": {"sampled": 1}, "answers": {"ours": {**metrics, "N": 1}}},
    }.items():  # fmt: skip
        (tmp_path / f"evaluate_{name}.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(stored_results, "STORED", tmp_path)
    rendered = table.table()
    assert "| 18.2 / 42.7 / 51.8 | 18.3 / 40.0 / 50.0 (N = 4,990) |" in rendered
    assert "16.6 / 22.0 / 18.3 / 40.0 / 50.0 (N = 4,990, corrected) |" in rendered and "(N = 1)" not in rendered
