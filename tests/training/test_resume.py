"""The Trainer's checkpoints: what they hold, resuming after SIGKILL, the best model, and the limit on their number."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageTrainer,
    NormalizeRetEmbeddingCallback,
)
from modeling_fromage.backbone_loading_fromage import PARTS
from modeling_fromage.trainer.checkpoints import last_complete_checkpoint
from tests.helpers.checkpoints import TRAINED_KEYS, assemble, assert_equal, edit, keys_of, outputs
from tests.helpers.training import losses
from training.train import main

ROOT = Path(__file__).parents[2]
RUN = """
import os, signal, sys
import transformers.trainer_callback
import modeling_fromage.checkpoint_fromage as checkpoint
from training.train import main

kill_at, config, *overrides = sys.argv[1:]
if kill_at == "in_state":  # of the second checkpoint: weights and optimiser are there, the state is half written
    whole = transformers.trainer_callback.TrainerState.save_to_json

    def save_to_json(self, path):
        whole(self, path)
        if "checkpoint-4" in path:
            text = open(path).read()
            open(path, "w").write(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    transformers.trainer_callback.TrainerState.save_to_json = save_to_json
if kill_at == "in_weights":
    whole = checkpoint._replace_checkpoint

    def move(staging, directory):
        if "checkpoint-4" in str(directory):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(staging, directory)

    checkpoint._replace_checkpoint = move
if kill_at == "between":
    step = transformers.trainer_callback.CallbackHandler.on_step_end

    def on_step_end(self, args, state, control):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, args, state, control)

    transformers.trainer_callback.CallbackHandler.on_step_end = on_step_end
