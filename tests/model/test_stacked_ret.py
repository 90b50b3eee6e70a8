"""`[RET]` of several tokens: training against a plain pass, its queries, and what is refused."""

import pytest
import torch
from peft import LoraConfig

from modeling_fromage import FromageConfig
from modeling_fromage.training_losses_fromage import ret_hidden_states, why_not_ret_only
from tests.helpers.backbones import make_model
from tests.helpers.batches import CAPTIONS, RET, pad
from tests.helpers.stacked import (
    AGGREGATIONS,
    PlainPass,
    documents,
    pairs,
    plain_losses,
    stacked_double_model,
    stacked_model,
    text_rows,
)


def assert_same_step(model, output, expected):
    is_eager = model.language_model.config._attn_implementation == "eager"  # whose softmax transformers takes in fp32
    loss, gradient = (1e-5, 1e-5) if is_eager else (1e-10, 1e-9)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=loss, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(output.loss, list(trained.values()))
    theirs = torch.autograd.grad(sum(expected.values()), list(trained.values()))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        assert (a - b).norm() <= gradient * b.norm(), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", ["packed", "padded", "grouped", "gradient cache", "left padding"])
@pytest.mark.parametrize(("name", "count"), [("opt_clip", 3), ("opt350m_vit", 2), ("gpt2_resnet", 2),
                                             ("llama_clip", 3), ("granite_vit", 2), ("gemma2_vit", 3)])  # fmt: skip
def test_step_equals_a_plain_pass(name, count, variant, aggregation):
    """Tied (OPT, GPT-2) and separate rows of the head (OPT-350m), and layers of other widths."""
    layers = [0, 1, -1] if variant in ("packed", "padded") else [-1]
    chunk = 2 if variant == "gradient cache" else None
    model = stacked_double_model(name, count, aggregation, text_embed_layers=layers, gradient_cache_chunk_size=chunk)
    attention = model.language_model.config._attn_implementation
    if variant in ("padded", "grouped"):
        model.traits.abilities[attention, "packed rows"] = False
    if variant == "grouped":  # the ordinary pass
        model.traits.abilities[attention, "cached prefixes"] = False
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.double)
    indices = list(range(len(CAPTIONS)))
    output = model(**pairs(model, pixels, indices, "left" if variant == "left padding" else "right"))
    assert bool(model.traits.logged_fallbacks) == (variant == "grouped")
    assert_same_step(model, output, plain_losses(model, pixels, indices, with_documents=False))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("captions", [(), (0, 3)], ids=["documents alone", "with pairs"])
@pytest.mark.parametrize(("name", "count", "chunk"), [("opt_clip", 3, None), ("opt350m_vit", 2, 2),
                                                      ("llama_clip", 2, None)])  # fmt: skip
def test_documents_equal_a_plain_pass(name, count, chunk, captions, aggregation):
    layers = [1, -1] if name == "opt_clip" else [-1]
    model = stacked_double_model(name, count, aggregation, text_embed_layers=layers, gradient_cache_chunk_size=chunk)
    pixels = torch.rand(10, 3, 32, 32, dtype=torch.double)
    assert_same_step(model, model(**documents(model, pixels, captions)), plain_losses(model, pixels, captions))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_step_with_lora(aggregation):
    model = stacked_double_model("llama_clip", 3, aggregation)
    target = r"language_model\..*\.(q_proj|v_proj)"
    model.add_adapter(LoraConfig(r=2, target_modules=target, modules_to_save=["adapter"], init_lora_weights=False))
    model.double().train()
    model.adapter.double()
    pixels = torch.rand(4, 3, 32, 32, dtype=torch.double)
    output = model(**pairs(model, pixels, [0, 1, 2, 3]))
    assert_same_step(model, output, plain_losses(model, pixels, [0, 1, 2, 3], with_documents=False))


