"""Retrieval of the images of documents: contexts, candidates, and figures against a plain search per query."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.helpers.backbones import make_model, make_processor
from tests.helpers.evaluation import png, read, run
from training.evaluation import DocumentsEvaluator
from training.evaluation.documents import make_prompts, queries_of, read_documents


def image(number):
    return {"type": "image", "image": f"{number}.png"}


DOCUMENTS = [
    ["one", image(0), "two", image(1), image(2), " three", image(3)],
    [image(4), "four", image(5), "five", image(0)],
    ["six"],
    ["seven", {"type": "image", "image": "missing.png"}, "eight", image(6)],
    ["a [RET]", image(7)],
    "no list",
]


@pytest.fixture
def pages(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    shutil.copy(tmp_path / "1.png", tmp_path / "5.png")  # a copy: one image of the gallery
    lines = [json.dumps({"document": document}) for document in DOCUMENTS]
    (tmp_path / "pages.jsonl").write_text("\n".join(lines))
    return tmp_path / "pages.jsonl"


def plain_ranks(model, processor, folder, texts, with_images):
    """Of each query, by a search of its own over pixels."""
    embeds, names = [], []
    for number in (0, 1, 2, 3, 4, 6):  # 5 is a copy of 1
        picture = Image.open(folder / f"{number}.png").convert("RGB")
        inputs = processor.image_processor(picture, return_tensors="pt")
        embeds.append(model.get_image_embeds(inputs["pixel_values"])[0])
        names.append(number)
    ranks = []
    for document in (DOCUMENTS[0], DOCUMENTS[1], [part for part in DOCUMENTS[3] if part != DOCUMENTS[3][1]]):
        for place, part in enumerate(document):
            before = document[:place]
            if isinstance(part, str) or not any(isinstance(each, str) for each in before):
                continue
            starts = [i for i, each in enumerate(before) if isinstance(each, str)]
            first = 0 if texts is None else starts[max(0, len(starts) - texts)]
            context = [each for each in before[first:] if with_images or isinstance(each, str)]
            text = "".join(each if isinstance(each, str) else "<|image|>" for each in context) + "[RET]"
            shown = [Image.open(folder / each["image"]).convert("RGB") for each in context if not isinstance(each, str)]
            inputs = processor(text=text, images=shown or None, return_tensors="pt")
            query = model.get_text_embeds(**inputs)[0]
            earlier = {_number(each) for each in before if not isinstance(each, str)} - {_number(part)}
            scores = {name: F.cosine_similarity(query, embed, dim=0).item() for name, embed in
                      zip(names, embeds, strict=True) if name not in earlier}  # fmt: skip
            ranks.append(sorted(scores, key=scores.get, reverse=True).index(_number(part)) + 1)
    return torch.tensor(ranks)


def _number(part):
    number = int(part["image"].partition(".")[0])
    return 1 if number == 5 else number


@torch.no_grad()
def test_figures_are_those_of_a_search_for_each_query(pages):
    model, processor = make_model("opt_clip", ret_token_id=501), make_processor()
    found = DocumentsEvaluator(data=str(pages), texts=[1, 2]).run(model, processor)
    assert found.results["denominator"]["N"] == 7 and found.results["gallery"]["N"] == 6
    assert found.results["documents"] == {
        "read": 4,
        "left_out": {"a special token in a text": 1, "a malformed document": 1, "an image that cannot be read": 1},
    }
    for name, texts, with_images in (("1 text", 1, False), ("2 texts + images", 2, True), ("all texts", None, False),
                                     ("all texts + images", None, True)):  # fmt: skip
        ranks = plain_ranks(model, processor, pages.parent, texts, with_images)
        figures = found.results["contexts"][name]["ours"]
        assert figures["mean_rank"] == pytest.approx(ranks.double().mean().item()), name
        assert figures["R@1"] == pytest.approx((ranks == 1).double().mean().item()), name
        low, high = figures["95%"]["R@5"]
        assert low <= figures["R@5"] <= high
    metrics = DocumentsEvaluator(data=str(pages))(model, processor)
    assert metrics[DocumentsEvaluator(data=str(pages)).primary_metric] >= 0


def test_contexts_and_prompts(pages):
    processor = make_processor()
    documents = read_documents(str(pages), processor)
    usable = type("Images", (), {"__contains__": lambda self, name: True})()
    query = queries_of(documents, usable)[3]
    texts = processor.tokenizer.decode
    for length, with_images, expected in (
        (1, True, "</s> three[RET]"),
        (2, False, "</s>two three[RET]"),
        (2, True, "</s>two<|image|><|image|> three[RET]"),
        (None, True, "</s>one<|image|>two<|image|><|image|> three[RET]"),
    ):
        prompts = make_prompts(processor, [query.context(length, with_images)], 512, rets_in_context=False)
        assert texts(prompts.ids[0]).replace("<|image|><|image|>", "<|image|>") == expected
        assert len(prompts.images[0]) == expected.count("image") and prompts.num_cut == 0
    with_rets = make_prompts(processor, [query.context(None, True)], 512, rets_in_context=True)
    assert texts(with_rets.ids[0]).count("[RET]") == 4
    for limit in range(2, 20):
        cut = make_prompts(processor, [query.context(None, True)], limit, rets_in_context=False)
        assert len(cut.ids[0]) <= limit and cut.ids[0][-1] == processor.ret_token_id
        assert cut.ids[0].count(processor.image_token_id) == 2 * len(cut.images[0])


def test_the_command_writes_results(pages, tmp_path):
    model, processor = make_model("opt_clip", ret_token_id=501), make_processor()
    model.save_pretrained(tmp_path / "model", save_backbones=True)
    processor.save_pretrained(tmp_path / "model")
    output = tmp_path / "out.json"
    run("documents", tmp_path / "model", "--data", pages, "--texts", 1, "--output", output, "--rets-in-context")
    results = read(output)
    assert set(results["contexts"]) == {"1 text", "1 text + images", "all texts", "all texts + images"}
    assert results["rets_in_context"] is True and results["data"][0]["file"] == "pages.jsonl"


def test_what_are_no_documents_is_refused(tmp_path):
    (tmp_path / "pairs.tsv").write_text("caption\timage\na\tb.png\n")
    with pytest.raises(ValueError, match="captioned images, not documents.*`captions`"):
        read_documents(str(tmp_path / "pairs.tsv"), make_processor())
