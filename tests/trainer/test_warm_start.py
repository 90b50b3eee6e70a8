"""Retrieval first: the states of `[RET]` on disk, the loss on them, the Trainer's warm start, and rates per part."""

import functools
import json

import pytest
import torch
from torch.utils.data import IterableDataset

from modeling_fromage import FromageDataCollator, FromageTrainer
from modeling_fromage.trainer import ret_states
from modeling_fromage.trainer.pair_states import Choices, PairStates, read_pairs
from modeling_fromage.trainer.ret_states import RetStates, cache_ret_states, shard_paths
from modeling_fromage.trainer.warm_start import CachedRetrieval, RetrievalWarmStart
from modeling_fromage.training_losses_fromage import ret_hidden_states
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.training_runs import arguments, examples

LAYERS = {"text_embed_layers": [1, -1]}
CAPTIONS = [row["caption"] for row in examples(20)]
PROJECTIONS = ("visual_projection", "text_projection", "logit_scale")


@pytest.fixture
def collator():
    return FromageDataCollator(make_processor(), caption_prefix="A picture of")


def batch_of(model, collator, rows):
    inputs = collator.image_inputs(rows) | collator.retrieval_inputs([row["caption"] for row in rows])
    states = ret_hidden_states(model.frozen_lm(), inputs["retrieval_input_ids"], inputs["retrieval_attention_mask"])
    return inputs, {"pooled_image_features": inputs["pooled_image_features"], "ret_states": states}


def test_pairs_with_several_captions_and_views(collator, tmp_path):
    """Each visit draws one of each, by the seed and the batch; one that stands twice, twice as often."""
    model = make_model("opt_clip", **LAYERS)
    rows = examples(4)
    rows[1] |= {"caption": ["a dog", "a dog", "an animal"], "pooled_image_features": torch.rand(3, 24).tolist()}
    rows[2]["caption"] = "a dog"
    pairs = read_pairs(model, collator, rows, tmp_path, seed=0)
    assert len(pairs) == 4 and len(pairs.states) == 4  # "a dog" once
    drawn, again = (pairs.__getitems__([1] * 300) for _ in range(2))
    assert torch.equal(drawn["pooled_image_features"], again["pooled_image_features"])
    views = (
        drawn["pooled_image_features"].half()[:, None] == torch.tensor(rows[1]["pooled_image_features"]).half()
    ).all(-1)
    assert (views.sum(0) > 70).all() and views.sum() == 300
    dog = pairs[2]["ret_states"][0]
    assert 0.55 < (drawn["ret_states"][0] == dog).all(-1).float().mean() < 0.78
    unseeded = read_pairs(model, collator, rows, tmp_path / "first")
    assert len(unseeded.states) == 3  # those that are taken
    first = unseeded[1]
    assert first["pooled_image_features"][0].tolist() == pytest.approx(rows[1]["pooled_image_features"][0], rel=1e-3)
    assert torch.equal(first["ret_states"][0], dog)


