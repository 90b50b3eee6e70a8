"""Hard negatives: drawn by the collator, in the loss, in runs."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from modeling_fromage import FromageDataCollator, FromageTrainer
from modeling_fromage.trainer.bad_examples import BadExampleError
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.batches import double_model, make_batch
from tests.helpers.distributed import make_trainer, save_averages
from tests.helpers.documents import make_batch as documents_and_pairs
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import arguments, examples
from training.data.captioned_images import load_captioned_images
from training.dry_run import describe_batch


def pixels(count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=generator)


def plain_contrastive_loss(model, batch, matches):
    """InfoNCE of all images against the texts, row by row; a copy of a text's own image is no negative of it."""
    images = torch.cat([batch["pixel_values"], batch["negative_pixel_values"]])
    of_batch = len(batch["pixel_values"])
    embeds = model.get_image_embeds(images)
    texts = model.get_text_embeds(batch["retrieval_input_ids"], batch["retrieval_attention_mask"])
    logits = model.adapter.logit_scale.exp() * texts @ embeds.t()
    losses = []
    for text, own in enumerate(matches):
        kept = [i for i in range(len(images)) if i < of_batch or not torch.equal(images[i], images[own])]
        losses.append(logits[text, kept].logsumexp(0) - logits[text, own])
        losses.append(logits[:, own].logsumexp(0) - logits[text, own])
    return torch.stack(losses).mean()


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt350m_vit", "gpt2_resnet"])
def test_a_copy_of_an_own_image_is_known_where_other_batches_round_otherwise(name):
    """In single precision, where one image alone has other features than beside others."""
    model = make_model(name).train()
    batch = make_batch(model, pixels(4).float(), list(range(4)))
    output = model(**batch, negative_pixel_values=batch["pixel_values"][1:2])
    logits = output.logits_per_image.detach().clone()
    assert torch.equal(logits[4], logits[1])
    logits[4, 1] = -torch.inf
    texts = torch.arange(4)
    expected = (F.cross_entropy(logits.t(), texts) + F.cross_entropy(logits[:4], texts)) / 2
    torch.testing.assert_close(output.contrastive_loss, expected)


