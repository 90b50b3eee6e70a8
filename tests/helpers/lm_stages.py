"""The stages of FROMAGe's life with one language model, against that LM itself: `[RET]` a row of its own matrices, one
text at a time, no padding, no cache."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.backbones_fromage import decoder_and_head
from modeling_fromage.training_losses_fromage import ret_hidden_states
from tests.helpers.backbones import VISION_CONFIGS
from tests.helpers.batches import pad
from tests.helpers.lm_families import IMAGE, PAD, RET

CAPTIONS = [[2, 5, 6, 7, 20, 21, 22, 23], [2, 8], [2, 9, 10, 11, 30], [2, 12, 13, 14, 15, 16]]
# xLSTM's fails at this size, XLM's appends a mask token.
NO_GENERATE_OF_THEIR_OWN = {"xlstm", "xlm"}
NO_IMAGE_OR_RET = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 6}


def assemble(lm: PreTrainedModel) -> FromageForConditionalGeneration:
    """An LM joined to a CLIP, in fp64 where the LM's kernels take it, in training mode."""
    vision = AutoModel.from_config(VISION_CONFIGS["clip"]())
    config = FromageConfig.from_vision_text_configs(
        vision.config, lm.config, image_token_id=IMAGE, ret_token_id=RET, num_image_tokens=2, projection_dim=16,
        tie_ret_embedding=is_tied(lm),
    )  # fmt: skip
    model = FromageForConditionalGeneration(config, lm, vision).train()
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias.data[IMAGE:] = 0.0  # `[RET]` has none
    in_double_where_it_can(model)
    return model


def is_tied(lm: PreTrainedModel) -> bool:
    head = lm.get_output_embeddings()
    return head is not None and any(head.weight is weight for weight in embedding_weights(lm))


def embedding_weights(lm: PreTrainedModel) -> list[torch.Tensor]:
    return [module.weight for module in lm.modules() if isinstance(module, torch.nn.Embedding)]


@torch.no_grad()
def in_double_where_it_can(model: FromageForConditionalGeneration) -> None:
    """Experts' kernels take no fp64; masks that an LM makes in fp32 give NaN in it."""
    model.double().adapter.double()
    try:
        embeds = [model.get_text_embeds(**pad([[2, 5, RET], [2, RET]], side)) for side in ("left", "right")]
        if all(bool(rows.isfinite().all()) for rows in embeds):
            return
    except RuntimeError:
        pass
    model.float().adapter.float()


def by_itself(model, ids=None, embeds=None):
    """The LM's log-probabilities and last hidden states of one text, as it computes them."""
    inputs = {"input_ids": torch.tensor([ids])} if embeds is None else {"inputs_embeds": embeds[None]}
    lm = model.language_model
    copies = {name: tensor.clone() for name, tensor in inputs.items()}  # CTRL scales embeddings in place
    hidden = decoder_and_head(lm)[0](**copies, use_cache=False)[0][0]
    return lm(**inputs, use_cache=False).logits[0].log_softmax(-1), hidden


# ---- training ------------------------------------------------------------------------------------------------------


def training_batch(model, features, side):
    captions = pad([[IMAGE] * 2 + caption for caption in CAPTIONS], side)
    retrieval = pad([[*caption, RET] for caption in CAPTIONS], side)
    is_target = (captions["input_ids"] != IMAGE) & captions["attention_mask"].bool()
    return {
        **captions,
        "labels": captions["input_ids"].masked_fill(~is_target, -100),
        "pooled_image_features": features,
        "retrieval_input_ids": retrieval["input_ids"],
        "retrieval_attention_mask": retrieval["attention_mask"],
    }


