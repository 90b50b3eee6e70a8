"""`fromage train --dry-run`: what it tells is what then happens, and nothing is trained or left behind."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from transformers import OPTConfig, OPTForCausalLM

from modeling_fromage.trainer.pictures import Word
from tests.helpers import processes
from tests.helpers.backbones import PARITY, make_processor
from training.dry_run import describe_parts, draw_first_batch, dry_run, duration
from training.first_batch import picture_of, tokens_as_words
from training.rehearsal import LONG_STEPS, USUAL_STEPS, Rehearsal, longest_batch, rehearse
from training.train import main, parse_config, prepare

CASE = PARITY / "case_a_opt_tied"
IMAGES = (PARITY / "common" / "images").resolve()


def write_config(folder, language_model=CASE / "language_model", count=16, **keys) -> str:
    pairs = folder / "pairs.tsv"
    rows = [f"picture {i}{' and so on' * (i % 7)}\t{IMAGES / f'img_{i % 10:03d}.png'}\n" for i in range(count)]
    pairs.write_text("caption\timage\n" + "".join(rows), encoding="utf-8")
    values = {
        "language_model": language_model, "vision_model": CASE / "vision_model", "projection_dim": 16,
        "train_data": pairs, "output_dir": folder / "out", "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", "max_steps": 4, "save_steps": 4,
        "logging_steps": 2,
    } | keys  # fmt: skip
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return str(path)


def prepared(path: str, *overrides: str):
    return prepare(*parse_config(path, list(overrides)))


def test_what_is_printed_and_what_is_left(tmp_path, capsys):
    config = write_config(tmp_path, gradient_accumulation_steps=2, eval_data=tmp_path / "pairs.tsv",
                          eval_strategy="steps", eval_steps=4, mask_duplicate_images="true")  # fmt: skip
    assert main([config, "--dry-run", "max_steps=10"]) == {}
    told = capsys.readouterr().out
    assert "8 pairs a step = 4 x 2 accumulated x 1 process" in told
    assert "3 negatives for each pair" in told and re.search(r"less other copies of its image: \d\.\d in", told)
    assert "16 examples, 10 steps, 5.00 epochs" in told
    assert "log every 2 steps: 5 times" in told and "evaluate every 4 steps: 2 times" in told
    assert "save every 4 steps: 2 times" in told
    assert re.search(r"time: \d+ s, by 3 steps that were timed \([\d.]+ s a step, [\d.]+ s an evaluation\)", told)
    assert re.search(r"0\.7 MB of weights, and \d+\.\d MB above them at the peak", told)
    assert re.search(r"visual_projection +16x32 \+ 16 +528 +0\.312 %", told)
    assert re.search(r"frozen: language_model +OPTForCausalLM, float32 +[\d,]+ +\d\d\.\d+ %", told)
    left = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert left == ["dry_run", "dry_run/first_batch.png"]
    with Image.open(tmp_path / "out" / "dry_run" / "first_batch.png") as sheet:
        assert sheet.width > 900 and sheet.height > 300


def test_a_run_after_a_rehearsal_is_the_run_without(tmp_path):
    trained = []
    for rehearsed in (True, False):
        trainer = prepared(write_config(tmp_path, save_strategy="no"))
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        if rehearsed:
            found = rehearse(trainer)
            assert len(found.seconds) == len(found.waited) == LONG_STEPS + USUAL_STEPS
            assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
            assert trainer.optimizer is None and trainer.state.global_step == 0 and not trainer.state.log_history
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        trainer.train()
        trained.append([trainer.model.adapter.state_dict(), [e["loss"] for e in trainer.state.log_history[:-1]]])
    assert trained[0][1] == trained[1][1]
    assert all(torch.equal(value, trained[1][0][name]) for name, value in trained[0][0].items())


def test_with_a_warm_start_and_cached_features(tmp_path):
    config = write_config(tmp_path)
    from training import cache_features

    cache_features.main([config, str(tmp_path / "features")])
    overrides = [f"feature_cache={tmp_path / 'features'}", "retrieval_warm_start_steps=5"]
    told = dry_run(prepared(config, *overrides))
    assert "before it, retrieval alone: 5 steps of 16 pairs (15 negatives)" in told
    assert not (tmp_path / "out" / "ret_states").exists()
    with pytest.raises(ValueError, match="warm start trains on hidden states.*PEFT"):
        dry_run(prepared(config, *overrides, "lora_rank=2"))


def test_parts_of_a_model_with_lora(tmp_path):
    model = prepared(write_config(tmp_path), "lora_rank=2").model
    told = describe_parts(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {line.split("  ")[0]: line for line in told}
    assert f"{trained:,}" in rows["trained in all"] and "ret_embedding" in rows
    assert "12 tensors" in rows["in the language model"]  # in three layers A and B of two matrices


def test_the_longest_batch_has_the_most_tokens(tmp_path):
    trainer = prepared(write_config(tmp_path, count=28))
    batch = longest_batch(trainer, trainer.train_dataset, 4)
    texts = [trainer.train_dataset[i]["caption"] for i in range(28)]
    assert len(set(batch.indices)) == 4
    lengths = [text.count("and") for text in texts]
    likely, most = sum(lengths[i] for i in batch.indices), sum(sorted(lengths)[-4:])
    assert 4 * sum(lengths) / 28 < likely <= most and likely >= most - 4


def test_time_of_a_step():
    seconds, waited = [9, 9, 3, 3, 3], [8, 8, 1, 1, 1]
    found = Rehearsal(0, seconds, waited)
    assert found.step_seconds(workers=0) == 3  # one after the other
    assert found.step_seconds(workers=2) == 2  # loading takes half a second of it
    slow = Rehearsal(0, [12] * 5, [10] * 5)
    assert slow.step_seconds(workers=2) == 5  # the two workers cannot keep up
    assert [duration(s) for s in (59.6, 600, 7260)] == ["60 s", "10 min", "2 h 1 min"]


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_tokens_are_shown_as_they_are_read():
    processor = make_processor()
    collated = [processor.image_token_id] * 2 + processor.tokenizer("a dog", add_special_tokens=False).input_ids
    ids = torch.tensor([*collated, processor.ret_token_id, processor.tokenizer.pad_token_id])
    mask, labels = torch.tensor([1] * (len(ids) - 1) + [0]), ids.clone()
    labels[:3] = -100
    words = tokens_as_words(ids, mask, processor, labels)
    assert words[0] == Word(processor.image_token, "lightblue") and words[-1] == Word(processor.ret_token, "orange")
    assert "".join(word.text for word in words[1:-1]) == "a\u00b7dog"
    assert words[1].ground == "whitesmoke" and {word.ground for word in words[2:-1]} == {"palegreen"}


def test_pictures_are_what_the_encoder_gets(tmp_path):
    trainer = prepared(write_config(tmp_path))
    image = Image.new("RGB", (50, 50), (200, 30, 90))
    pixels = trainer.data_collator([{"image": image, "caption": "a"}])["pixel_values"][0]
    shown = picture_of(pixels, trainer.processing_class)
    assert shown.size == tuple(pixels.shape[1:])
    assert max(abs(a - b) for a, b in zip(shown.getpixel((3, 3)), (200, 30, 90), strict=True)) <= 2
    path, batch = draw_first_batch(trainer)
    assert path.is_file() and len(batch["retrieval_input_ids"]) == 4


# ---- memory ---------------------------------------------------------------------------------------------------------

PREDICT = """
import sys, torch
from training.rehearsal import rehearse
from training.train import parse_config, prepare
torch.set_num_threads(1)
print("\\nMEASURED", rehearse(prepare(*parse_config(sys.argv[1], []))).peak_above_weights)
"""
# The kernel's own account, of a whole run.
MEASURE = """
import sys, torch
from pathlib import Path
from transformers import TrainerCallback
from training.train import parse_config, prepare

def kilobytes(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])

class Begin(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        self.before = kilobytes("VmRSS")

torch.set_num_threads(1)
trainer = prepare(*parse_config(sys.argv[1], []))
sum(parameter.sum() for parameter in trainer.model.parameters())
begin = Begin()
trainer.add_callback(begin)
trainer.train()
print("\\nMEASURED", 1024 * (kilobytes("VmHWM") - begin.before))
"""


def test_memory_is_what_a_run_then_takes(tmp_path):
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=512, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4,
                       num_attention_heads=4, max_position_embeddings=128)  # fmt: skip
    model = tmp_path / "language_model"
    shutil.copytree(CASE / "language_model", model)
    OPTForCausalLM(config).save_pretrained(model)
    path = write_config(tmp_path, model, count=300, per_device_train_batch_size=64, save_strategy="no")
    found = []
    for script in (PREDICT, MEASURE):
        run = processes.run("-c", script, path, cwd=tmp_path, PYTHONPATH=str(PARITY.parents[2]))
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(int(re.search(r"MEASURED (\d+)", run.stdout)[1]))
    predicted, measured = found
    assert measured > 100e6 and predicted == pytest.approx(measured, rel=0.2), json.dumps(found)
