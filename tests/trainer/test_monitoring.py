"""What a run logs beside its loss, and what it says of the time that it waits for data."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from modeling_fromage import FromageDataCollator, FromageTrainer
from modeling_fromage.trainer import monitoring
from modeling_fromage.trainer.monitoring import TrainingMonitor, in_batch_accuracies
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.distributed import in_two_processes
from tests.helpers.training_runs import arguments, examples

ACCURACIES = ("text_to_image_accuracy", "image_to_text_accuracy")
LOGGED = {*ACCURACIES, "logit_scale", "ret_embedding_norm", "examples_per_second", "tokens_per_second",
          "data_wait_share", "memory_gb", "captioning_loss", "ret_token_loss", "contrastive_loss"}  # fmt: skip
FIXED = {"learning_rate": 0.0, "train_sampling_strategy": "sequential"}  # a model that stays as it is


def make_trainer(folder, data, callbacks=(), **options):
    collator = FromageDataCollator(make_processor(), concat_captions_prob=0)
    return FromageTrainer(model=make_model("opt_clip"), args=arguments(folder, **options), train_dataset=data,
                          data_collator=collator, callbacks=list(callbacks))  # fmt: skip


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- accuracies -----------------------------------------------------------------------------------------------------


def test_accuracies_by_brute_force():
    logits = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(40)
    found = in_batch_accuracies(logits)
    for name, scores in zip(ACCURACIES, (logits.t(), logits), strict=True):
        right = sum(int(row.argmax()) == i for i, row in enumerate(scores))
        assert 0 < right < 40 and found[name].item() == pytest.approx(right / 40)


@pytest.mark.parametrize("logits", [torch.zeros(5, 5), torch.full((5, 5), torch.nan)])
def test_a_model_that_tells_nothing_apart_has_no_accuracy(logits):
    assert [value.item() for value in in_batch_accuracies(logits).values()] == [0, 0]


def test_another_copy_of_an_image_counts_as_wrong():
    logits = torch.eye(3)
    logits[1] = logits[0]
    found = in_batch_accuracies(logits)
    assert found["text_to_image_accuracy"].item() == pytest.approx(1 / 3)


# ---- a run ----------------------------------------------------------------------------------------------------------


def batch_accuracies(trainer, batch) -> dict[str, float]:
    trainer.model.train()
    logits = trainer.model(**trainer.data_collator(batch)).logits_per_image
    return {name: value.item() for name, value in in_batch_accuracies(logits).items()}


def test_what_is_logged(tmp_path):
    seen = []

    class Listener(TrainerCallback):  # as those of TensorBoard, trackio and wandb
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    data = examples(12)
    trainer = make_trainer(tmp_path, data, [Listener()], **FIXED, logging_steps=1)
    trainer.train()
    batches = [data[i : i + 4] for i in (0, 4, 8)]
    for entry, batch in zip(logged(trainer), batches, strict=True):
        assert entry.keys() >= LOGGED
        assert {name: entry[name] for name in ACCURACIES} == pytest.approx(batch_accuracies(trainer, batch))
        adapter = trainer.model.adapter
        assert entry["logit_scale"] == pytest.approx(adapter.logit_scale.exp().item())
        assert entry["ret_embedding_norm"] == pytest.approx(adapter.ret_embedding.weight.norm().item())
        assert 0 <= entry["data_wait_share"] < 1 and entry["memory_gb"] > 0.1
    first, second = logged(trainer)[:2]
    inputs = trainer.data_collator(batches[1])
    tokens = (inputs["attention_mask"].sum() + inputs["retrieval_attention_mask"].sum()).item()
    assert second["tokens_per_second"] / second["examples_per_second"] == pytest.approx(tokens / 4)
    assert all(entry.keys() >= LOGGED for entry in seen if "loss" in entry) and any("loss" in entry for entry in seen)


def test_accuracies_are_means_under_accumulation(tmp_path):
    """Of 6 examples in twos, two batches make the first step of an epoch and one the second."""
    data = examples(6)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 2}
    trainer = make_trainer(tmp_path, data, **{**FIXED, **options})
    trainer.train()
    (entry,) = logged(trainer)
    one, two, three = (batch_accuracies(trainer, data[i : i + 2]) for i in (0, 2, 4))
    for name in ACCURACIES:
        assert entry[name] == pytest.approx(((one[name] + two[name]) / 2 + three[name]) / 2)


def test_batches_without_accuracies_do_not_lower_the_mean(tmp_path):
    """Of documents, in steps that are logged together: images that stand first have no text."""
    image = Image.new("RGB", (32, 32))
    data = [{"document": ["one", image]}, {"document": [image, "one"]}]
    options = {"per_device_train_batch_size": 1, "max_steps": 2, "logging_steps": 2}
    trainer = make_trainer(tmp_path, data, **{**FIXED, **options})
    trainer.train()
    (entry,) = logged(trainer)
    assert [entry[name] for name in ACCURACIES] == [1, 1]


def run_in_two(rank: int, folder: str):
    trainer = make_trainer(folder, examples(16), ddp_backend="gloo", max_steps=2, **FIXED)
    trainer.train()
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(logged(trainer), file)


def test_two_processes_log_what_one_does_with_their_batch(tmp_path):
    in_two_processes(run_in_two, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = make_trainer(tmp_path, examples(16), per_device_train_batch_size=8, max_steps=2, **FIXED)
    alone.train()
    for ours, theirs, whole in zip(first, second, logged(alone), strict=True):
        for name in LOGGED - {"loss", "memory_gb"}:
            assert ours[name] == theirs[name], name
        for name in ACCURACIES:
            assert ours[name] == pytest.approx(whole[name])
        ratio = whole["tokens_per_second"] / whole["examples_per_second"]
        assert ours["tokens_per_second"] / ours["examples_per_second"] == pytest.approx(ratio)


# ---- speed ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(monitoring, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def batches(self, count, wait):
        for _ in range(count):
            self.now += wait
            yield {"retrieval_input_ids": torch.ones(4, 5), "attention_mask": torch.ones(2, 10),
                   "retrieval_attention_mask": torch.ones(4, 5)}  # fmt: skip


def step(monitor, clock, batches, seconds, between=100.0):
    for _ in monitor.watch(batches):
        monitor.take({"captioning_loss": torch.tensor(1.0), "logits_per_image": torch.eye(4)})
        clock.now += seconds
        monitor.add(0.5)
    monitor.on_step_end(None, None, None)
    clock.now += between  # saving and evaluating are no part of a step


def test_speed_is_that_of_the_steps(monkeypatch):
    clock, monitor = Clock(monkeypatch), TrainingMonitor()
    for _ in range(3):
        step(monitor, clock, clock.batches(2, wait=1.0), seconds=3.0)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda rows: rows)
    logs = monitor.means(accelerator, None)
    assert logs["data_wait_share"] == pytest.approx(0.25)
    assert logs["examples_per_second"] == pytest.approx(1.0) and logs["tokens_per_second"] == pytest.approx(10.0)
    assert logs["captioning_loss"] == 1.0 and logs["text_to_image_accuracy"] == 1.0
    assert monitor.means(accelerator, None) == {}  # nothing new
    slower = {"seconds": 2.0, "data_wait_share": 2.0}  # of the other process, against this one
    names = ["captioning_loss", *ACCURACIES, "seconds", "data_wait_share", "examples", "tokens", "memory_gb", "gpu"]
    accelerator.gather = lambda rows: torch.cat([rows, rows * torch.tensor([slower.get(n, 1.0) for n in names])])
    step(monitor, clock, clock.batches(2, wait=1.0), seconds=3.0)
    logs = monitor.means(accelerator, None)  # twice the examples, in the time of the slower
    assert logs["examples_per_second"] == pytest.approx(1.0) and logs["data_wait_share"] == pytest.approx(0.5)


def test_no_step_waits_for_a_number(monkeypatch):
    clock, monitor = Clock(monkeypatch), TrainingMonitor()

    def waits(*args):
        raise AssertionError("this waits for the device")

    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    step(monitor, clock, clock.batches(2, wait=1.0), seconds=3.0)


@pytest.mark.parametrize(("cached", "hint"), [(True, "num_workers`."), (False, "num_workers`, or `fromage cache")])
def test_what_limits_a_run(monkeypatch, caplog, cached, hint):
    clock, monitor = Clock(monkeypatch), TrainingMonitor()
    for number in range(20):
        batches = clock.batches(1, wait=1.0)
        if not cached:
            batches = iter([{**next(batches), "pixel_values": torch.zeros(4, 3, 2, 2)}])
            clock.now -= 1.0
            batches = map(lambda batch: setattr(clock, "now", clock.now + 1.0) or batch, batches)
        step(monitor, clock, batches, seconds=1.0)
        monitor.on_log(None, None, None)
        assert len(caplog.records) == (number >= monitoring._STEPS_BEFORE_A_WARNING)  # once a run
    monitor.on_train_end(None, None, None)
    assert len(caplog.records) == 2  # and at its end
    for record in caplog.records:
        assert record.getMessage().startswith("Waiting for data 50 % of the time: more `dataloader_")
        assert hint in record.getMessage()


def test_a_loader_that_keeps_up_is_no_warning(monkeypatch, caplog):
    clock, monitor = Clock(monkeypatch), TrainingMonitor()
    step(monitor, clock, clock.batches(1, wait=60.0), seconds=1.0)  # workers start
    for _ in range(20):
        step(monitor, clock, clock.batches(1, wait=0.1), seconds=2.0)
        monitor.on_log(None, None, None)
    assert not caplog.records
    with caplog.at_level("INFO"):
        monitor.on_train_end(None, None, None)
    assert "Waiting for data 5 % of the time: the model's steps" in caplog.text


def test_a_slow_data_set_is_told_of(tmp_path, caplog):
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    trainer = make_trainer(tmp_path, Slow(examples(60)), max_steps=12, logging_steps=4)
    trainer.train()
    assert caplog.text.count("Waiting for data") == 2
    assert logged(trainer)[-1]["data_wait_share"] > 0.1


def test_tensorboard_gets_it(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, examples(8), report_to="tensorboard", max_steps=2).train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert {f"train/{name}" for name in LOGGED} <= set(events.Tags()["scalars"])
