"""The training command on made-up data, and the Trainer with and without our subclass."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageProcessor,
    FromageTrainer,
    NormalizeRetEmbeddingCallback,
)
from tests.helpers.backbones import PARITY, make_model, make_processor
from training.train import main, parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))


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


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("1e-3", "learning_rate", 1e-3),
        ("'1e-3'", "learning_rate", 1e-3),
        ("3", "learning_rate", 3),
        ("1e3", "max_steps", 1000),
        ("010", "max_steps", 10),
        ("no", "save_strategy", "no"),
        ("false", "save_strategy", "no"),
        ("No", "bf16", False),
        ("yes", "greater_is_better", True),
        ("null", "eval_steps", None),
        ("true", "resume_from_checkpoint", "true"),
        ("false", "resume_from_checkpoint", "false"),
        ("[-1, -2]", "text_embed_layers", [-1, -2]),
        ("bf16", "dtype", "bfloat16"),
        ("fp16", "dtype", "float16"),
        ("fp32", "dtype", "float32"),
        ("torch.bfloat16", "dtype", "bfloat16"),
        ("no", "caption_prefix", "no"),
        ("''", "caption_prefix", ""),
        ("2024", "run_name", "2024"),
        ("1:30", "run_name", "1:30"),
        ("{a: 1e-3}", "lr_scheduler_kwargs", {"a": 1e-3}),
    ],
)
def test_values_become_what_their_fields_are(written, key, value, tmp_path):
    """In the file and behind it alike."""
    config = tmp_path / "config.yaml"
    whole = f"language_model: a\nvision_model: b\ntrain_data: c\noutput_dir: {tmp_path}\n"
    config.write_text(whole)
    overridden = parse_config(str(config), [f"{key}={written}"])
    config.write_text(f"{whole}{key}: {written}\n")
    for arguments in (overridden, parse_config(str(config), [])):
        (found,) = [getattr(part, key) for part in arguments if hasattr(part, key)]
        assert found == value and type(found) in (type(value), SaveStrategy)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=fast", "`learning_rate` must be a number, got 'fast'"),
        ("max_steps=3.5", "`max_steps` must be a whole number, got 3.5"),
        ("max_steps=true", "`max_steps` must be a whole number, got True"),
        ("bf16=maybe", "`bf16` must be true or false, got 'maybe'"),
        ("num_image_tokens=null", "`num_image_tokens` must be a whole number, got None"),
        ("text_embed_layers=-1", "`text_embed_layers` must be .*got -1"),
        ("text_embed_layers=[last]", "`text_embed_layers` must be .*got .'last'"),
        ("run_name=1.10", "`run_name` must be a text or nothing, got 1.1. .*quotes"),
        ("dtype=int8", "no dtype 'int8'.*float32 .*bfloat16 .*float16"),
        ("save_strategy=sometimes", "sometimes is not a valid SaveStrategy.*steps"),
        ("language_model=null", "`language_model` must be a text, got None"),
        ("learning_rat=1", "no key 'learning_rat'. Did you mean learning_rate"),
        ("max_steps=[1", "'max_steps=.1' is not valid YAML"),
    ],
)
def test_values_of_another_type_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        parse_config(CONFIGS[0], [override])


def test_what_a_file_must_say(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("language_model: a\ntrain_data: c\n")
    with pytest.raises(ValueError, match="`vision_model` is missing"):
        parse_config(str(config), [])


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
    kept = json.loads((output / "all_results.json").read_text())
    assert kept == metrics and kept["train_loss"] > 0 and kept["eval_loss"] == losses[-1]


def test_format_of_captions_is_saved_with_every_checkpoint(tsv, tmp_path):
    case, output = PARITY / "case_a_opt_tied", tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"language_model: {case / 'language_model'}\nvision_model: {case / 'vision_model'}\ntrain_data: {tsv}\n"
        f"output_dir: {output}\nmax_steps: 1\nsave_steps: 1\nreport_to: none\nuse_cpu: true\n"
        'caption_prefix: A picture of\ncaption_suffix: "\\n"\nmax_length: 16\n'
    )
    (output).mkdir()
    (output / "all_results.json").write_text('{"eval_loss": 1.0}')  # of an earlier run, with eval_data
    main([str(config)])
    for folder in (output, output / "checkpoint-1"):
        processor = FromageProcessor.from_pretrained(folder)
        found = (processor.caption_prefix, processor.caption_suffix, processor.max_length)
        assert found == ("A picture of", "\n", 16)
    assert "eval_loss" not in json.loads((output / "all_results.json").read_text())


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