def test_choices():
    choices = Choices([[5], [1, 2, 3], [7]])
    rows = torch.tensor([2, 1, 0])
    assert len(choices) == 3 and choices.pick(rows, None).tolist() == [7, 1, 5]
    drawn = {choices.pick(rows, torch.Generator().manual_seed(seed))[1].item() for seed in range(30)}
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize(
    "options",
    [{}, {"mask_duplicate_images": True}, {"contrastive_loss_type": "siglip"}, {"contrastive_label_smoothing": 0.2}],
    ids=str,
)
def test_loss_and_gradients_are_the_models_own(collator, options):
    model = make_model("opt_clip", **LAYERS, **options).train()
    rows = examples(12)
    rows[3]["pooled_image_features"] = rows[7]["pooled_image_features"]
    inputs, cached = batch_of(model, collator, rows)
    module = CachedRetrieval(model, None, dropout=0.0)
    loss = model(**inputs).contrastive_loss
    found = module(**cached)["loss"]
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    trained = {name: p for name, p in module.adapter.named_parameters() if p.requires_grad}
    has_bias = "contrastive_loss_type" in options
    assert {name.split(".")[0] for name in trained} == {*PROJECTIONS, *(["logit_bias"] if has_bias else [])}
    expected = dict(model.adapter.named_parameters())
    gradients = torch.autograd.grad(loss, [expected[name] for name in trained])
    for ours, theirs in zip(torch.autograd.grad(found, list(trained.values())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_standardisation_is_folded_into_the_projections(collator, tmp_path):
    model = make_model("opt_clip", **LAYERS)
    rows = examples(20)
    inputs, cached = batch_of(model, collator, rows)
    cache_ret_states(model, collator, CAPTIONS, tmp_path)
    pairs = PairStates(inputs["pooled_image_features"], RetStates(tmp_path, 20))
    statistics = pairs.statistics([linear.in_features for linear in CachedRetrieval.projections(model.adapter)])
    for (mean, scale), vectors in zip(
        statistics, [cached["pooled_image_features"], *cached["ret_states"]], strict=True
    ):
        standardized = (vectors - mean) * scale
        assert standardized.mean(0).abs().max() < 2e-2 and 0.3 < standardized.std(0).median() < 1
    module = CachedRetrieval(model, statistics, dropout=0.0).eval()
    module.adapter.logit_scale.data.fill_(1.5)
    module.fold_into(model.eval())
    expected = module(**cached)
    with torch.no_grad():
        found = model(**inputs)
    for name, key in (("loss", "contrastive_loss"), ("image_embeds",) * 2, ("text_embeds",) * 2):
        torch.testing.assert_close(found[key], expected[name], rtol=1e-4, atol=1e-5)


def test_the_cache_keeps_whole_shards_and_gives_rows_in_any_order(collator, tmp_path, monkeypatch):
    monkeypatch.setattr(ret_states, "SHARD_SIZE", 8)
    monkeypatch.setattr(ret_states, "_TEXTS", 3)
    model = make_model("opt_clip", **LAYERS)
    cache_ret_states(model, collator, CAPTIONS, tmp_path)
    _, cached = batch_of(model, collator, examples(20))
    order = torch.tensor([19, 0, 7, 8, 15, 16, 3])
    for found, exact in zip(RetStates(tmp_path, 20).rows(order), cached["ret_states"], strict=True):
        torch.testing.assert_close(found, exact[order], rtol=2e-3, atol=1e-3)  # fp16
    paths = shard_paths(tmp_path, 20)
    kept = {path: path.stat().st_mtime_ns for path in paths}
    paths[1].write_bytes(paths[1].read_bytes()[:200])  # as an interruption without fsync leaves a file
    monkeypatch.setattr(ret_states, "_PLACES", 30)
    cache_ret_states(model, collator, CAPTIONS, tmp_path)
    assert [path for path in paths if path.stat().st_mtime_ns != kept[path]] == [paths[1]]


@pytest.mark.parametrize("family", ["opt_clip", "llama_clip"])
def test_texts_that_begin_alike_share_a_pass(family, collator, tmp_path):
    """To rounding, the states are those of each text by itself, and fewer places are computed."""
    model = make_model(family, **LAYERS).double()
    texts = [f"{start} of {thing}{end}" for start in ("a picture", "a photo") for thing in ("two cats", "a dog", "two")
             for end in ("", " and so on", ", please")]  # fmt: skip
    inputs = dict(zip(("input_ids", "attention_mask"), collator.retrieval_inputs(texts).values(), strict=True))
    lm, places = model.frozen_lm(), []
    hook = lm.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: places.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    together = ret_hidden_states(lm, **inputs)
    hook.remove()
    assert places[-1] < 0.6 * inputs["attention_mask"].sum()
    for row, text in enumerate(texts):
        alone = ret_hidden_states(lm, *collator.retrieval_inputs([text]).values())
        for layer, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(layer[row : row + 1], expected, rtol=1e-10, atol=1e-12)
    model.traits.abilities["sdpa", "shared prefixes"] = False
    for layer, expected in zip(ret_hidden_states(lm, **inputs), together, strict=True):
        torch.testing.assert_close(layer, expected, rtol=1e-10, atol=1e-12)


def test_states_of_something_else_are_refused(collator, tmp_path, monkeypatch):
    monkeypatch.setattr(ret_states, "SHARD_SIZE", 8)
    model = make_model("opt_clip")
    cache_ret_states(model, collator, CAPTIONS, tmp_path)

    def refused(match, model=model, collator=collator, captions=CAPTIONS):
        with pytest.raises(ValueError, match=match):
            cache_ret_states(model, collator, captions, tmp_path)

    refused("ret-states-00001.safetensors has states of other captions", captions=[*CAPTIONS[:-9], *CAPTIONS[-8:], "x"])
    refused("num_captions 20, not 19", captions=CAPTIONS[:-1])
    refused("text_embed_layers", model=make_model("opt_clip", **LAYERS))
    refused("max_length 24, not 4", collator=FromageDataCollator(make_processor(), max_length=4))
    with torch.no_grad():
        model.adapter.ret_embedding.weight[0, 0] += 1e-3
    refused("ret_embedding '")
    other = make_model("opt_clip")
    with torch.no_grad():
        next(other.language_model.parameters()).view(-1)[7] += 1e-3
    refused("language_model '", model=other)
    refused("dtype 'float32', not 'bfloat16'", model=make_model("opt_clip").to(torch.bfloat16))
    cache_ret_states(make_model("opt_clip"), collator, CAPTIONS, tmp_path)


def warm_trainer(folder, steps=150, joint=2, config=None, **options):
    options = {"retrieval_warm_start_batch_size": 16, "retrieval_warm_start_dropout": 0.1, **options}
    args = arguments(folder, max_steps=joint, save_strategy="steps", save_steps=50)
    data = examples(40)
    return FromageTrainer(
        make_model("opt_clip", **LAYERS, **(config or {})), args, FromageDataCollator(make_processor()),
        train_dataset=data, eval_dataset=data[:19], retrieval_warm_start_steps=steps, **options,
    )  # fmt: skip


def test_a_warm_start_finds_what_few_joint_steps_do_not(tmp_path):
    trainer = warm_trainer(tmp_path)
    before = trainer.model.adapter.ret_embedding.weight.clone()
    trainer.model.normalize_ret_embedding()
    normalized = trainer.model.adapter.ret_embedding.weight.clone()
    assert not torch.equal(before, normalized)
    trainer._train_retrieval(resume=False)
    assert torch.equal(trainer.model.adapter.ret_embedding.weight, normalized)
    metrics = trainer.warm_start_metrics
    assert metrics["eval_text_to_image_R@1"] >= 0.4 and metrics["eval_num_pairs"] == 19
    joint = trainer.evaluate()  # of the whole model, both backbones running
    assert joint["eval_contrastive_loss"] == pytest.approx(metrics["eval_loss"], rel=0.05)
    assert joint["eval_text_to_image_R@1"] == pytest.approx(metrics["eval_text_to_image_R@1"], abs=0.1)
    cold = warm_trainer(tmp_path / "cold", steps=0, joint=2)
    cold.train()
    assert cold.evaluate()["eval_text_to_image_R@1"] < metrics["eval_text_to_image_R@1"] - 0.2


@pytest.mark.parametrize("bad", ["raise", "skip"])
def test_several_evaluation_sets_and_streams(tmp_path, caplog, bad):
    trainer = warm_trainer(tmp_path, steps=2, on_bad_example=bad)
    first, data = trainer.eval_dataset, examples(24)
    trainer.eval_dataset = {"first": first, "second": data[19:], "third": Stream(), "fourth": data[:1]}
    trainer._train_retrieval(resume=False)
    metrics = trainer.warm_start_metrics
    assert (metrics["eval_first_num_pairs"], metrics["eval_second_num_pairs"]) == (19, 5)
    assert "not evaluated on the evaluation set 'third': it has no length" in caplog.text
    assert "not evaluated on the evaluation set 'fourth': The warm start needs two images" in caplog.text
    trainer.eval_dataset = data[:1]
    trainer._train_retrieval(resume=False)
    assert "eval_loss" not in trainer.warm_start_metrics


def test_bias_and_scale_are_warmed_up_too(tmp_path):
    config = {"contrastive_loss_type": "siglip", "logit_scale_max": 10.0}
    trainer = warm_trainer(tmp_path, steps=30, config=config, retrieval_warm_start_learning_rate=0.1)
    trainer._train_retrieval(resume=False)
    adapter = trainer.model.adapter
    assert adapter.logit_bias.item() != -10 and adapter.logit_scale.exp().item() <= 10 * (1 + 1e-6)
    free = warm_trainer(
        tmp_path / "free", steps=30, config={**config, "logit_scale_max": None}, retrieval_warm_start_learning_rate=0.1
    )
    free._train_retrieval(resume=False)
    assert free.model.adapter.logit_scale.exp() > 10.5


def test_joint_training_that_may_undo_it_is_warned_of(caplog):
    parts = ("visual_projection", "text_projection", "ret_embedding")
    RetrievalWarmStart.warn_where_undone(1e-3, dict.fromkeys(parts, 1e-5))
    assert not caplog.records
    RetrievalWarmStart.warn_where_undone(1e-3, dict.fromkeys(parts[1:], 1e-5))
    assert "moves visual_projection at a rate of 0.001" in caplog.text and "'visual_projection': 1e-5" in caplog.text


def test_a_killed_warm_start_resumes(tmp_path):
    whole = warm_trainer(tmp_path / "whole")
    whole.train(resume_from_checkpoint=True)

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedRetrieval, "fold_into", kill)  # after its last step; earlier steps are gone with it
        with pytest.raises(KeyboardInterrupt):
            warm_trainer(tmp_path / "cut").train(resume_from_checkpoint=True)
    for folder in (tmp_path / "cut/retrieval_warm_start").glob("checkpoint-1[05]0"):
        (folder / "trainer_state.json").unlink()  # as if killed behind step 50
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        forward = CachedRetrieval.forward

        @functools.wraps(forward)  # the Trainer reads its signature
        def counted(self, *args, **kwargs):
            steps.append(self.training)
            return forward(self, *args, **kwargs)

        patch.setattr(CachedRetrieval, "forward", counted)
        resumed = warm_trainer(tmp_path / "cut")
        resumed.train(resume_from_checkpoint=True)
    assert sum(steps) == 100
    for name, tensor in whole.model.adapter.state_dict().items():
        assert torch.equal(tensor, resumed.model.adapter.state_dict()[name]), name
    again = warm_trainer(tmp_path / "cut", joint=60)
    again.train(resume_from_checkpoint=True)
    resumed_joint = warm_trainer(tmp_path / "cut", joint=60)
    resumed_joint.train(resume_from_checkpoint=True)  # from the joint checkpoint: no warm start
    assert not hasattr(resumed_joint, "warm_start_metrics")


def test_rates_per_part(tmp_path):
    rates = {"visual_projection": 1e-5, "text_projection": 1e-5, "logit_scale": 0.0}
    trainer = warm_trainer(tmp_path, steps=0, learning_rates=rates)
    scale = trainer.model.adapter.logit_scale.clone()
    trainer.create_optimizer_and_scheduler(10)
    sizes = {}
    for group in trainer.optimizer.param_groups:
        sizes[group["initial_lr"]] = sizes.get(group["initial_lr"], 0) + sum(p.numel() for p in group["params"])
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in trainer.model.adapter.named_children()}
    slow = parts["visual_projection"] + parts["text_projection"]
    assert sizes == {1e-2: sum(parts.values()) - slow, 1e-5: slow, 0.0: 1}
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert torch.equal(trainer.model.adapter.logit_scale, scale)
    with pytest.raises(ValueError, match="names 'projector'.*'multi_modal_projector'.*are"):
        warm_trainer(tmp_path, steps=0, learning_rates={"projector": 1e-5}).train()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples(4))