@torch.no_grad()
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_queries_are_those_of_a_plain_pass(side, aggregation):
    model = stacked_double_model("opt_clip", 3, aggregation, text_embed_layers=[0, -1]).eval()
    rows = text_rows(3, range(6))
    batch = pad(rows, side)
    expected = torch.stack([PlainPass(model, row).queries(len(row) - 1) for row in rows])
    expected = expected if aggregation == "max" else expected[:, 0]
    torch.testing.assert_close(model.get_text_embeds(**batch), expected)
    states = ret_hidden_states(model.frozen_lm(), *batch.values())
    assert [layer.shape for layer in states] == [(6, 3 * 32)] * 2
    torch.testing.assert_close(model.adapter.text_embeds(states), expected)
    found = model.get_ret_embeds(**batch)
    torch.testing.assert_close(torch.cat(found), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_one_pass_with_gradient_is_used_for_whole_runs_at_the_end(count):
    lm = stacked_model("opt_clip", count, "concat").train().frozen_lm()
    whole = list(range(RET, RET + count))
    for ids, is_right in (
        ([2, 5, *whole], True),
        ([2, 5, *whole[:-1]], False),
        ([2, *whole, 5, *whole], False),
        ([2, *whole, 5], False),
        (whole, False),
        ([2, 5, *reversed(whole)], False),
    ):
        ids = torch.tensor([ids])
        assert (why_not_ret_only(lm, ids, torch.ones_like(ids)) is None) == is_right


def test_torn_runs_are_refused():
    model = stacked_model("opt_clip", 3, "concat")
    whole = [RET, RET + 1, RET + 2]
    for row in ([2, *whole, 5, RET], [2, RET + 1, *whole], [2, RET, *whole]):
        with pytest.raises(ValueError, match="3 tokens in a row here, ids 501 to 503"):
            model.get_text_embeds(torch.tensor([row]))
    with pytest.raises(ValueError, match=r"Rows \[0\] have no \[RET\] token \(ids 501 to 503\)"):
        model.get_text_embeds(torch.tensor([[2, 5, RET]]))
    batch = documents(model, torch.rand(6, 3, 32, 32))
    moved = {**batch, "ret_targets": batch["ret_targets"].roll(-1, dims=1)}
    with pytest.raises(ValueError, match="another token than the last of a .RET., id 503"):
        model(**moved)
    embeds = model.frozen_lm().embed(batch["input_ids"].masked_fill(batch["input_ids"] == 500, 5))
    with pytest.raises(ValueError, match="need `input_ids`"):
        model(inputs_embeds=embeds, labels=batch["labels"], ret_targets=batch["ret_targets"])


def test_rows_start_apart_and_the_first_as_ever():
    one, three, again = (stacked_model("llama_clip", count, "concat").adapter for count in (1, 3, 3))
    for name in ("ret_embedding", "ret_lm_head"):
        rows = getattr(three, name, None)
        if rows is None:
            continue
        rows = rows.weight
        assert torch.equal(rows[:1], getattr(one, name).weight)
        assert torch.equal(rows, getattr(again, name).weight)
        assert torch.cdist(rows, rows).fill_diagonal_(1).min() > 1e-3
    model = stacked_model("llama_clip", 3, "concat")
    model.normalize_ret_embedding()
    norms = model.adapter.ret_embedding.weight.norm(dim=-1)
    torch.testing.assert_close(norms, norms[:1].expand(3))


def test_shapes_of_the_trained_parts():
    def shapes(**kwargs):
        return {name: tuple(p.shape) for name, p in make_model("opt_clip", **kwargs).adapter.named_parameters()}

    one, concat, best = (
        shapes(num_ret_tokens=count, ret_aggregation=kind) for count, kind in ((1, "concat"), (4, "concat"), (4, "max"))
    )
    assert one.keys() == concat.keys() == best.keys()
    changed = {"ret_embedding.weight": (4, 32)}
    assert best == one | changed
    assert concat == one | changed | {"text_projection.0.weight": (16, 4 * 32)}


def test_best_of_one_query_is_refused():
    with pytest.raises(ValueError, match="`num_ret_tokens` is 1"):
        FromageConfig(ret_aggregation="max")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FromageConfig(num_ret_tokens=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("count", "window", "is_fast"), [(2, 8, True), (2, 9, True), (2, 7, False), (3, 9, True),
                                                          (3, 12, True)])  # fmt: skip
def test_step_with_a_window(count, window, is_fast, aggregation):
    """The longest text has 6 tokens and those of [RET]."""
    model = stacked_double_model("mistral_vit", count, aggregation)
    model.config.text_config.sliding_window = window
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.double)
    indices = list(range(len(CAPTIONS)))
    output = model(**pairs(model, pixels, indices))
    assert (not model.traits.logged_fallbacks) == is_fast
    assert_same_step(model, output, plain_losses(model, pixels, indices, with_documents=False))


@pytest.mark.parametrize("count", [1, 3])
def test_other_losses_take_the_best_of_several_queries(count):
    """SigLIP's loss, of the same logits as a plain pass; hard negatives are further rows of them."""
    kind = "max" if count > 1 else "concat"
    model = stacked_double_model("opt_clip", count, kind, contrastive_loss_type="siglip")
    pixels = torch.rand(4, 3, 32, 32, dtype=torch.double)
    batch = pairs(model, pixels, [0, 1, 2, 3])
    output = model(**batch)
    queries = output.text_embeds.reshape(4, count, 16)
    products = torch.stack([(output.image_embeds @ own.t()).amax(1) for own in queries], dim=1)
    logits = products * model.adapter.logit_scale.exp() + model.adapter.logit_bias
    torch.testing.assert_close(output.logits_per_image, logits)
    signs = 2 * torch.eye(4, dtype=torch.double) - 1
    torch.testing.assert_close(output.contrastive_loss, -torch.nn.functional.logsigmoid(signs * logits).sum() / 4)
