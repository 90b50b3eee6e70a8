"""Training, generating, searching, saving and resuming on a GPU give what the CPU gives, within stated bounds.

Differences are relative: the norm of the difference by the norm of the CPU's.
"""

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageTrainer
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.batches import IMAGE, PAD, interleaved, pad
from tests.helpers.checkpoints import assemble

STEPS = 4
# Of what the steps change. fp32 is summed in another order; on the CPU, bf16 differs from fp32 by up to 0.047 here, and
# two devices round in different places.
BOUNDS = {"float32": 5e-4, "bf16 autocast": 0.1, "bf16 backbones": 0.1}
DEVICES = pytest.mark.parametrize("device", ["cuda", "cpu"], indirect=True)
CASES = [("cuda", "opt_clip"), ("cuda", "llama_clip"), ("cuda", "gemma2_vit"), ("cpu", "opt_clip")]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def train(model, processor, device: str, folder, resume=None, **options) -> FromageTrainer:
    """A few steps on made-up features; plain SGD, because Adam's first steps make a small gradient's sign large."""
    width = model.adapter.visual_projection.in_features
    features = torch.rand(8, width, generator=torch.Generator().manual_seed(5))
    data = [{"pooled_image_features": row, "caption": f"a cat number {i}"} for i, row in enumerate(features)]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.05, logging_steps=1,
        optim="sgd", report_to="none", disable_tqdm=True, use_cpu=device == "cpu", **{"save_strategy": "no", **options},
    )  # fmt: skip
    trainer = FromageTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train(resume_from_checkpoint=resume)
    assert model.device.type == device
    return trainer


def losses(trainer: FromageTrainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def trained(model) -> torch.Tensor:
    return torch.cat([p.detach().cpu().double().flatten() for p in model.adapter.parameters()])


@pytest.mark.parametrize("precision", sorted(BOUNDS))
@pytest.mark.parametrize("device, name", CASES, indirect=["device"])
def test_trainer_steps(name, precision, device, check, tmp_path):
    runs = []
    for kind in (device, "cpu"):
        model = make_model(name)
        if precision == "bf16 backbones":
            model.bfloat16()
        before = trained(model)
        trainer = train(model, make_processor(), kind, tmp_path, bf16=precision == "bf16 autocast")
        runs.append((losses(trainer), trained(model) - before))
    (found_losses, found), (expected_losses, expected) = runs
    assert len(expected_losses) == STEPS and expected.norm() > 0.01
    check("losses", difference(found_losses, expected_losses), BOUNDS[precision] / 20)
    check("steps", difference(found, expected), BOUNDS[precision])


@pytest.mark.parametrize("device, name", CASES, indirect=["device"])
@torch.no_grad()
def test_forward_and_generate(name, device, check):
    model = make_model(name)
    rows, images = interleaved(model)
    batch = {**pad(rows, "left"), "pixel_values": images}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "ret_bias": 0.5,
               "return_dict_in_generate": True}  # fmt: skip
    expected = model(**batch).logits, model.get_text_embeds(**batch), model.generate(**batch, **options)
    model.to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    logits, embeds, output = model(**batch).logits, model.get_text_embeds(**batch), model.generate(**batch, **options)
    real, kept = batch["attention_mask"].bool().cpu(), torch.arange(logits.shape[-1]) != IMAGE
    check("logits", difference(logits.cpu()[real][:, kept], expected[0][real][:, kept]), 1e-4)
    check("text embeddings", difference(embeds, expected[1]), 1e-4)
    assert torch.equal(output.sequences.cpu(), expected[2].sequences)
    for ours, theirs in zip(output.ret_embeds, expected[2].ret_embeds, strict=True):
        assert ours.device.type == device and ours.shape == theirs.shape
        if len(ours):
            check("[RET] embeddings", difference(ours, theirs), 1e-4)
    logits = model.bfloat16()(**batch).logits
    check("logits in bf16", difference(logits.cpu()[real][:, kept], expected[0][real][:, kept]), 0.03)


@DEVICES
def test_index(device, check, tmp_path):
    """Built by a model on the device, and searched there; it serves the model on the CPU as well."""
    model, processor = make_model("opt_clip"), make_processor()
    images = [Image.new("RGB", (40, 30), (37 * i % 256, 91 * i % 256, 151 * i % 256)) for i in range(40)]
    options = {"ids": [f"image {i}" for i in range(40)], "show_progress": False}
    expected = FromageImageIndex.build(model, processor, images, **options)
    index = FromageImageIndex.build(model.to(device), processor, images, **options)
    check("image embeddings", difference(index.embeds, expected.embeds), 1e-4)

    rows = torch.nn.functional.normalize(torch.randn(5000, 16), dim=-1)
    index = FromageImageIndex(rows, [str(i) for i in range(5000)], [{"parity": i % 2} for i in range(5000)])
    queries = torch.randn(7, 16)
    for filters in ({}, {"where": {"parity": 1}}, {"exclude_ids": ["17", "23"]}):
        ids, scores, _ = index.search(queries, 10, **filters)
        index.to(device)
        found_ids, found_scores, _ = index.search(queries.to(device), 10, **filters)
        index.to("cpu")
        assert found_ids == ids
        check(f"scores with {sorted(filters)}", difference(found_scores, scores), 1e-5)
    index.to(device).save_pretrained(tmp_path / "index")
    again = FromageImageIndex.from_pretrained(tmp_path / "index")
    assert torch.equal(again.embeds, index.embeds.cpu()) and again.search(queries, 3)[0] == index.search(queries, 3)[0]


@DEVICES
def test_save_and_resume(device, check, backbones, tmp_path):
    """A run that is resumed from its second step ends as one that was not; the CPU reads what the device saved."""
    model, processor = assemble(backbones)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = train(model, processor, device, tmp_path / "run", save_strategy="steps", save_steps=2)
    expected = trained(model)

    resumed = FromageForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-2")
    trainer = train(resumed, processor, device, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == STEPS
    check("losses after resuming", difference(losses(trainer), losses(whole)), 1e-6)
    check("trained parts after resuming", difference(trained(resumed), expected), 1e-6)

    model.eval().save_pretrained(tmp_path / "model", save_backbones=True)
    loaded = FromageForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.device.type == "cpu" and torch.equal(trained(loaded), expected)
    for name, tensor in loaded.state_dict().items():
        if not name.startswith("adapter."):
            assert torch.equal(tensor, start[name]), name  # frozen
    ids, pixels = torch.tensor([[2, 500, 500, 5, 501]]), torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(ids.to(device), pixel_values=pixels.to(device)).logits
        check("logits of what was saved", difference(logits, loaded(ids, pixel_values=pixels).logits), 1e-4)
