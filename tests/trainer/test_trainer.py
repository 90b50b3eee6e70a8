"""What the Trainer refuses, when it stops, what it logs, streamed data sets, and its defaults."""

import json
import math
import os

import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from modeling_fromage import FromageDataCollator, FromageTrainer, NormalizeRetEmbeddingCallback
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.distributed import in_two_processes
from tests.helpers.training_runs import arguments, examples

PARTS = ("captioning_loss", "ret_token_loss", "contrastive_loss")
WEIGHTS = {"captioning_loss_weight": 0.5, "ret_token_loss_weight": 2.0, "contrastive_loss_weight": 3.0}


def make_trainer(folder, trainer_class=FromageTrainer, data=None, options=None, collator=None, **kwargs):
    data = examples(8) if data is None else data
    if trainer_class is Trainer:
        options = {"remove_unused_columns": False, **(options or {})}
    return trainer_class(model=make_model("opt_clip"), args=arguments(folder, **(options or {})), train_dataset=data,
                         data_collator=collator or FromageDataCollator(make_processor()), **kwargs)  # fmt: skip


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_batches_are_grouped_by_a_column_of_lengths(tmp_path):
    rows = Dataset.from_list([{**row, "length": len(row["caption"])} for row in examples(8)])
    options = {"train_sampling_strategy": "group_by_length", "eval_strategy": "no"}
    trainer = make_trainer(tmp_path, data=rows, options=options, eval_dataset=rows)
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, LengthGroupedSampler)
    trainer.train()
    assert trainer.evaluate()["eval_num_pairs"] == 8


# ---- refusals -------------------------------------------------------------------------------------------------------

REPLACING = [
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1.*Set it to 0.*captioning_label_smoothing"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0.*eval mode"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True.*Leave it out"),
    ({"torch_compile": True}, "torch_compile=True.*vision_model.compile"),
]


@pytest.mark.parametrize(
    "options, message",
    [
        *REPLACING,
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True.*recall"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False.*recall"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    ],
)
def test_arguments_that_train_something_else_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # `torch_compile` sets a variable for accelerate
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, options=options)


@pytest.mark.parametrize("options, message", REPLACING)
def test_a_plain_trainer_refuses_them_by_the_callback(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, Trainer, options=options, callbacks=[NormalizeRetEmbeddingCallback()])
    if "use_liger_kernel" not in options:  # the Trainer looks for its package first
        trainer = make_trainer(tmp_path, Trainer, options=options)
        trainer.add_callback(NormalizeRetEmbeddingCallback())
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_a_loss_function_is_refused(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum()

    with pytest.raises(ValueError, match="compute_loss_func.*captioning_loss_weight"):
        make_trainer(tmp_path, compute_loss_func=loss)
    for options, kwargs in (({}, {"compute_loss_func": loss}), ({"label_smoothing_factor": 0.1}, {})):
        trainer = make_trainer(tmp_path, Trainer, options=options, **kwargs)  # nothing of ours but the model
        with pytest.raises(ValueError, match="no labels.*label_smoothing_factor.*compute_loss_func"):
            trainer.train()


# ---- the contrastive scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer_class", [FromageTrainer, Trainer])
def test_the_scale_is_cut_after_each_step(tmp_path, trainer_class):
    args = arguments(tmp_path, max_steps=4, learning_rate=1e-3, remove_unused_columns=False)
    kwargs = {"data_collator": FromageDataCollator(make_processor()), "train_dataset": examples(8)}
    for largest in (20.0, None):
        model, seen = make_model("opt_clip", logit_scale_max=largest), []
        torch.nn.init.constant_(model.adapter.logit_scale, 5.0)

        class Watch(TrainerCallback):
            def on_step_end(self, *args, model, seen=seen, **kwargs):
                seen.append(model.adapter.logit_scale.exp().item())

        callbacks = [*([NormalizeRetEmbeddingCallback()] if trainer_class is Trainer else []), Watch()]
        trainer_class(model=model, args=args, callbacks=callbacks, **kwargs).train()
        assert len(seen) == 4
        assert max(seen) == pytest.approx(20) if largest else min(seen) > 140


# ---- numbers that are none ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    data = examples(12)
    data[9]["pooled_image_features"][3] = math.inf
    options = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "max_steps": 6}
    trainer = make_trainer(tmp_path, data=data, options=options)
    with pytest.raises(
        FloatingPointError, match=r"Step 5 was not taken, .* of nan \(captioning_loss nan, ret_token_loss [\d.]+"
    ):
        trainer.train()
    assert trainer.state.global_step == 4 and len(logged(trainer)) == 4
    assert all(parameter.isfinite().all() for parameter in trainer.model.adapter.parameters())


@pytest.mark.parametrize("trainer_class", [FromageTrainer, Trainer])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_training(tmp_path, trainer_class, clip):
    callbacks = [NormalizeRetEmbeddingCallback()] if trainer_class is Trainer else []
    trainer = make_trainer(tmp_path, trainer_class, options={"max_grad_norm": clip}, callbacks=callbacks)
    weight = trainer.model.adapter.visual_projection.weight
    weight.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step == 2 else 1.0))
    with pytest.raises(
        FloatingPointError, match="Step 3 was not taken, for gradients.*adapter.visual_projection.weight"
    ):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.adapter.parameters())