def plain_double_pass(model, features):
    """The sum of the losses, with a gradient for the LM's own rows of `[RET]`."""
    adapter, embedding = model.adapter, model.get_input_embeddings()
    visual = adapter.multi_modal_projector(features).unflatten(-1, (2, -1))
    captioning, ret_losses, texts = [], [], []
    for tokens, caption in zip(visual, CAPTIONS, strict=True):
        words = model.config.text_embedding_scale * embedding(torch.tensor(caption))
        log_probs, _ = by_itself(model, embeds=torch.cat([tokens, words]))
        captioning += [-log_probs[t + 1, token] for t, token in enumerate(caption)]
        log_probs, hidden = by_itself(model, [*caption, RET])
        ret_losses += [-log_probs[t, token] for t, token in enumerate([*caption[1:], RET])]
        texts.append(adapter.text_projection[0](hidden[-1]))
    images, texts = (F.normalize(rows, dim=-1) for rows in (adapter.visual_projection(features), torch.stack(texts)))
    similarity, targets = images @ texts.t() * adapter.logit_scale.exp(), torch.arange(len(CAPTIONS))
    contrastive = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2
    return torch.stack(captioning).mean() + torch.stack(ret_losses).mean() + contrastive


def gradients(model, loss):
    """Of the trained parts, `[RET]`'s taken from the LM's matrices where those have one."""
    matrices = {"ret_embedding.weight": model.get_input_embeddings().weight}
    if model.adapter.ret_lm_head is not None:
        matrices["ret_lm_head.weight"] = model.get_output_embeddings().weight
    names, parameters = zip(*model.adapter.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True))
    for name, matrix in matrices.items():
        if matrix.requires_grad:
            found[name] = torch.autograd.grad(loss, matrix, retain_graph=True)[0][RET : RET + 1]
    return found


def check_step(model, side) -> float:
    """Losses and gradients of a training step equal the plain double pass; the largest relative difference."""
    features = torch.randn(len(CAPTIONS), 24, dtype=model.adapter.logit_scale.dtype)
    loss = model(**training_batch(model, features, side)).loss
    found = gradients(model, loss)
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for matrix in matrices:
        matrix.requires_grad_(True)
    expected = plain_double_pass(model, features)
    differences = {"loss": ((loss - expected).abs() / expected).item()}
    for name, theirs in gradients(model, expected).items():
        differences[name] = ((found[name] - theirs).norm() / theirs.norm()).item()
    for matrix in matrices:
        matrix.requires_grad_(False)
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < 1e-4, f"{worst} is off by {differences[worst]:.1e}"
    assert differences["loss"] < 1e-5
    return differences[worst]


def check_only_the_adapter_moves(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    features = torch.randn(len(CAPTIONS), 24, dtype=model.adapter.logit_scale.dtype)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()(**training_batch(model, features, "right")).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"adapter.{name}" for name, _ in model.adapter.named_parameters()}
    model.zero_grad()
    model.load_state_dict(before)


# ---- texts, scores, generation -------------------------------------------------------------------------------------


