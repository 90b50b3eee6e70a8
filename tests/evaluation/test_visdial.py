"""Visual Dialog: the original's numbers, the protocols by definition, and end to end on files with broken entries."""

import json
import math

import pytest
import torch
from PIL import Image

from tests.helpers.evaluation import LOSSES, dialogue_images, png, read, run, spy, visdial_file
from tests.helpers.paths import IMAGES
from training.evaluation import answers, dialogues, visdial


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