@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "gradient cache"])
def test_negatives_are_images_that_no_text_is_to_find(chunk):
    model = double_model("opt_clip", gradient_cache_chunk_size=chunk)
    batch = make_batch(model, pixels(6), list(range(6)))
    without = model(**batch)
    batch["negative_pixel_values"] = torch.cat([pixels(3, seed=5), batch["pixel_values"][1:2]])  # and a copy
    output = model(**batch)
    assert output.logits_per_image.shape == (10, 6) and output.image_embeds.shape == without.image_embeds.shape
    torch.testing.assert_close(output.image_embeds, without.image_embeds)
    for name in ("captioning_loss", "ret_token_loss"):
        assert output[name] == without[name]
    expected = plain_contrastive_loss(model, batch, range(6))
    torch.testing.assert_close(output.contrastive_loss, expected, rtol=1e-10, atol=0)
    trained = [model.adapter.visual_projection.weight, model.adapter.text_projection[0].weight]
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, trained) for loss in (output.contrastive_loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_the_loss_of_sigmoids_takes_them_too():
    model = double_model("opt_clip", contrastive_loss_type="siglip")
    batch = make_batch(model, pixels(4), [0, 1, 2, 3])
    batch["negative_pixel_values"] = pixels(2, seed=5)
    output = model(**batch)
    signs = 2 * torch.eye(6, 4, dtype=torch.float64) - 1
    expected = -F.logsigmoid(signs * output.logits_per_image).sum() / 4
    torch.testing.assert_close(output.contrastive_loss, expected, rtol=1e-10, atol=0)


def test_cached_features_give_the_loss_that_pixels_give():
    model = double_model("opt_clip")
    batch = make_batch(model, pixels(4), [0, 1, 2, 3])
    negatives = pixels(3, seed=5)
    expected = model(**batch, negative_pixel_values=negatives).contrastive_loss
    features, of_negatives = (model.get_pooled_image_features(x) for x in (batch.pop("pixel_values"), negatives))
    cached = model(**batch, pooled_image_features=features, negative_image_features=of_negatives)
    torch.testing.assert_close(cached.contrastive_loss, expected, rtol=1e-10, atol=0)
    others = {"pooled_image_features": features}, {"pixel_values": pixels(4)}
    forms = {"negative_pixel_values": negatives}, {"negative_image_features": of_negatives}
    for mixed in (others[0] | forms[0], others[1] | forms[1]):
        with pytest.raises(ValueError, match="Negative images come as the images of texts do"):
            model(**batch, **mixed)


# Of each rank: captions, documents, and how many negatives.
SHARES = {
    "both have some": [([0, 1, 2], [], 2), ([3, 4], [], 1)],
    "one has none": [([0, 1, 2], [], 0), ([3, 4], [], 3)],
    "beside documents": [([0, 1], [], 1), ([2], [0, 1], 2)],
}


def worker(rank: int, folder: str):
    def of_this_rank(shares):
        first = sum(count for _, _, count in shares[:rank])
        captions, documents, count = shares[rank]
        return gradients_of(captions, documents, range(first, first + count))

    save_averages(rank, folder, ((case, of_this_rank(shares)) for case, shares in SHARES.items()))


def gradients_of(captions, documents, negatives):
    model = double_model("opt_clip")
    images = pixels(12, seed=3)
    batch = documents_and_pairs(model, images, captions, documents)
    if len(negatives):  # the first is a copy of the image of caption 0
        batch["negative_pixel_values"] = torch.cat([images[6:7], pixels(4, seed=5)])[list(negatives)]
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_two_processes_equal_one(tmp_path):
    run_ranks(worker, str(tmp_path))
    for case, (loss, grads) in torch.load(tmp_path / "result.pt", weights_only=True).items():
        (one, two, first), (three, four, second) = SHARES[case]
        expected_loss, expected = gradients_of(one + three, two + four, range(first + second))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0, msg=lambda m, case=case: f"{case}: {m}")
        for name, grad in grads.items():
            told = f"{case}, {name}"
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, t=told: f"{t}: {m}")


# ---- the collator --------------------------------------------------------------------------------------------------


def square(value: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (value, value, value))


def rows_with_negatives(folder, count: int = 4, negatives: int = 3) -> list[dict]:
    """Pairs of a grey square and its caption, each with lighter squares as negatives."""
    rows = []
    for number in range(count):
        paths = [folder / f"{number}-{other}.png" for other in range(negatives)]
        for other, path in enumerate(paths):
            square(100 + 10 * number + other).save(path)
        rows.append({"image": square(number), "caption": f"number {number}", "negative_images": list(map(str, paths))})
    return rows


def test_some_are_drawn_in_each_batch(tmp_path):
    rows, collator = rows_with_negatives(tmp_path), FromageDataCollator(make_processor())
    plain = collator([{"image": row["image"], "caption": row["caption"]} for row in rows])
    batch, again = collator(rows), collator(rows)
    assert list(batch)[-1] == "negative_pixel_values" and batch["negative_pixel_values"].shape[0] == 4
    for name in plain:
        assert torch.equal(plain[name], batch[name]), name
    assert torch.equal(batch["negative_pixel_values"], again["negative_pixel_values"])
    drawn = {
        FromageDataCollator(make_processor(), seed=seed)(rows)["negative_pixel_values"][0, 0, 0, 0].item()
        for seed in range(20)
    }
    assert len(drawn) == 3
    both = FromageDataCollator(make_processor(), hard_negatives=2)(rows[:3] + [{**rows[3], "negative_images": None}])
    values = both["negative_pixel_values"][:, 0, 0, 0]
    assert len(values) == 6 and len(values.unique()) == 6
    for quiet in ({"hard_negatives": 0}, {"training": False}):
        assert "negative_pixel_values" not in FromageDataCollator(make_processor(), **quiet)(rows)
    with pytest.raises(ValueError, match="`hard_negatives` is a number of images"):
        FromageDataCollator(make_processor(), hard_negatives=-1)


