"""The training command on made-up data, and the Trainer with and without our subclass."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageProcessor,
    FromageTrainer,
    NormalizeRetEmbeddingCallback,
)
from tests.backbones import PARITY, make_model, make_processor
from training.train import main, parse_config

CONFIGS = sorted((Path(__file__).parent.parent / "training" / "configs").glob("*.yaml"))


@pytest.fixture
def tsv(tmp_path):
    images = (PARITY / "common" / "images").resolve()
    rows = (PARITY / "common" / "captions.tsv").read_text(encoding="utf-8").splitlines()[1:9]
    rows = [row.split("\t") for row in rows if row.count("\t") == 1]
    path = tmp_path / "train.tsv"
    path.write_text("caption\timage\n" + "".join(f"{c}\t{images / i}\n" for c, i in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configs_parse(config, tmp_path):
    _, data, args = parse_config(config, [f"output_dir={tmp_path}", "max_steps=3"])
    assert args.max_steps == 3 and data.max_length == 24 and not args.remove_unused_columns


def test_unknown_keys_are_rejected():
    with pytest.raises(ValueError, match="colour"):
        parse_config(CONFIGS[0], ["colour=red"])
    with pytest.raises(ValueError, match="key=value"):
        parse_config(CONFIGS[0], ["max_steps"])


def test_train_command(tsv, tmp_path):
    case, output = PARITY / "case_a_opt_tied", tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"language_model: {case / 'language_model'}\nvision_model: {case / 'vision_model'}\nprojection_dim: 16\n"
        f"train_data: {tsv}\neval_data: {tsv}\noutput_dir: {output}\nmax_steps: 4\nlogging_steps: 2\n"
        "per_device_train_batch_size: 4\nlearning_rate: 0.01\nsave_strategy: 'no'\nreport_to: none\nuse_cpu: true\n"
    )
    metrics = main([str(config), "eval_strategy=steps", "eval_steps=2"])
    pairs = len(tsv.read_text(encoding="utf-8").splitlines()) - 1
    assert metrics["eval_num_pairs"] == pairs
    for direction in ("text_to_image", "image_to_text"):
        assert metrics[f"eval_{direction}_R@10"] == 1.0  # no more than ten pairs
        assert metrics[f"eval_{direction}_R@1"] <= metrics[f"eval_{direction}_R@5"]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if "loss" in entry)
    parts = first["captioning_loss"] + first["ret_token_loss"] + first["contrastive_loss"]
    assert first["loss"] == pytest.approx(parts, abs=2e-3)
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    model, processor = FromageForConditionalGeneration.from_pretrained(output), FromageProcessor.from_pretrained(output)
    processor.check_config(model.config)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_trainer_with_the_callback_trains_the_same_way(tmp_path, accumulation):
    processor = make_processor()
    captions = json.loads((PARITY / "common" / "captions.json").read_text(encoding="utf-8"))["captions"][:8]
    data = [{"pooled_image_features": torch.rand(24), "caption": caption} for caption in captions]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        remove_unused_columns=False, save_strategy="no", use_cpu=True, gradient_accumulation_steps=accumulation,
        logging_steps=1,
    )  # fmt: skip
    trained = []
    for cls, callbacks in ((FromageTrainer, []), (Trainer, [NormalizeRetEmbeddingCallback()])):
        model = make_model("opt_clip")
        initial = {n: p.clone() for n, p in model.named_parameters()}
        trainer = cls(model=model, args=args, train_dataset=data, callbacks=callbacks,
                      data_collator=FromageDataCollator(processor))  # fmt: skip
        trainer.train()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, initial[name]) != name.startswith("adapter."), name
        trained.append(dict(model.adapter.state_dict()))
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_mixed_precision_trains_fp32_parts_beside_bf16_backbones(tmp_path):
    processor = make_processor()
    data = [{"pooled_image_features": torch.rand(24), "caption": f"a cat number {i}"} for i in range(8)]
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("opt_clip")
        model.language_model.to(dtype)
        model.vision_model.to(dtype)
        frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("adapter.")}
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
            remove_unused_columns=False, save_strategy="no", use_cpu=True, logging_steps=1,
            bf16=dtype == torch.bfloat16,
        )  # fmt: skip
        trainer = FromageTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=data,
            data_collator=FromageDataCollator(processor, concat_captions_prob=0),
        )
        trainer.train()
        assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
        assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
