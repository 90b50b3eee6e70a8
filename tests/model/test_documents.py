"""Training on documents against a plain pass: the LM as it is, one sequence at a time, over all its vocabulary."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modeling_fromage import FromageDataCollator
from modeling_fromage.losses_fromage import contrastive_loss
from tests.helpers.backbones import make_processor
from tests.helpers.batches import CAPTIONS, IMAGE, RET, double_model
from tests.helpers.documents import document_rows, make_batch
from tests.helpers.stacked import PlainPass


def plain_losses(model, pixels, captions=()):
    adapter, k = model.adapter, model.config.num_image_tokens
    shown = [*range(6), *(6 + caption for caption in captions)]
    pooled = model.get_pooled_image_features(pixels[shown])
    visual = adapter.multi_modal_projector(pooled).unflatten(-1, (k, -1))
    captioning, rets, texts, targets, image = [], [], [], [], 0
    for ids, labels, finds in document_rows(k):
        one = PlainPass(model, ids, visual[image : image + 2])
        image += 2
        words, of_rets = one.losses(labels)
        captioning, rets = captioning + words, rets + of_rets
        places = [place for place, found in enumerate(finds) if found >= 0]
        texts += [one.queries(place)[0] for place in places]
        targets += [finds[place] for place in places]
    for number, caption in enumerate(captions, start=image):
        words = [-100] * k + CAPTIONS[caption]
        captioning += PlainPass(model, [IMAGE] * k + CAPTIONS[caption], visual[number][None]).losses(words)[0]
        text = CAPTIONS[caption] + [RET]
        one = PlainPass(model, text)
        rets += sum(one.losses(text), [])
        texts.append(one.queries(len(text) - 1)[0])
        targets.append(number)
    images, targets = F.normalize(adapter.visual_projection(pooled), dim=-1), torch.tensor(targets)
    similarity = images @ torch.stack(texts).t() * adapter.logit_scale.exp()
    to_images = F.cross_entropy(similarity.t(), targets)
    to_texts = F.cross_entropy(similarity[targets], torch.arange(len(targets)))
    return {
        "captioning_loss": torch.stack(captioning).mean(),
        "ret_token_loss": torch.stack(rets).mean(),
        "contrastive_loss": (to_images + to_texts) / 2,
    }


@pytest.mark.parametrize("captions", [(), (0, 3)], ids=["documents alone", "with pairs"])
@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "gradient cache"])
@pytest.mark.parametrize("name", ["opt_clip", "opt350m_vit", "gpt2_resnet", "llama_clip", "mistral_vit"])
def test_losses_and_gradients_are_those_of_a_plain_pass(name, chunk, captions):
    layers = [1, -1] if name == "opt_clip" else [-1]
    model = double_model(name, num_image_tokens=2, text_embed_layers=layers, gradient_cache_chunk_size=chunk)
    pixels = torch.rand(10, 3, 32, 32, dtype=torch.double)
    batch = make_batch(model, pixels, captions)
    output = model(**batch)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = plain_losses(model, pixels, captions)
    for loss, value in expected.items():
        torch.testing.assert_close(output[loss], value, rtol=1e-9, atol=1e-9, msg=lambda m, loss=loss: f"{loss}: {m}")
    sum(expected.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == {name for name, gradient in gradients.items() if gradient is not None}
    for name, gradient in found.items():
        assert (gradient - gradients[name]).norm() <= 1e-8 * gradients[name].norm(), name
    finds = batch["ret_targets"]
    numbers = torch.tensor([*finds[finds != -100].tolist(), *range(6, 6 + len(captions))])
    assert torch.equal(output.image_embeds, model.get_image_embeds(batch["pixel_values"])[numbers])
    assert output.logits_per_image.shape == (6 + len(captions), len(numbers))


def test_a_pass_with_logits_gives_the_same_losses():
    model = double_model("opt_clip").eval()
    batch = make_batch(model, torch.rand(6, 3, 32, 32, dtype=torch.double))
    with torch.no_grad():
        output, alone = model(**batch), model(**batch, return_logits=False)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       pixel_values=batch["pixel_values"]).logits  # fmt: skip
    assert alone.logits is None and torch.equal(output.logits, logits)
    for name in ("loss", "captioning_loss", "ret_token_loss", "contrastive_loss"):
        torch.testing.assert_close(output[name], alone[name])


def test_an_image_that_no_text_is_to_find_is_a_negative():
    logits = torch.randn(5, 3, dtype=torch.double)
    matches = torch.tensor([4, 0, 2])
    expected = (F.cross_entropy(logits.t(), matches) + F.cross_entropy(logits[matches], torch.arange(3))) / 2
    torch.testing.assert_close(contrastive_loss(logits, matches=matches), expected)
    duplicates = torch.zeros(5, 5, dtype=torch.bool)
    duplicates[1, 4] = duplicates[4, 1] = True
    without = logits.clone()
    without[1, 0] = -torch.inf  # image 1 is another copy of image 4, which text 0 is to find
    expected = (F.cross_entropy(without.t(), matches) + F.cross_entropy(without[matches], torch.arange(3))) / 2
    torch.testing.assert_close(contrastive_loss(logits, duplicates, matches), expected)
    assert contrastive_loss(torch.zeros(4, 0, requires_grad=True)).item() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "come with `labels`"),
        ({"ret_targets": torch.full((3, 14), 7)}, "name images .*7.*there are 6"),
        ({"position_ids": torch.arange(14)[None]}, "without other options.*position_ids"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    model = double_model("opt_clip")
    batch = make_batch(model, torch.rand(6, 3, 32, 32, dtype=torch.double))
    with pytest.raises(ValueError, match=words):
        model(**batch | change)


# ---- layout ---------------------------------------------------------------------------------------------------------


def collate(*documents, processor=None, **options):
    """Examples with cached features of nine images each, whose first entry is their number."""
    processor = processor or make_processor()
    examples = [
        {"pooled_image_features": torch.arange(9.0)[:, None] + 10 * row, **document}
        for row, document in enumerate(documents)
    ]
    return processor, FromageDataCollator(processor, **options)(examples)


def text_of(processor, ids, mask):
    return processor.tokenizer.decode(ids[mask.bool()]).replace("<|image|>" * processor.num_image_tokens, "<|image|>")


def test_a_document_is_laid_out_as_the_pipeline_lays_out_a_prompt():
    parts = ["A cat ", {"type": "image", "url": "x.png"}, " and a dog", {"type": "image", "image": "y.png"}, "."]
    processor, batch = collate({"document": parts})
    ids, finds, labels = (batch[name][0] for name in ("input_ids", "ret_targets", "labels"))
    assert text_of(processor, ids, batch["attention_mask"][0]) == "</s>A cat [RET]<|image|> and a dog[RET]<|image|>."
    prompt = processor(text="A cat [RET]<|image|> and a dog[RET]<|image|>.", images=[red(), red()])
    assert ids.tolist() == prompt["input_ids"][0]
    rets = ids == processor.ret_token_id
    assert finds[rets].tolist() == [0, 1] and (finds[~rets] == -100).all()
    assert torch.equal(labels, ids.masked_fill(ids == processor.image_token_id, -100))
    assert batch["pooled_image_features"].flatten().tolist() == [0, 1]
    assert "retrieval_input_ids" not in batch


def test_an_image_that_nothing_precedes_is_not_to_be_found():
    image = {"type": "image", "image": "x.png"}
    processor, batch = collate({"document": [image, image, "Both."]})
    assert text_of(processor, batch["input_ids"][0], batch["attention_mask"][0]) == "<|image|></s>[RET]<|image|>Both."
    assert batch["ret_targets"][batch["ret_targets"] != -100].tolist() == [1]


def test_of_a_chat_the_images_of_the_assistant_are_to_be_found():
    image = {"type": "image", "image": "x.png"}
    chat = [
        {"role": "user", "content": ["Like this?", image]},
        {"role": "assistant", "content": [{"type": "text", "text": "Rather:"}, image]},
    ]
    processor, batch = collate({"messages": chat})
    text = text_of(processor, batch["input_ids"][0], batch["attention_mask"][0])
    assert text == "</s>Q: Like this?<|image|>\nA: Rather:[RET]<|image|>\n"
    assert batch["ret_targets"][batch["ret_targets"] != -100].tolist() == [1]


def test_pairs_and_documents_of_a_batch_keep_their_order():
    image = {"type": "image", "image": "x.png"}
    pair = {"caption": "a cat", "pooled_image_features": torch.full((1,), 50.0)}
    processor, batch = collate({"document": ["one", image, "two", image]}, pair, {"document": ["three", image]})
    assert batch["pooled_image_features"].flatten().tolist() == [0, 1, 50, 20]
    assert batch["retrieval_targets"].tolist() == [2] and len(batch["retrieval_input_ids"]) == 1
    finds = [row[row != -100].tolist() for row in batch["ret_targets"]]
    assert finds == [[0, 1], [], [3]]
    texts = [text_of(processor, *row) for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert texts == ["</s>one[RET]<|image|>two[RET]<|image|>", "<|image|></s>a cat", "</s>three[RET]<|image|>"]


@pytest.mark.parametrize("length", range(2, 14))
def test_a_long_document_ends_before_an_image_that_has_no_room(length):
    image = {"type": "image", "image": "x.png"}
    document = {"document": ["one", image, "two", image, image, " three"]}
    processor = make_processor(num_image_tokens=3)
    whole = collate(document, processor=processor)[1]["input_ids"][0].tolist()
    try:
        batch = collate(document, processor=processor, max_document_length=length)[1]
    except ValueError as error:
        assert "document without an image" in str(error) and length < whole.index(processor.image_token_id) + 3
        return
    ids = batch["input_ids"][0].tolist()
    assert len(ids) <= length and ids == whole[: len(ids)]
    images, rets = ids.count(processor.image_token_id), ids.count(processor.ret_token_id)
    assert images % 3 == 0 and images // 3 == rets == len(batch["pooled_image_features"])
    # What comes next is what had no room: one token, or an image and its [RET].
    assert len(ids) == len(whole) or len(ids) == length or whole[len(ids)] == processor.ret_token_id


def test_images_are_shown_without_a_ret_by_chance():
    image = {"type": "image", "image": "x.png"}
    documents = [{"document": [f"text {row}", image, "more", image]} for row in range(40)]
    processor, batch = collate(*documents, document_ret_prob=0.5)
    counts = (batch["ret_targets"] != -100).sum(1)
    assert counts.min() == 0 and counts.max() == 2 and 25 < counts.sum() < 55
    rets = batch["input_ids"] == processor.ret_token_id
    assert torch.equal(rets, batch["ret_targets"] != -100)
    assert ((batch["input_ids"] == processor.image_token_id).sum(1) == 4).all()
    assert torch.equal(collate(*documents, document_ret_prob=0.5)[1]["input_ids"], batch["input_ids"])
    held_out = collate(*documents, document_ret_prob=0.5, training=False)[1]
    assert ((held_out["ret_targets"] != -100).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] | replace('[RET]', '[RET]\n') }}{% endfor %}", "2 apart from their"),
        ("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}", "shows 1 of 2 images"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "shows 4 of 2 images"),
    ],
)
def test_a_chat_template_that_moves_images_is_told_of(template, words):
    """Else a `[RET]` would be to find an image of another document."""
    processor = make_processor()
    processor.chat_template = template
    chat = [{"role": "assistant", "content": [text, {"type": "image", "image": "x.png"}]} for text in ("one", "two")]
    with pytest.raises(ValueError, match=words):
        collate({"messages": chat}, processor=processor)


def test_a_row_that_teaches_nothing_has_no_part_in_a_chunk_of_its_own():
    model = double_model("opt_clip", gradient_cache_chunk_size=1)
    batch = make_batch(model, torch.rand(6, 3, 32, 32, dtype=torch.double))
    batch["labels"][1], batch["ret_targets"][1] = -100, -100
    output = model(**batch)
    model.config.gradient_cache_chunk_size = None
    torch.testing.assert_close(model(**batch).loss, output.loss)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"document": ["a [RET] b", {"type": "image"}]}, "special token"),
        ({"document": ["text alone"]}, "without an image"),
        ({"document": []}, "malformed document"),
        ({"document": [""]}, "without an image"),
        ({"document": "a text"}, "malformed document"),
        ({"document": ["a", {"type": "video"}]}, "malformed document"),
        ({"document": ["a", {"type": "ret"}, {"type": "image"}]}, "Leave parts of type 'ret' out"),
        ({"messages": [{"role": "user", "content": 7}]}, "malformed document"),
        ({"document": ["a", {"type": "image"}] * 10}, "cached features of fewer images"),
        ({"document": ["a \ud83d", {"type": "image"}]}, "not Unicode"),
    ],
)
def test_a_bad_document_is_told_by_its_reason(document, words):
    with pytest.raises(ValueError, match=words):
        collate(document)


def red():
    return Image.new("RGB", (8, 8), "red")