def test_one_that_cannot_be_read_is_passed_over(tmp_path):
    rows = rows_with_negatives(tmp_path, count=1)
    for path in rows[0]["negative_images"][:2]:
        open(path, "wb").close()
    collators = [FromageDataCollator(make_processor(), seed=seed) for seed in range(8)]
    values = {collator(rows)["negative_pixel_values"][0, 0, 0, 0].item() for collator in collators}
    assert len(values) == 1
    open(rows[0]["negative_images"][2], "wb").close()
    with pytest.raises(BadExampleError, match="no usable negative image"):
        collators[0](rows)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"negative_images": "a.png"}, "negative_images is no list"),
        ({"negative_image_features": [[0.0] * 24]}, "negative_image_features with an image"),
        ({"pooled_image_features": [0.0] * 24}, "negative_images with cached features.*Train without `feature_cache`"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, words):
    (row,) = rows_with_negatives(tmp_path, count=1)
    with pytest.raises(BadExampleError, match=f"Example 0 of the batch: {words}"):
        FromageDataCollator(make_processor())([row | change])
    assert "negative_pixel_values" not in FromageDataCollator(make_processor(), hard_negatives=0)([row | change])


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_on_a_table(tmp_path):
    rows = rows_with_negatives(tmp_path, count=6)
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / f"{number}.png")
        row |= {"image": f"{number}.png", "negative_images": [path.split("/")[-1] for path in row["negative_images"]]}
    rows[5]["negative_images"] = None
    table, parquet = tmp_path / "mined.jsonl", tmp_path / "mined.parquet"
    table.write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(parquet)
    batches = []
    for source, streaming in ((table, False), (table, True), (parquet, True), (parquet, False)):
        dataset = load_captioned_images(str(source), streaming=streaming)
        batches.append(FromageDataCollator(make_processor())([dataset[i] for i in range(6)]))
        assert batches[-1]["negative_pixel_values"].shape[0] == 5
        for name, tensor in batches[-1].items():
            assert torch.equal(tensor, batches[0][name]), name
    data = load_captioned_images(str(table))
    trainer = FromageTrainer(
        make_model("opt_clip"), arguments(tmp_path / "run", per_device_train_batch_size=3, max_steps=4),
        FromageDataCollator(make_processor()), train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "contrastive_loss" in entry]
    assert len(logged) == 4 and "text_to_image_accuracy" not in logged[0]  # of rectangular logits there is none
    assert trainer.evaluate()["eval_num_pairs"] == 6


def test_bad_ones_are_skipped_with_their_example(tmp_path):
    rows = rows_with_negatives(tmp_path, count=6)
    for path in rows[2]["negative_images"]:
        open(path, "wb").close()
    options = {"train_dataset": rows, "on_bad_example": "skip", "max_bad_share": 0.5}
    args = arguments(tmp_path / "run", per_device_train_batch_size=3, max_steps=2)
    FromageTrainer(make_model("opt_clip"), args, FromageDataCollator(make_processor()), **options).train()
    (entry,) = map(json.loads, (tmp_path / "run" / "_bad_examples.jsonl").read_text().splitlines())
    assert (entry["number"], entry["reason"]) == (2, "no usable negative image")


def test_cached_features_of_negatives_train(tmp_path):
    rows = examples(8)
    for row, other in zip(rows, reversed(examples(16)), strict=False):
        row["negative_image_features"] = [other["pooled_image_features"]]
    trainer = make_trainer(tmp_path, data=rows, max_steps=2)
    batch = trainer.data_collator(rows[:3])
    assert batch["negative_image_features"].shape == (3, 24)
    assert "3 hard negatives in the first batch" in describe_batch(trainer, batch)[1]
    trainer.train()