@torch.no_grad()
def check_texts_and_scores(model) -> None:
    rows, candidates = [[*caption, RET] for caption in CAPTIONS], [[40, 41, 42], [43], [44, 45]]
    truth = [by_itself(model, row) for row in rows]
    scored = [[by_itself(model, row + candidate)[0] for candidate in candidates] for row in rows]
    for side in ("left", "right"):
        batch = pad(rows, side)
        embeds, logits = model.get_text_embeds(**batch), model(**batch).logits
        padded = pad(candidates, side)
        scores = model.score_candidates(**batch, candidate_ids=padded["input_ids"],
                                        candidate_attention_mask=padded["attention_mask"])  # fmt: skip
        for i, (row, (log_probs, hidden)) in enumerate(zip(rows, truth, strict=True)):
            expected = F.normalize(model.adapter.text_projection[0](hidden[-1]), dim=-1)
            torch.testing.assert_close(embeds[i], expected, rtol=1e-4, atol=1e-5)
            ours = logits[i][batch["attention_mask"][i].bool()].log_softmax(-1)
            torch.testing.assert_close(ours.double(), log_probs.double(), rtol=1e-4, atol=1e-4)
            for j, candidate in enumerate(candidates):
                expected = sum(scored[i][j][len(row) + t - 1, token] for t, token in enumerate(candidate)).double()
                torch.testing.assert_close(scores[i, j].double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_shared_beginnings(model) -> None:
    """States of `[RET]` behind texts that begin alike, and so share a pass where the LM takes that."""
    start = CAPTIONS[0][:5]
    texts = [[*start, 30, RET], [*CAPTIONS[0], RET], [*start, 31, 32, 33, RET], [*start[:2], RET], [*CAPTIONS[1], RET]]
    (states,) = ret_hidden_states(model.frozen_lm(), *pad(texts, "right").values())
    for text, state in zip(texts, states, strict=True):
        torch.testing.assert_close(state, by_itself(model, text)[1][-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_generation(model, by_the_lm: bool = True) -> None:
    """Together, alone, without a cache, and by the LM itself; the truth are whole texts."""
    batch = pad(CAPTIONS, "left")
    together = model.generate(**batch, **NO_IMAGE_OR_RET, max_num_rets=0)
    for row, caption in zip(together, CAPTIONS, strict=True):
        ids = list(caption)
        for _ in range(6):
            log_probs, _ = by_itself(model, ids)
            log_probs[:, [IMAGE, RET]] = -torch.inf
            ids.append(log_probs[-1].argmax().item())
        assert row[-6:].tolist() == ids[-6:]
    first = torch.tensor([CAPTIONS[0]])
    for options in ({}, {"use_cache": False}):
        alone = model.generate(first, **NO_IMAGE_OR_RET, max_num_rets=0, **options)
        assert torch.equal(alone[0, -6:], together[0, -6:])
    if by_the_lm and model.language_model.config.model_type not in NO_GENERATE_OF_THEIR_OWN:
        theirs = model.language_model.generate(first, **NO_IMAGE_OR_RET, suppress_tokens=[IMAGE, RET])
        assert torch.equal(theirs[0, -6:], together[0, -6:])


# ---- folders -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_folders(model, folder: Path, lm: PreTrainedModel | None = None) -> None:
    """From saved backbones, the model has the same numbers; and both kinds of checkpoint keep every bit.

    Args:
        lm: What is saved as the language model, a multimodal one that holds it say.
    """
    model.float().adapter.float()
    paths = {"vision": str(folder / "vision"), "text": str(folder / "lm")}
    model.vision_model.save_pretrained(paths["vision"])
    (lm or model.language_model).save_pretrained(paths["text"])
    processor = SimpleNamespace(image_token_id=IMAGE, ret_token_id=RET, num_image_tokens=2, num_ret_tokens=1)
    assembled = FromageForConditionalGeneration.from_vision_text_pretrained(
        paths["vision"], paths["text"], processor, projection_dim=16,
        tie_ret_embedding=model.config.tie_ret_embedding,
    )  # fmt: skip
    assembled.adapter.load_state_dict(model.adapter.state_dict())
    assert_same(model, assembled, rtol=1e-4, atol=1e-4)
    for name, save_backbones in (("adapter", False), ("whole", True)):
        assembled.save_pretrained(folder / name, save_backbones=save_backbones)
        again = FromageForConditionalGeneration.from_pretrained(folder / name)
        tensors = {**again.state_dict(), **dict(again.named_buffers())}
        for key, tensor in {**assembled.state_dict(), **dict(assembled.named_buffers())}.items():
            assert torch.equal(tensors[key], tensor), key
        assert_same(assembled, again, rtol=1e-5, atol=1e-5)  # experts' kernels round with the place in memory


def assert_same(model, other, **tolerance) -> None:
    assert type(other.language_model) is type(model.language_model)
    batch = pad([[*caption, RET] for caption in CAPTIONS], "left")
    for each in (model, other):
        each.eval().adapter.float()
    torch.testing.assert_close(other(**batch).logits, model(**batch).logits, **tolerance)
    torch.testing.assert_close(other.get_text_embeds(**batch), model.get_text_embeds(**batch), **tolerance)