def test_what_cannot_be_cached_is_refused(tmp_path):
    from peft import LoraConfig

    trainer = warm_trainer(tmp_path)
    trainer.model.add_adapter(LoraConfig(target_modules=r"language_model\..*q_proj", modules_to_save=["adapter"]))
    with pytest.raises(ValueError, match="PEFT .LoRA. changes them"):
        trainer.train()

    trainer = warm_trainer(tmp_path)
    trainer.train_dataset = Stream()
    with pytest.raises(ValueError, match="a Stream has no length"):
        trainer.train()
    trainer = warm_trainer(tmp_path)
    next(trainer.model.language_model.parameters()).requires_grad_()
    with pytest.raises(ValueError, match="needs a frozen language model"):
        trainer.train()
    collate = FromageDataCollator(make_processor())
    trainer = warm_trainer(tmp_path)
    trainer.data_collator = lambda rows: collate(rows)
    with pytest.raises(ValueError, match="with a FromageDataCollator, got function"):
        trainer.train()
    trainer = warm_trainer(tmp_path)
    trainer.train_dataset = [{**row, "pooled_image_features": [0.5] * 48} for row in examples(8)]
    with pytest.raises(ValueError, match="has 48 entries an image, and this model's images have 24"):
        trainer.train()
    assert not (tmp_path / "ret_states").exists()
    for wrong in ({"retrieval_warm_start_steps": -1}, {"retrieval_warm_start_batch_size": 1}):
        with pytest.raises(ValueError, match="must be at least"):
            RetrievalWarmStart(**wrong)
    with pytest.raises(ValueError, match="retrieval_warm_start_dropout"):
        RetrievalWarmStart(retrieval_warm_start_dropout=1.0)


def test_the_warm_start_leaves_a_log(tmp_path):
    warm_trainer(tmp_path, steps=20).train()
    state = json.loads((tmp_path / "retrieval_warm_start/trainer_state.json").read_text())
    assert state["global_step"] == 20 and any("eval_text_to_image_R@1" in entry for entry in state["log_history"])


def test_an_example_without_a_caption_is_refused(collator, tmp_path):
    """Else it would be trained with the caption of the next."""
    for captions, told in (([], "Example 2 of the data set has an empty list"), (None, "empty caption: None")):
        rows = examples(4)
        rows[2]["caption"] = captions
        with pytest.raises(ValueError, match=told):
            read_pairs(make_model("opt_clip", **LAYERS), collator, rows, tmp_path)
