"""SigLIP's loss, smoothed labels and the largest scale, against a plain computation in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch.nn import functional as F

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.losses_fromage import contrastive_loss, duplicate_mask, sigmoid_loss
from tests.helpers.backbones import make_model
from tests.helpers.batches import RET, double_model, make_batch
from tests.helpers.checkpoints import TRAINED_KEYS, assemble, keys_of
from tests.helpers.documents import make_batch as documents_and_pairs
from tests.helpers.paths import PARITY
from tests.helpers.strangers import ask_stranger

BACKBONES = PARITY / "case_a_opt_tied"
OPTIONS = {
    "siglip": {"contrastive_loss_type": "siglip"},
    "siglip without duplicates": {"contrastive_loss_type": "siglip", "mask_duplicate_images": True},
    "smoothed": {"contrastive_label_smoothing": 0.2, "captioning_label_smoothing": 0.1},
    "smoothed without duplicates": {"contrastive_label_smoothing": 0.3, "mask_duplicate_images": True},
}


def brute_force(logits, images, matches, config):
    """The contrastive loss of logits (N, M), pair by pair; `images` (N,) are numbers, equal for equal images."""
    count, smoothing = logits.shape[1], config.contrastive_label_smoothing

    def is_candidate(i, j):
        is_copy = images[i] == images[matches[j]] and i != matches[j]
        return not (config.mask_duplicate_images and is_copy)

    if config.contrastive_loss_type == "siglip":
        signs = [[1 if matches[j] == i else -1 for j in range(count)] for i in range(len(logits))]
        losses = [
            -(signs[i][j] * logits[i, j]).sigmoid().log()
            for i in range(len(logits))
            for j in range(count)
            if is_candidate(i, j)
        ]
        return sum(losses) / count
    total = 0
    for j, own in enumerate(matches):
        of_text = torch.stack([logits[i, j] for i in range(len(logits)) if is_candidate(i, j)])
        of_image = torch.stack([logits[own, m] for m in range(count) if is_candidate(own, m)])
        for values in (of_text, of_image):
            loss = values.logsumexp(0) - (1 - smoothing) * logits[own, j] - smoothing * values.mean()
            total = total + loss / (2 * count)
    return total


def plain_losses(model, batch):
    """The three losses of a batch, from the model's logits and hidden states of plain, padded passes."""
    config, adapter = model.config, model.adapter
    rows = model.get_output_embeddings().weight.shape[0]
    columns = [*range(min(rows, RET)), RET]  # that have a logit

    def token_losses(logits, targets, smoothing=0.0):
        targets = torch.where(targets == RET, len(columns) - 1, targets)
        return F.cross_entropy(logits[..., columns], targets, reduction="none", label_smoothing=smoothing)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    out, labels = model(**inputs, output_hidden_states=True), batch["labels"][:, 1:]
    is_target, is_ret = labels != -100, labels == RET
    smoothing = config.captioning_label_smoothing
    logits, captions = out.logits[:, :-1], is_target & ~is_ret
    captioning = token_losses(logits[captions], labels[captions], smoothing).mean()
    ret_losses, texts, matches = [token_losses(logits[is_ret], labels[is_ret])], [], []
    if (ids := batch.get("retrieval_input_ids")) is not None:
        mask = batch["retrieval_attention_mask"].bool()
        found = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        ret_losses.append(token_losses(found.logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]]))
        texts.append(found.hidden_states[-1][ids == RET])
        matches += batch.get("retrieval_targets", torch.arange(len(ids))).tolist()
    if "ret_targets" in batch:
        finds = batch["ret_targets"] != -100
        texts.append(out.hidden_states[-1][finds])
        matches += batch["ret_targets"][finds].tolist()
    images, texts = model.get_image_embeds(batch["pixel_values"]), adapter.text_embeds([torch.cat(texts)])
    similarity = adapter.logit_scale.exp() * images @ texts.t()
    if adapter.logit_bias is not None:
        similarity = similarity + adapter.logit_bias
    numbers = batch["pixel_values"].flatten(1).unique(dim=0, return_inverse=True)[1].tolist()
    return {
        "captioning_loss": captioning,
        "ret_token_loss": torch.cat(ret_losses).mean(),
        "contrastive_loss": brute_force(similarity, numbers, matches, config),
    }


def assert_same(model, batch):
    output, expected = model(**batch), plain_losses(model, batch)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=1e-10, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(loss, list(trained.values())) for loss in (output.loss, sum(expected.values())))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm(), name
    return trained


