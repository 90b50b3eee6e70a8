"""Agreement with the original code's numbers; see fixtures/parity/README.md for where they come from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hub_scripts.convert_original_checkpoint import original_names
from modeling_fromage import FromageDataCollator
from tests.helpers.parity import CASES, LOGITS, Case

GRADIENTS, WEIGHTS = 5e-5, 5e-6


@pytest.fixture(params=sorted(CASES))
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("name", ["batch4", "batch6"])
@pytest.mark.parametrize("concat", [False, True])
def test_forward(case, name, concat):
    batch = case.batch(name, concat)
    tokens, lengths = case.input_tensors[f"{name}.tgt_tokens"], case.input_tensors[f"{name}.caption_len"]
    for row, length in enumerate(lengths.tolist()):
        assert batch["retrieval_input_ids"][row][batch["retrieval_attention_mask"][row].bool()].tolist() == (
            tokens[row, :length].tolist()
        )
    with torch.no_grad():
        output = case.model(**batch, return_logits=True)
    key = f"{name}.captioning.concat_{str(concat).lower()}"
    golden = case.forward
    torch.testing.assert_close(output.captioning_loss, golden[f"{key}.loss"], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.ret_token_loss, golden[f"{name}.retrieval.loss"], atol=LOGITS, rtol=0)
    expected = golden[f"{key}.logits"][:, : output.logits.shape[1]]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected[real], atol=LOGITS, rtol=0)
    labels = golden[f"{key}.full_labels"]
    torch.testing.assert_close(batch["labels"], labels[:, : batch["labels"].shape[1]])
    assert (labels[:, batch["labels"].shape[1] :] == -100).all()
    retrieval = f"{name}.retrieval"
    scale = case.model.adapter.logit_scale.exp()
    torch.testing.assert_close(output.text_embeds, golden[f"{retrieval}.last_embedding"], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.image_embeds * scale, golden[f"{retrieval}.visual_embs"], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.logits_per_image, golden[f"{retrieval}.logits_per_image"], atol=LOGITS, rtol=0)
    tokens_out = case.model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(tokens_out, golden[f"{key}.visual_embs"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name", ["batch4", "batch6"])
@pytest.mark.parametrize("concat", [False, True])
def test_gradients(case, name, concat):
    output = case.model(**case.batch(name, concat))
    assert output.logits is None
    info = json.loads((case.folder / "grads.json").read_text())[f"{name}.concat_{str(concat).lower()}"]
    assert output.loss.item() == pytest.approx(info["total"], abs=LOGITS)
    output.loss.backward()
    trained = original_names(case.model)
    assert {id(p) for p in case.model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    for key, parameter in trained.items():
        expected = case.grads[f"{name}.concat_{str(concat).lower()}.before_clip.{key}"]
        torch.testing.assert_close(parameter.grad, expected, atol=GRADIENTS, rtol=1e-5)
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    assert norm.item() == pytest.approx(info["grad_norm"], abs=1e-3)
    for key, parameter in trained.items():
        expected = case.grads[f"{name}.concat_{str(concat).lower()}.after_clip.{key}"]
        torch.testing.assert_close(parameter.grad, expected, atol=GRADIENTS, rtol=0)


def test_caption_prefix(case):
    batch = case.batch("batch4", False, caption_prefix="A picture of")
    labels = case.forward["batch4.captioning.prefix.full_labels"]
    torch.testing.assert_close(batch["labels"], labels[:, : batch["labels"].shape[1]])
    loss = case.model(**batch).captioning_loss
    torch.testing.assert_close(loss, case.forward["batch4.captioning.prefix.loss"], atol=LOGITS, rtol=0)


def test_five_training_steps(case):
    info = json.loads((case.folder / "train.json").read_text())
    golden = load_file(case.folder / "train.safetensors")
    trained = original_names(case.model)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    frozen = {n: p.clone() for n, p in case.model.named_parameters() if not p.requires_grad}
    for rows, concat, expected in zip(info["batch_rows"], info["concat_flags"], info["steps"], strict=True):
        collate = FromageDataCollator(case.processor, concat_captions_prob=float(concat))
        pairs = [{"pooled_image_features": torch.zeros(32), "caption": case.captions["captions"][row]} for row in rows]
        batch = {**collate(pairs), "pixel_values": case.pixels[rows]}
        del batch["pooled_image_features"]
        output = case.model(**batch)
        assert output.loss.item() == pytest.approx(expected["total"], abs=LOGITS)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        case.model.normalize_ret_embedding()
        norm = case.model.adapter.ret_embedding.weight.norm().item()
        assert norm == pytest.approx(expected["ret_row_norm_after"], abs=1e-5)
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.data, golden[f"final.{key}"], atol=WEIGHTS, rtol=0)
    for name, parameter in case.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
