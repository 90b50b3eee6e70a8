"""Captioned images: generation, perplexity and retrieval, against brute force and end to end."""

import base64
import json
import math

import pytest
import torch
from PIL import Image

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.index.reranking import rerank_by_likelihood
from tests.helpers.evaluation import (
    png,
    read,
    run,
)
from tests.helpers.paths import IMAGES
from training.evaluation import captioning
from training.evaluation.metrics import rank_metrics, reranked_ranks, retrieval_metrics


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


def test_reranked_ranks_by_brute_force():
    """Images that are not among the nearest keep their ranks; ties count against."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.nn.functional.normalize(torch.randn(20, 4, generator=generator), dim=-1) for _ in range(2))
    images[5] = images[4]
    anew = torch.randn(20, 20, generator=generator).round(decimals=1)
    ranks = reranked_ranks(texts, images, torch.arange(20), 6, lambda text, nearest, cosines: anew[text, nearest])
    for text in range(20):
        cosines = images @ texts[text]
        order = cosines.argsort(descending=True, stable=True).tolist()
        rank = int((cosines >= cosines[text] - 1e-6).sum())
        if rank <= 6:
            assert ranks[text] == sum(anew[text, i] >= anew[text, text] - 1e-6 for i in order[:6]), text
        else:
            assert ranks[text] == rank, text
    assert (ranks <= 6).sum() > 3 and (ranks > 6).sum() > 3


def test_reranked_ranks_with_several_queries_a_text():
    """The nearest are those of the largest cosine of any query."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (
        torch.nn.functional.normalize(torch.randn(20, *shape, generator=generator), dim=-1) for shape in ((3, 4), (4,))
    )
    seen = {}
    ranks = reranked_ranks(texts, images, torch.arange(20), 6, lambda text, *nearest: seen.setdefault(text, nearest)[1])
    for text in range(20):
        best = (images @ texts[text].t()).amax(1)
        assert ranks[text] == (best >= best[text] - 1e-6).sum()
        if text in seen:
            torch.testing.assert_close(seen[text][1], best.topk(6).values)
    assert 3 < len(seen) < 20


def test_retrieval_with_reranking(checkpoint, tmp_path):
    """All images reranked: the ranks are those of the likelihoods alone."""
    folder = tmp_path / "images"
    folder.mkdir()
    captions = ["a red cat on a mat", "two dogs", "a bird", "a tree in the wind"]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(json.dumps({"image": f"images/{n}.png", "caption": c}) for n, c in enumerate(captions)))
    plain, output = tmp_path / "plain.json", tmp_path / "reranked.json"
    run("captions", checkpoint[0], "--data", table, "--tasks", "retrieval", "--output", plain)
    run("captions", checkpoint[0], "--data", table, "--tasks", "retrieval", "--output", output, "--rerank", "50")
    found = read(output)["retrieval"]["text_to_image"]
    assert found["ours"] == read(plain)["retrieval"]["text_to_image"]["ours"]
    model = FromageForConditionalGeneration.from_pretrained(checkpoint[0]).eval()
    processor = FromageProcessor.from_pretrained(checkpoint[0])
    pictures = [Image.open(folder / f"{number}.png").convert("RGB") for number in range(4)]
    scores = torch.stack(rerank_by_likelihood(model, processor, captions, [pictures] * 4))
    assert found["reranked"] == rank_metrics((scores >= scores.diagonal()[:, None] - 1e-6).sum(-1))
