"""The fast training step against a plain double pass: the LM as it is, one caption at a time, over all its vocabulary.

Relative differences are below 1e-10 in float64. Gemma 2 is the exception: it has eager attention alone, whose softmax
transformers takes in fp32.
"""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from modeling_fromage.losses_fromage import ChunkedTokenLoss, contrastive_loss, token_losses
from modeling_fromage.packing_fromage import PackedRows, length_groups
from modeling_fromage.training_losses_fromage import why_not_ret_only
from tests.helpers.backbones import BACKBONES, VOCAB, make_model
from tests.helpers.batches import CAPTIONS, RET, double_model, make_batch, pad
from tests.helpers.peft_methods import METHODS, WITHIN_LM

VARIANTS = ["packed", "grouped", "concatenated", "checkpointed", "gradient cache", "left padding", "accumulated"]


def plain_double_pass(model, pixels, indices, concatenated=False):
    lm, adapter, layers = model.language_model, model.adapter, model.config.text_embed_layers
    k, scale = model.config.num_image_tokens, model.config.ret_embedding_scale
    ret_in, ret_out = adapter.ret_embedding.weight, (adapter.ret_lm_head or adapter.ret_embedding).weight
    pooled = model.get_pooled_image_features(pixels[indices])
    visual = adapter.multi_modal_projector(pooled).reshape(len(indices), k, -1)

    def run(parts):
        """Of token ids and visual tokens: the LM's output, log-probabilities, and the ids (-1: no token)."""
        rows, ids = [], []
        for part in parts:
            if isinstance(part, torch.Tensor):
                rows, ids = [*rows, *part], ids + [-1] * k
            else:
                rows += [ret_in[0] * scale if i == RET else lm.get_input_embeddings()(torch.tensor(i)) for i in part]
                ids += part
        out = lm(inputs_embeds=torch.stack(rows)[None], output_hidden_states=True, use_cache=False)
        hidden, frozen = out.hidden_states[-1][0], out.logits[0][:, :RET]
        ret = model.frozen_lm().transform(hidden @ ret_out.t())
        filler = frozen.new_full((len(frozen), RET - frozen.shape[1]), torch.finfo(frozen.dtype).min)
        return out, torch.cat([frozen, filler, ret], 1).log_softmax(-1), ids

    sequences = [[visual[n], CAPTIONS[i]] for n, i in enumerate(indices)]
    if concatenated:
        sequences = [sum(sequences[i : i + 2], []) for i in range(0, len(sequences), 2)]
    captioning, ret_losses, texts = [], [], []
    for sequence in sequences:
        _, probs, ids = run(sequence)
        captioning += [-probs[t - 1, token] for t, token in enumerate(ids) if token >= 0]
    for i in indices:
        out, probs, ids = run([CAPTIONS[i] + [RET]])
        ret_losses += [-probs[t, token] for t, token in enumerate(ids[1:])]
        texts.append(sum(p(out.hidden_states[n][0, -1]) for n, p in zip(layers, adapter.text_projection, strict=True)))
    images, texts = F.normalize(adapter.visual_projection(pooled), dim=-1), F.normalize(torch.stack(texts), dim=-1)
    similarity, targets = images @ texts.t() * adapter.logit_scale.exp(), torch.arange(len(indices))
    contrastive = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2
    return torch.stack(captioning).mean() + torch.stack(ret_losses).mean() + contrastive


def assert_same_step(model, losses, expected):
    trained = [p for p in model.parameters() if p.requires_grad]
    tolerance = 1e-5 if model.language_model.config._attn_implementation == "eager" else 1e-10
    for ours, theirs in zip(losses, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=tolerance)
    ours = torch.autograd.grad(sum(losses), trained)
    theirs = torch.autograd.grad(sum(expected), trained)
    for (name, _), a, b in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad), ours, theirs, strict=True
    ):
        difference = (a - b).norm() / b.norm()
        assert difference < tolerance, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_step_equals_a_plain_double_pass(name, variant):
    options = {"gradient_cache_chunk_size": 2} if variant == "gradient cache" else {}
    layers = [0, 1, -1] if variant in ("packed", "grouped") else [-1]
    model = double_model(name, text_embed_layers=layers, **options)
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.float64)
    attention = model.language_model.config._attn_implementation
    if variant == "grouped":
        model.traits.abilities[attention, "packed rows"] = False
    if variant == "checkpointed":
        model.activation_checkpointing_enable()
    concatenated, side = variant == "concatenated", "left" if variant == "left padding" else "right"
    parts = [[0, 1, 2], [3, 4, 5]] if variant == "accumulated" else [[0, 1, 2, 3, 4, 5]]
    batches = [make_batch(model, pixels, part, concatenated, side) for part in parts]
    losses = [model(**batch).loss for batch in batches]
    assert model.traits.abilities[attention, "packed rows"] == (variant != "grouped")
    assert not model.traits.logged_fallbacks  # the [RET]-only backward was used
    assert_same_step(model, losses, [plain_double_pass(model, pixels, part, concatenated) for part in parts])


