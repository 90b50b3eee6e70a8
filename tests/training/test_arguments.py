"""Every field of FromageConfig is a key of training files, or refused with a reason."""

import inspect
import re
from dataclasses import fields

import pytest
import torch

from modeling_fromage import FromageConfig
from tests.helpers.backbones import PARITY
from training import cli
from training.arguments import (
    DECIDED_ELSEWHERE,
    USUAL_KEYS,
    DataArguments,
    ModelArguments,
    RunArguments,
    parse_config,
)
from training.benchmarks import timing
from training.train import assemble, main

CASE = PARITY / "case_a_opt_tied"
REQUIRED = [f"language_model={CASE / 'language_model'}", f"vision_model={CASE / 'vision_model'}", "train_data=c"]
OWN = list(inspect.get_annotations(FromageConfig))
# Another value than the default, as written in a file.
CHOSEN = {
    "num_image_tokens": "2",
    "projection_dim": "16",
    "text_embed_layers": "[1, -1]",
    "num_ret_tokens": "2",
    "ret_aggregation": "max",
    "tie_ret_embedding": "false",
    "logit_scale_init_value": "1.5",
    "projector_type": "resampler",
    "resampler_num_layers": "2",
    "vision_patch_tokens": "4",
    "vision_feature_layer": "-2",
    "vision_pooling": "cls",
    "captioning_loss_weight": "0.5",
    "ret_token_loss_weight": "0",
    "contrastive_loss_weight": "2e0",
    "contrastive_loss_type": "siglip",
    "captioning_label_smoothing": "0.1",
    "logit_scale_max": "100",
    "mask_duplicate_images": "true",
    "gradient_cache_chunk_size": "4",
    "image_feature_dropout": "0.25",
    "text_gguf_file": "null",
}
OF_INFONCE = {"contrastive_label_smoothing": "0.2"}  # refused with SigLIP's loss


@pytest.fixture
def parse(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    return lambda *overrides: parse_config(str(tmp_path / "empty.yaml"), [*REQUIRED, *overrides])


def test_every_field_reaches_the_model(parse):
    assert set(OWN) == DECIDED_ELSEWHERE.keys() | CHOSEN.keys() | OF_INFONCE.keys()
    arguments, *_ = parse(*(f"{name}={value}" for name, value in OF_INFONCE.items()))
    _, model = assemble(arguments)
    assert all(getattr(model.config, name) == float(value) for name, value in OF_INFONCE.items())
    arguments, *_ = parse(*(f"{name}={value}" for name, value in CHOSEN.items()))
    _, model = assemble(arguments)
    defaults = FromageConfig()
    for name in CHOSEN:
        assert getattr(model.config, name) == getattr(arguments, name), name
    unchanged = {name for name in CHOSEN if getattr(model.config, name) == getattr(defaults, name)}
    assert unchanged == {"text_gguf_file"}  # which has one value here


@pytest.mark.parametrize("name", OWN)
def test_values_of_another_type_are_refused_by_name(name, parse):
    with pytest.raises(ValueError, match=f"`{name}` (must be|cannot be set: .*Leave it out)"):
        parse(f"{name}={{a: 1}}")


@pytest.mark.parametrize(("speed_up", "expected"), [(8.0, "bfloat16"), (1.1, "float32"), (0.1, "float32")])
def test_the_fastest_dtype_is_found_by_trying(speed_up, expected, parse, monkeypatch):
    rates = {torch.float32: 1e9, torch.bfloat16: speed_up * 1e9}
    monkeypatch.setattr(timing, "product_rate", lambda rows, inner, columns, dtype, device: rates[dtype])
    model_args, _, _ = parse("dtype=fastest")
    assert model_args.dtype == expected


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rat", "Did you mean learning_rate?"),
        ("lr", "or learning_rate or"),
        ("batch_size", "per_device_train_batch_size"),
        ("epochs", "num_train_epochs"),
        ("train_dat", "Did you mean train_data?"),
        ("qqqqqq", "Leave it out."),
    ],
)
def test_an_unknown_key_names_the_nearest(parse, key, hint):
    with pytest.raises(ValueError) as refused:
        parse(f"{key}=1")
    assert str(refused.value).startswith(f"There is no key '{key}'. ") and hint in str(refused.value)


def test_each_unknown_key_is_told_of(parse):
    with pytest.raises(ValueError, match="no key 'learn_rate'. Did you mean .*no key 'seeds'. Did you mean seed"):
        parse("seeds=1", "learn_rate=1")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "paper", "--dryrun"], r"unrecognized arguments: --dryrun. Did you mean --dry-run\?"),
        (
            ["train", "paper", "--learning_rate", "1"],
            "written without dashes: learning_rate=VALUE",
        ),
        (["tran", "paper"], r"invalid choice: 'tran' .*Did you mean train\?"),
        (["push", "a", "org/b", "--dataset", "c", "--stagingdir", "d"], r"Did you mean --staging-dir\?"),
    ],
)
def test_an_unknown_option_names_the_nearest(arguments, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and re.search(hint, capsys.readouterr().err)


def test_help_fits_on_a_page(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and len(told.splitlines()) <= 60
    for name in (name for names in USUAL_KEYS.values() for name in names):
        (line,) = re.findall(rf"\n  {name} \(.*(?:\n      .*)*", told)
        assert len(line.partition("): ")[2]) > 10, line
    assert "language_model: facebook/opt-125m" in told and "--help-all" in told and "--dry-run" in told


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["--help-all"])
    told = capsys.readouterr().out
    for cls in (ModelArguments, DataArguments, RunArguments):
        assert all(told.count(f"\n  {known.name} (") == 1 for known in fields(cls) if known.init)
    assert all(f"\n  {known.name} (" in told for known in fields(ModelArguments))
    assert all(known.metadata["help"] for known in fields(ModelArguments))
    assert "gradient_accumulation_steps" in told


def test_files_that_come_with_the_package_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, args = parse_config("paper", ["output_dir=here"])
    assert model.language_model == "facebook/opt-6.7b" and args.output_dir == "here"
    with pytest.raises(ValueError, match="one of: .*paper, quickstart, "):
        parse_config("papers", [])