def pixels_with_a_copy():
    pixels = torch.rand(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pixels[4] = pixels[1]
    return pixels


@pytest.mark.parametrize("variant", ["whole", "gradient cache", "documents", "documents, gradient cache"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["opt_clip", "llama_clip"])
def test_losses_and_gradients_are_those_of_a_plain_pass(name, option, variant):
    chunk = 2 if "gradient cache" in variant else None
    model = double_model(name, gradient_cache_chunk_size=chunk, **OPTIONS[option])
    pixels = pixels_with_a_copy()
    if "documents" in variant:
        pixels = torch.rand(10, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        pixels[4] = pixels[7] = pixels[1]
        batch = documents_and_pairs(model, pixels, [0, 1, 3], [0, 2])
    else:
        batch = make_batch(model, pixels, list(range(6)))
    trained = assert_same(model, batch)
    assert ("adapter.logit_bias" in trained) == (model.config.contrastive_loss_type == "siglip")


@pytest.mark.parametrize("option", OPTIONS)
def test_options_beside_lora(option):
    model = double_model("opt_clip", **OPTIONS[option])
    target = r"language_model\..*\.(q_proj|v_proj)"
    model.add_adapter(LoraConfig(r=2, target_modules=target, modules_to_save=["adapter"], init_lora_weights=False))
    model.double().train()
    model.adapter.double()
    assert_same(model, make_batch(model, pixels_with_a_copy(), list(range(6))))


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_captioning_with_smoothed_labels_where_logits_are_asked_for(head_is_trained):
    """The other two ways that token losses are computed: beside logits, and with a head that is trained."""
    model = double_model("gpt2_resnet", captioning_label_smoothing=0.1)
    model.get_output_embeddings().weight.requires_grad_(head_is_trained)
    batch = make_batch(model, pixels_with_a_copy(), list(range(6)))
    expected = plain_losses(model, batch)["captioning_loss"]
    torch.testing.assert_close(model(**batch, return_logits=True).captioning_loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(model(**batch).captioning_loss, expected, rtol=1e-10, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).captioning_loss, expected, rtol=1e-10, atol=0)


def test_an_evaluation_smooths_no_labels():
    plain = make_model("opt_clip").eval()
    options = {"contrastive_label_smoothing": 0.5, "captioning_label_smoothing": 0.5}
    model = make_model("opt_clip", **options).eval()
    model.load_state_dict(plain.state_dict())
    batch = make_batch(model, pixels_with_a_copy().float(), [0, 1, 2])
    found, expected = model(**batch), plain(**batch)
    assert found.captioning_loss == expected.captioning_loss and found.contrastive_loss == expected.contrastive_loss
    smoothed, sharp = model.train()(**batch), plain.train()(**batch)
    assert smoothed.captioning_loss != sharp.captioning_loss and smoothed.contrastive_loss != sharp.contrastive_loss


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.data())
def test_losses_of_rectangular_logits_by_brute_force(images, seed, data):
    """Images that no text is to find are negatives, and copies of an image are none."""
    places = st.lists(st.integers(0, len(images) - 1), min_size=1, unique=True)
    matches = data.draw(places)
    logits = torch.randn(
        len(images), len(matches), dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**31)
    )
    duplicates, found = duplicate_mask(torch.tensor(images)[:, None]), torch.tensor(matches)
    for options in OPTIONS.values():
        config = FromageConfig(**options)
        masked = duplicates if config.mask_duplicate_images else None
        if config.contrastive_loss_type == "siglip":
            loss = sigmoid_loss(logits, masked, found)
        else:
            loss = contrastive_loss(logits, masked, found, config.contrastive_label_smoothing)
        torch.testing.assert_close(loss, brute_force(logits, images, matches, config), rtol=1e-10, atol=1e-12)


def test_closed_forms():
    assert sigmoid_loss(torch.zeros(7, 7)).item() == pytest.approx(7 * math.log(2))
    assert sigmoid_loss(torch.zeros(4, 0)).item() == 0
    assert contrastive_loss(torch.zeros(7, 7), smoothing=0.3).item() == pytest.approx(math.log(7))


def test_the_bias_is_trained_saved_and_loaded(tmp_path):
    model, _ = assemble(BACKBONES, contrastive_loss_type="siglip")
    assert model.adapter.logit_bias.item() == -10
    assert model.adapter.logit_scale.item() == pytest.approx(math.log(10))
    torch.nn.init.constant_(model.adapter.logit_bias, -3.5)
    model.save_pretrained(tmp_path, save_backbones=False)
    assert keys_of(tmp_path) == {*TRAINED_KEYS, "adapter.logit_bias"}
    again = FromageForConditionalGeneration.from_pretrained(tmp_path)
    assert again.adapter.logit_bias.item() == -3.5 and again.config.contrastive_loss_type == "siglip"
    plain, _ = assemble(BACKBONES)
    assert plain.adapter.logit_bias is None
    plain.save_pretrained(tmp_path / "plain", save_backbones=False)
    with pytest.raises(ValueError, match=r"logit_bias is missing"):
        FromageForConditionalGeneration.from_pretrained(tmp_path / "plain", contrastive_loss_type="siglip")


def test_a_stranger_keeps_the_bias(tmp_path):
    """By the code that the checkpoint carries, in a process that has not this package."""
    model, processor = assemble(BACKBONES, contrastive_loss_type="siglip", logit_scale_max=50.0)
    torch.nn.init.constant_(model.adapter.logit_bias, -3.5)
    model.save_pretrained(tmp_path / "model", save_backbones=True)
    processor.save_pretrained(tmp_path / "model")
    ask_stranger(tmp_path / "model", tmp_path)
    again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model-again")  # saved by the stranger
    assert again.adapter.logit_bias.item() == -3.5
    assert (again.config.contrastive_loss_type, again.config.logit_scale_max) == ("siglip", 50.0)


def test_the_largest_scale():
    adapter = make_model("opt_clip").adapter
    adapter.clamp_logit_scale(100.0)
    assert adapter.logit_scale.item() == pytest.approx(math.log(1 / 0.07))  # below it, nothing is done
    torch.nn.init.constant_(adapter.logit_scale, 7.0)
    adapter.clamp_logit_scale(None)
    assert adapter.logit_scale.item() == 7
    adapter.clamp_logit_scale(100.0)
    assert adapter.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"contrastive_label_smoothing": 0.1, "contrastive_loss_type": "siglip"}, "decides each pair by itself"),
        ({"captioning_label_smoothing": 1.0}, r"`captioning_label_smoothing` must be in \[0, 1\), got 1.0"),
        ({"contrastive_label_smoothing": -0.1}, r"`contrastive_label_smoothing` must be in \[0, 1\), got -0.1"),
        ({"logit_scale_max": 5.0}, r"`logit_scale_max` \(5.0\) is below what the scale starts at"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FromageConfig(**options)
    with pytest.raises(ValueError, match=words):
        FromageConfig.from_dict(FromageConfig().to_dict(), **options)