@pytest.mark.parametrize("name", ["opt_clip", "llama_clip"])
def test_step_with_lora(name, caplog):
    caplog.set_level(logging.INFO, logger="modeling_fromage")
    model = double_model(name)
    target = r"language_model\..*\.(q_proj|v_proj)"
    model.add_adapter(LoraConfig(r=2, target_modules=target, modules_to_save=["adapter"], init_lora_weights=False))
    model.double().train()
    model.adapter.double()
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.float64)
    losses = [model(**make_batch(model, pixels, [0, 1, 2, 3])).loss]
    assert "ordinary pass: the language model is being trained" in caplog.text and "packed rows" in caplog.text
    assert_same_step(model, losses, [plain_double_pass(model, pixels, [0, 1, 2, 3])])


def test_step_with_a_window_shorter_than_the_batch(caplog):
    caplog.set_level(logging.INFO, logger="modeling_fromage")
    model = double_model("mistral_vit")
    assert model.config.text_config.sliding_window == 4
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.float64)
    losses = [model(**make_batch(model, pixels, [0, 1, 2, 3])).loss]
    assert "longer than the language model's attention window" in caplog.text
    assert_same_step(model, losses, [plain_double_pass(model, pixels, [0, 1, 2, 3])])


@pytest.mark.parametrize("window", [7, 8])
def test_step_with_a_window_that_the_longest_text_fills(window):
    model = double_model("mistral_vit")
    model.config.text_config.sliding_window = window
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.float64)
    losses = [model(**make_batch(model, pixels, list(range(6)))).loss]
    assert not model.traits.logged_fallbacks
    assert_same_step(model, losses, [plain_double_pass(model, pixels, list(range(6)))])


def test_ordinary_pass_takes_over_where_it_must():
    model = make_model("gemma2_vit").train()
    ids = torch.tensor([[2, 5, 6, RET]])
    mask = torch.ones_like(ids)
    assert why_not_ret_only(model.frozen_lm(), ids, mask) is None
    assert why_not_ret_only(model.frozen_lm(), torch.tensor([[2, RET, 6, RET]]), mask)
    assert why_not_ret_only(model.frozen_lm(), torch.tensor([[2, 5, RET, 6]]), mask)
    assert why_not_ret_only(model.frozen_lm(), torch.tensor([[RET]]), mask[:, :1])
    model.config.text_config.sliding_window = 3
    assert why_not_ret_only(model.frozen_lm(), ids, mask)
    model.config.text_config.sliding_window = 64
    next(model.language_model.parameters()).requires_grad_(True)
    assert why_not_ret_only(model.frozen_lm(), ids, mask)


def test_a_backbone_that_takes_no_packed_rows_is_found_out(caplog):
    caplog.set_level(logging.INFO, logger="modeling_fromage")
    model = double_model("opt_clip")
    decoder = model.language_model.get_decoder()
    original = decoder.forward

    def ignores_masks(*args, attention_mask=None, **kwargs):
        is_packed = attention_mask is not None and attention_mask.dim() == 4
        return original(*args, attention_mask=None if is_packed else attention_mask, **kwargs)

    decoder.forward = ignores_masks
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.float64)
    losses = [model(**make_batch(model, pixels, [0, 1, 2])).loss]
    assert not model.traits.abilities["sdpa", "packed rows"] and "does not take packed rows" in caplog.text
    decoder.forward = original
    assert_same_step(model, losses, [plain_double_pass(model, pixels, [0, 1, 2])])