@pytest.mark.parametrize("trainer_class", [FromageTrainer, Trainer])
def test_a_last_step_that_overflows_is_not_saved(tmp_path, trainer_class):
    callbacks = [NormalizeRetEmbeddingCallback()] if trainer_class is Trainer else []
    options = {"learning_rate": 1e39, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, trainer_class, options=options, callbacks=callbacks)
    with pytest.raises(FloatingPointError, match="Step 1 left numbers that are not finite: adapter"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_gradient_scaler_that_gives_up_stops_training(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-15)
    with pytest.raises(
        FloatingPointError, match="Step 1 was not taken: the gradients have not been finite for many steps"
    ):
        trainer.train()


# ---- the log --------------------------------------------------------------------------------------------------------


def check_sums(entries: list[dict]):
    for entry in entries:
        parts = sum(WEIGHTS[f"{name}_weight"] * entry[name] for name in PARTS)
        assert parts == pytest.approx(entry["loss"], rel=1e-5), entry


def weight_losses(trainer):
    for name, value in WEIGHTS.items():
        setattr(trainer.model.config, name, value)


@pytest.mark.parametrize("every", [1, 2])
def test_loss_parts_add_up_under_accumulation(tmp_path, every):
    """Of 7 examples in twos, three batches make the first step of an epoch and one the second."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 4}
    trainer = make_trainer(tmp_path, data=examples(7), options={**options, "logging_steps": every})
    weight_losses(trainer)
    trainer.train()
    assert len(logged(trainer)) == 4 // every
    check_sums(logged(trainer))


# ---- streamed data sets ---------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def streamed(kind, data):
    return Stream(data) if kind == "torch" else StreamedDataset.from_generator(lambda: iter(data))


@pytest.mark.parametrize("kind", ["torch", "datasets"])
@pytest.mark.parametrize("trainer_class", [FromageTrainer, Trainer])
def test_a_streamed_data_set_trains_as_a_list_does(tmp_path, trainer_class, kind):
    data, losses = examples(18), []
    callbacks = [NormalizeRetEmbeddingCallback()] if trainer_class is Trainer else []
    for dataset in (data, streamed(kind, data)):
        collator = FromageDataCollator(make_processor(), concat_captions_prob=0.5, seed=4)
        trainer = make_trainer(
            tmp_path, trainer_class, dataset, {"train_sampling_strategy": "sequential", "max_steps": 5}, collator,
            callbacks=list(callbacks), eval_dataset=dataset,
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in logged(trainer)])
        if trainer_class is FromageTrainer:
            metrics = trainer.evaluate()
            assert metrics["eval_num_pairs"] == 18
            losses[-1] += [metrics["eval_loss"], metrics["eval_text_to_image_R@1"]]
    layout = collator.processor.caption_layout
    concatenated = [collator._concatenates([layout.encode(e["caption"]) for e in data[i : i + 4]])
                    for i in range(0, 18, 4)]  # fmt: skip
    assert len(set(concatenated)) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


class Recorder(FromageDataCollator):
    """Notes the captions that it collates."""

    def __call__(self, batch):
        self.seen += [example["caption"] for example in batch]
        return super().__call__(batch)


def train_in_two(rank: int, folder: str):
    options = {"ddp_backend": "gloo", "max_steps": 3, "per_device_train_batch_size": 4}
    result = {}
    for kind in ("torch", "datasets"):
        collator = Recorder(make_processor(), concat_captions_prob=0.5)
        collator.seen = []
        dataset = streamed(kind, examples(24))
        trainer = make_trainer(folder, data=dataset, options=options, collator=collator, eval_dataset=dataset)
        weight_losses(trainer)
        trainer.train()
        result[kind] = {"seen": collator.seen, "log": logged(trainer)}
    with pytest.raises(ValueError, match="streamed data set in 2 processes"):
        trainer.evaluate()
    options = {**options, "gradient_accumulation_steps": 2, "logging_steps": 2}
    trainer = make_trainer(folder, data=examples(21), options={**options, "max_steps": 4})  # uneven in every way
    weight_losses(trainer)
    trainer.train()
    result["uneven"] = {"log": logged(trainer)}
    concatenating = FromageDataCollator(make_processor(), concat_captions_prob=1.0)
    alike = [{**example, "caption": "a cat"} for example in examples(24)]  # else accelerate cannot join the batches
    plain = make_trainer(folder, Trainer, Stream(alike), options, concatenating)
    with pytest.raises(ValueError) as refused:
        plain.train()
    result["refused"] = str(refused.value)
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(result, file)


def test_two_processes(tmp_path):
    in_two_processes(train_in_two, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for kind in ("torch", "datasets"):
        assert len(first[kind]["seen"]) == len(second[kind]["seen"]) == 12
        assert sorted(first[kind]["seen"] + second[kind]["seen"]) == sorted(e["caption"] for e in examples(24))
        assert len(first[kind]["log"]) == 3
    for kind in ("torch", "datasets", "uneven"):
        check_sums(first[kind]["log"])
        for ours, theirs in zip(first[kind]["log"], second[kind]["log"], strict=True):
            assert [ours[name] for name in PARTS] == [theirs[name] for name in PARTS]
    for refused in (first["refused"], second["refused"]):
        assert 'accelerator_config={"dispatch_batches": False}' in refused


# ---- defaults -------------------------------------------------------------------------------------------------------


def test_plain_arguments_and_no_collator(tmp_path):
    processor, data = make_processor(), Dataset.from_list(examples(8))
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", seed=7)
    trainer = FromageTrainer(model=make_model("opt_clip"), args=args, train_dataset=data, eval_dataset=data,
                             processing_class=processor)  # fmt: skip
    assert isinstance(trainer.data_collator, FromageDataCollator) and trainer.data_collator.seed == 7
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.evaluate()["eval_num_pairs"] == 8
    with pytest.raises(ValueError, match="must be a FromageProcessor, got NoneType.*processing_class=processor"):
        FromageTrainer(model=make_model("opt_clip"), args=args, train_dataset=data)
    with pytest.raises(ValueError, match="must be a FromageProcessor, got .*Tokenizer"):
        FromageTrainer(model=make_model("opt_clip"), args=args, processing_class=processor.tokenizer)