main([config, *overrides])
"""


def train(tmp_path: Path, kill_at: str, output: str, *overrides: str) -> subprocess.CompletedProcess:
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", kill_at, "config.yaml", f"output_dir={output}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.fixture
def config(backbones, tmp_path):
    images = (ROOT / "tests/fixtures/parity/common/images").resolve()
    lines = [f"a picture of thing {i}\t{images}/img_{i:03d}.png" for i in range(12)]
    (tmp_path / "train.tsv").write_text("caption\timage\n" + "\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text(
        "language_model: backbones/language_model\nvision_model: backbones/vision_model\nprojection_dim: 16\n"
        "train_data: train.tsv\nmax_steps: 6\nsave_steps: 2\nlogging_steps: 1\nper_device_train_batch_size: 4\n"
        "gradient_accumulation_steps: 2\nlearning_rate: 0.01\nreport_to: none\nuse_cpu: true\nseed: 3\n"
    )
    return tmp_path / "config.yaml"


def test_a_killed_run_resumes_as_if_nothing_had_happened(config, tmp_path):
    done = train(tmp_path, "never", "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = losses(tmp_path / "whole")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    for kill_at in ("between", "in_state", "in_weights"):
        killed = train(tmp_path, kill_at, kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        output = tmp_path / kill_at
        resumes_from = "checkpoint-4" if kill_at == "between" else "checkpoint-2"
        assert Path(last_complete_checkpoint(output)).name == resumes_from
        resumed = train(tmp_path, "never", kill_at, "resume_from_checkpoint=true")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert "missing keys" not in resumed.stderr
        assert losses(output) == expected, kill_at
        for checkpoint in (output, output / "checkpoint-4"):
            assert keys_of(checkpoint) == TRAINED_KEYS
            assert not list(checkpoint.glob(".saving-*"))  # what the killed process left
        final, whole = (load_file(tmp_path / name / "model.safetensors") for name in (kill_at, "whole"))
        assert_equal(final, whole)


def test_a_killed_run_goes_on_with_its_average(config, tmp_path):
    option = "ema_decay=0.8"
    for kill_at, output, *more in (
        ("never", "whole"),
        ("between", "cut"),
        ("never", "cut", "resume_from_checkpoint=true"),
    ):
        run = train(tmp_path, kill_at, output, option, *more)
        assert run.returncode == (0 if kill_at == "never" else -signal.SIGKILL), run.stderr[-3000:]
    for name in ("model.safetensors", "checkpoint-6/weight_average.safetensors"):
        assert_equal(*(load_file(tmp_path / output / name) for output in ("cut", "whole")))
    plain = train(tmp_path, "never", "plain")
    assert plain.returncode == 0 and losses(tmp_path / "plain") == losses(tmp_path / "whole") == losses(
        tmp_path / "cut"
    )


@pytest.mark.parametrize("trainer_class", [Trainer, FromageTrainer])
def test_best_model_and_limit(backbones, tmp_path, trainer_class, caplog):
    logging.enable_propagation()  # to caplog
    caplog.set_level("INFO", logger="transformers.trainer")
    model, processor = assemble(backbones)
    torch.manual_seed(0)
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.1,
        report_to="none", remove_unused_columns=False, use_cpu=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, load_best_model_at_end=True,
    )  # fmt: skip
    callbacks = [NormalizeRetEmbeddingCallback()] if trainer_class is Trainer else []
    trainer = trainer_class(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks,
                            data_collator=FromageDataCollator(processor), processing_class=processor)  # fmt: skip
    trainer.train()
    best = min((entry for entry in trainer.state.log_history if "eval_loss" in entry), key=lambda e: e["eval_loss"])
    checkpoints = sorted(path for path in (tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) <= 2 and tmp_path / "run" / f"checkpoint-{best['step']}" in checkpoints
    for checkpoint in checkpoints:
        assert keys_of(checkpoint) == TRAINED_KEYS
        assert {"optimizer.pt", "trainer_state.json", "processor_config.json"} <= {p.name for p in checkpoint.iterdir()}
    loaded = FromageForConditionalGeneration.from_pretrained(tmp_path / "run" / f"checkpoint-{best['step']}")
    assert_equal(outputs(model.eval()), outputs(loaded))
    logging.disable_propagation()
    assert "Loading best model" in caplog.text and "missing keys" not in caplog.text
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("resume", [True, "true", "True"])
def test_one_command_before_and_after_the_first_checkpoint(backbones, tmp_path, resume, caplog):
    (tmp_path / "checkpoint-3").mkdir()  # killed in its first save
    (tmp_path / "checkpoint-best").mkdir()  # not the Trainer's
    assert last_complete_checkpoint(tmp_path) is None
    model, processor = assemble(backbones)
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    steps = []
    for max_steps in (2, 4):
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=max_steps, per_device_train_batch_size=4,
                                 save_steps=2, logging_steps=1, report_to="none", use_cpu=True)  # fmt: skip
        trainer = FromageTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
        first_steps = []
        trainer.training_step = lambda *a, t=trainer, f=first_steps, step=trainer.training_step, **k: (
            f.append(t.state.global_step) or step(*a, **k)
        )
        trainer.train(resume_from_checkpoint=resume)
        steps.append(first_steps)
    assert steps == [[0, 1], [2, 3]]
    assert caplog.text.count("has no complete checkpoint yet: training starts from the beginning") == 1


@pytest.mark.parametrize("missing", ["checkpoint-9", "elsewhere"])
def test_an_explicit_checkpoint_that_is_missing_is_refused(backbones, tmp_path, missing):
    model, processor = assemble(backbones)
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = FromageTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    with pytest.raises((ValueError, OSError), match=missing):
        trainer.train(resume_from_checkpoint=str(tmp_path / missing))


def test_the_training_command_resumes_before_the_first_checkpoint(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, value in (("plain", "true"), ("quoted", "'true'")):
        main([str(config), f"output_dir={run}", "max_steps=1", f"resume_from_checkpoint={value}"])
        assert list(losses(Path(run))) == [1]


def make_trainer(model, processor, output: Path, trainer_class=FromageTrainer, **kwargs):
    torch.manual_seed(0)
    data = [{"pooled_image_features": torch.rand(32), "caption": f"a cat number {i}"} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=4, learning_rate=0.1, report_to="none", use_cpu=True,
        remove_unused_columns=False, **{"max_steps": 2, "save_steps": 1, **kwargs},
    )  # fmt: skip
    return trainer_class(model=model, args=args, train_dataset=data, data_collator=FromageDataCollator(processor))


def test_checkpoints_of_a_run_name_their_backbones(backbones, tmp_path):
    model, processor = assemble(backbones)
    output = tmp_path / "a" / "b" / "c" / "run"  # more than two folders from the backbones
    trainer = make_trainer(model, processor, output, max_steps=3)
    trainer.train()
    expected = outputs(copy.deepcopy(model).eval())
    checkpoint = output / "checkpoint-3"
    assert keys_of(checkpoint) == TRAINED_KEYS
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["text_model_id"] == str(backbones / "language_model")
    assert config["vision_model_fingerprint"]["model.safetensors"]["size"] > 0
    assert_equal(outputs(FromageForConditionalGeneration.from_pretrained(checkpoint)), expected)

    trainer.save_model()  # may be published: no path of this machine
    assert str(backbones) not in (output / "config.json").read_text() and keys_of(output) > TRAINED_KEYS
    assert_equal(outputs(FromageForConditionalGeneration.from_pretrained(output)), expected)
    near = tmp_path / "near"
    FromageForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(near)
    assert json.loads((near / "config.json").read_text())["text_model_id"] == "../backbones/language_model"

    elsewhere = backbones.rename(tmp_path / "elsewhere")
    message = f"language model was in {backbones}/language_model, and there is no such folder here.*`text_model_id="
    with pytest.raises(ValueError, match=message):
        FromageForConditionalGeneration.from_pretrained(checkpoint)
    names = {f"{prefix}_model_id": str(elsewhere / part) for prefix, part in PARTS.items()}
    assert_equal(outputs(FromageForConditionalGeneration.from_pretrained(checkpoint, **names)), expected)
    again, _ = assemble(elsewhere)
    make_trainer(again, processor, tmp_path / "resumed", max_steps=3).train(str(output / "checkpoint-1"))
    assert_equal(outputs(again.eval()), expected)
    edit(elsewhere / "vision_model" / "model.safetensors", lambda tensors: tensors["post_layernorm.bias"].add_(1))
    with pytest.raises(ValueError, match="vision model .*other contents"):
        FromageForConditionalGeneration.from_pretrained(checkpoint, **names)


@pytest.mark.parametrize("fate", ["trained", "edited", "gone"])
def test_checkpoints_of_a_run_hold_a_backbone_that_cannot_be_named(backbones, tmp_path, fate):
    model, processor = assemble(backbones)
    trainer = make_trainer(model, processor, tmp_path / "run", max_steps=1)
    if fate == "trained":
        model.language_model.model.decoder.layers[0].requires_grad_(True)
    elif fate == "edited":
        model.language_model.lm_head.weight.data[3, 3] += 0.5
    else:
        shutil.rmtree(backbones / "vision_model")
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert keys_of(checkpoint) > TRAINED_KEYS
    shutil.rmtree(backbones)
    assert_equal(outputs(FromageForConditionalGeneration.from_pretrained(checkpoint)), outputs(model.eval()))


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_checkpoints_that_name_local_backbones_are_not_pushed(backbones, tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)  # no Hub
    model, processor = assemble(backbones)
    trainer = make_trainer(model, processor, tmp_path / "run", push_to_hub=True, hub_strategy=strategy, max_steps=1)
    pushed = []
    monkeypatch.setattr(trainer, "_push_from_checkpoint", pushed.append)
    if strategy == "end":
        trainer.train()
        assert keys_of(tmp_path / "run" / "checkpoint-1") == TRAINED_KEYS
    else:
        with pytest.raises(ValueError, match="language model is not on the Hub"):
            trainer.train()
        assert trainer.state.global_step == 0 and not pushed
        assert not list(tmp_path.glob("run/checkpoint-*"))
    with pytest.raises(ValueError, match="language model is not on the Hub"):
        trainer.push_to_hub()


def test_lora_that_checkpoints_would_leave_out_is_refused(backbones, tmp_path):
    model, processor = assemble(backbones)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model.language_model = get_peft_model(model.language_model, config)
    trainer = make_trainer(model, processor, tmp_path / "run")
    with pytest.raises(ValueError, match="it would be lost"):
        trainer.train()
    assert trainer.state.global_step == 0
    make_trainer(model, processor, tmp_path / "run", save_strategy="no").train()


@pytest.mark.parametrize("kwargs", [{"modules_to_save": ["adapter"]}, {"use_dora": True}])
def test_resuming_with_an_adapter_of_add_adapter(backbones, tmp_path, kwargs):
    def start(output: str, **options):
        torch.manual_seed(0)
        model, processor = assemble(backbones)
        model.add_adapter(
            LoraConfig(r=2, target_modules=r"language_model\..*\.(q_proj|v_proj)", lora_dropout=0.1, **kwargs)
        )
        model.freeze_backbones()
        return model, make_trainer(model, processor, tmp_path / output, max_steps=3, **options)

    model, trainer = start("run")
    trainer.train()
    again, trainer = start("again")
    trainer.train(str(tmp_path / "run" / "checkpoint-1"))
    assert_equal(dict(again.named_parameters()), dict(model.named_parameters()))
    third, trainer = start("third")
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-3")
    trainer._load_best_model()
    assert_equal(dict(third.named_parameters()), dict(model.named_parameters()))
    loaded = FromageForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert_equal(outputs(loaded), outputs(model.eval()))
    plain, trainer = start("plain", trainer_class=Trainer)
    with pytest.raises(ValueError, match="no tensor of the PEFT adapter"):
        trainer.train(str(tmp_path / "run" / "checkpoint-1"))


def test_processor_of_another_model_is_refused(backbones, tmp_path):
    model, processor = assemble(backbones)
    model.config.num_image_tokens = 3
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="num_image_tokens` is 2, the model's is 3"):
        FromageTrainer(model=model, args=args, data_collator=FromageDataCollator(processor))