def test_no_whole_logits_with_gradient_in_training(monkeypatch):
    """No operation of the step yields a (tokens, vocabulary) tensor of more than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                is_logits = isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[-1] >= VOCAB
                if is_logits and tensor.data_ptr() != head.weight.data_ptr():
                    self.found = max(self.found, len(tensor))
            return result

    for module in ("losses_fromage", "frozen_lm_fromage"):
        monkeypatch.setattr(f"modeling_fromage.{module}.LOGITS_AT_A_TIME", 2 * (VOCAB + 1))
    model = make_model("gpt2_resnet").train()
    head = model.get_output_embeddings()
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32)
    batch = make_batch(model, pixels, [0, 1, 2, 3, 4, 5])
    with Largest() as largest:
        model(**batch).loss.backward()
    assert largest.found == 2


def test_chunks_of_the_token_loss(monkeypatch):
    monkeypatch.setattr("modeling_fromage.losses_fromage.LOGITS_AT_A_TIME", 3 * 11)
    hidden, rows = torch.randn(8, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    head, targets = torch.randn(11, 4, dtype=torch.float64), torch.tensor([0, 10, 11, 12, 3, 12, 5, 0])
    hidden.requires_grad_(), rows.requires_grad_()
    loss = ChunkedTokenLoss.apply(hidden, rows, targets, lambda h, r: (h @ head.t(), h @ r.t()), 11, 11)
    expected = F.cross_entropy(hidden @ torch.cat([head, rows]).t(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(2 * x, (hidden, rows)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    losses = token_losses(hidden @ head.t(), hidden @ rows.t(), targets, 11)
    torch.testing.assert_close(losses.sum(), expected)


@pytest.mark.parametrize("method", [*METHODS, "lm_head", "embed_tokens"])
def test_step_with_peft(method):
    model = double_model("llama_clip")
    if method in METHODS:
        config = METHODS[method](target_modules=WITHIN_LM, modules_to_save=["adapter"])
    else:
        config = LoraConfig(r=2, target_modules=[method], modules_to_save=["adapter"])
    whole = get_peft_model(model, config).double().train()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    pixels = torch.rand(len(CAPTIONS), 3, 32, 32, dtype=torch.float64)
    losses = [model(**make_batch(model, pixels, [0, 1, 2, 3])).loss]
    assert_same_step(whole, losses, [plain_double_pass(model, pixels, [0, 1, 2, 3])])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows(side, queries):
    lengths = torch.randint(1, 25, (37,)).tolist()
    batch = pad([list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)], side)
    packed = PackedRows(batch["attention_mask"], window=40, queries=queries)
    rows = packed.lay(batch["input_ids"], -1)
    assert sorted(rows[rows >= 0].tolist()) == sorted(100 * i + t for i, n in enumerate(lengths) for t in range(n))
    assert packed.length + packed.slots * queries <= 40
    assert (rows >= 0).float().mean() > 0.7  # not mostly air
    assert torch.equal(packed.at_tokens(rows), batch["input_ids"][batch["attention_mask"].bool()])
    assert torch.equal(packed.position_ids[rows >= 0], rows[rows >= 0] % 100)
    allowed = packed.attention_mask(torch.float32)[:, 0] == 0
    seen = packed.query_mask(torch.float32)[:, 0] == 0
    for i, n in enumerate(lengths):
        r, m = packed.row[i].item(), packed.slot[i].item()
        for t in range(n):
            place = (rows[r] == 100 * i + t).nonzero().item()
            assert rows[r][allowed[r, place]].tolist() == list(range(100 * i, 100 * i + t + 1))
        for q in range(queries):
            mask = seen[r, m * queries + q]
            assert rows[r][mask[: packed.length]].tolist() == list(range(100 * i, 100 * i + n))
            own = list(range(m * queries, m * queries + q + 1))
            assert mask[packed.length :].nonzero().flatten().tolist() == own
    values = torch.arange(37 * queries).view(37, queries)
    assert torch.equal(packed.at_queries(packed.lay_queries(values)), values)


def test_length_groups():
    lengths = torch.randint(1, 25, (37,))
    groups = length_groups(lengths)
    assert sorted(torch.cat(groups).tolist()) == list(range(37)) and len(groups) == 4
    assert all(lengths[a].max() <= lengths[b].min() for a, b in zip(groups, groups[1:], strict=False))
    assert len(length_groups(lengths[:9])) == 1


def test_gradient_cache_holds_one_chunk_at_a_time():
    """With 16 chunks, activations saved for the backward pass are a fraction of the whole batch's."""

    def saved(size):
        model = make_model("opt_clip", gradient_cache_chunk_size=size).train()
        count = 64
        retrieval = torch.cat([torch.randint(3, 400, (count, 12)), torch.full((count, 1), RET)], dim=1)
        batch = {"retrieval_input_ids": retrieval, "pooled_image_features": torch.randn(count, 24)}
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch)
        return total

    assert saved(4) < 0.2 * saved(None)


def test_gradient_cache_runs_each_chunk_twice():
    model = double_model("opt_clip", gradient_cache_chunk_size=2)
    batch = make_batch(model, torch.rand(6, 3, 32, 32, dtype=torch.float64), [0, 1, 2, 3, 4, 5])
    model(**batch)  # finds out whether the LM takes packed rows
    decoder, calls = model.language_model.get_decoder(), []
    decoder.register_forward_pre_hook(lambda *args: calls.append(1))
    loss = model(**batch).loss
    assert len(calls) == 3 + 3 * 2  # captioning; prefixes and [RET]
    loss.backward()
    assert len(calls) == 2 * 9


def test_contrastive_loss_closed_form():
    assert contrastive_loss(torch.zeros(7, 7)).item() == pytest.approx(torch.tensor(7.0).log().item())
