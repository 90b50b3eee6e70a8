"""Averages of weights: what is kept, evaluated and saved, and that a run goes on with them bit by bit."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_fromage import FromageForConditionalGeneration, FromageTrainer
from modeling_fromage.trainer.averaging import WeightAverage
from tests.helpers.backbones import make_model
from tests.helpers.checkpoints import assemble
from tests.helpers.distributed import assert_close, in_two_processes, make_trainer, record
from tests.helpers.paths import PARITY

DECAY = 0.7
TARGET = r"language_model\..*\.(q_proj|v_proj)"


def small():
    return make_model("opt_clip", ret_token_id=501)


def assembled():
    torch.manual_seed(0)
    return assemble(PARITY / "case_a_opt_tied")[0]


def rows(model) -> list[dict]:
    width = model.config.vision_feature_size
    return [{"pooled_image_features": torch.rand(width, generator=torch.Generator().manual_seed(i)),
             "caption": f"thing {i}"} for i in range(13)]  # fmt: skip


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Watch(TrainerCallback):
    """Keeps the weights before training and after each step."""

    def __init__(self):
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args, model, **kwargs):
        self.weights.append(trained(model))

    def on_step_end(self, *args, model, **kwargs):
        self.weights.append(trained(model))


def average_of(weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By hand, with `[RET]`'s norm as it was."""
    found = dict(weights[0])
    for later in weights[1:]:
        found = {name: DECAY * value + (1 - DECAY) * later[name] for name, value in found.items()}
    for name, value in found.items():
        if "ret_embedding" in name:
            norm = weights[-1][name].norm(dim=-1, keepdim=True)
            found[name] = value * norm / value.norm(dim=-1, keepdim=True)
    return found


def assert_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["adapter", "add_adapter", "get_peft_model"])
def test_the_average_is_that_of_all_steps(tmp_path, kind):
    """Training itself goes on with the weights of its steps."""
    model, watch, plain = small(), Watch(), Watch()
    config = LoraConfig(r=2, target_modules=TARGET, modules_to_save=["adapter"])
    models = [model, small()]
    for number, each in enumerate(models):
        torch.manual_seed(0)
        if kind == "add_adapter":
            each.add_adapter(config)
        elif kind == "get_peft_model":
            models[number] = get_peft_model(each, config)
    options = {"max_steps": 5, "save_strategy": "no"}
    trainer = make_trainer(tmp_path / "a", models[0], ema_decay=DECAY, callbacks=[watch], **options)
    trainer.train()
    make_trainer(tmp_path / "b", models[1], callbacks=[plain], **options).train()
    for ours, theirs in zip(watch.weights, plain.weights, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_weights(trained(models[0]), average_of(watch.weights))
    assert len(watch.weights) == 6
    assert (kind == "adapter") != any("lora_A" in name for name in watch.weights[0])


def test_evaluations_and_checkpoints_have_the_average(tmp_path):
    watch, model = Watch(), assembled()
    data = rows(model)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path / "run", model, data=data, ema_decay=DECAY, callbacks=[watch], **options)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for steps, loss in zip((2, 4), logged, strict=True):
        saved = FromageForConditionalGeneration.from_pretrained(tmp_path / "run" / f"checkpoint-{steps}")
        assert_weights(trained(saved), average_of(watch.weights[: steps + 1]))
        own = make_trainer(tmp_path / "evaluated", saved, data=data)
        assert own.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[1], rel=1e-6)
    trainer.save_model()
    final = FromageForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert_weights(trained(final), average_of(watch.weights))


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, lora):
    def trainer_of(**options) -> FromageTrainer:
        model = assembled()
        torch.manual_seed(1)
        if lora:
            model.add_adapter(LoraConfig(r=2, target_modules=TARGET, modules_to_save=["adapter"]))
        data = rows(model)
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "seed": 3, **options}
        return make_trainer(tmp_path / "run", model, data=data, **options)

    whole = trainer_of(ema_decay=DECAY)
    whole.train()
    resumed = trainer_of(ema_decay=DECAY)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected = trained(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in trained(resumed.model).items())
    with pytest.raises(ValueError, match="are an average, kept with `ema_decay`"):
        trainer_of().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    file = tmp_path / "run" / "checkpoint-4" / "weight_average.safetensors"
    assert any(not torch.equal(value, load_file(file)[f"average/{name[8:]}"])
               for name, value in load_file(file).items() if name.startswith("trained/"))  # fmt: skip
    file.unlink()  # as of a run without: the average begins there
    late = trainer_of(ema_decay=DECAY)
    late.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert not all(torch.equal(value, expected[name]) for name, value in trained(late.model).items())


def test_the_best_model_is_an_average(tmp_path):
    watch, model = Watch(), assembled()
    data = rows(model)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "run", model, data=data, ema_decay=DECAY, callbacks=[watch], max_steps=6,
                           greater_is_better=True, load_best_model_at_end=True, **steps)  # fmt: skip
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.split("-")[-1])
    assert best < 6
    assert_weights(trained(model), average_of(watch.weights[: best + 1]))


def test_small_steps_of_weights_in_bfloat16_are_averaged():
    model = small()
    model.language_model.to(torch.bfloat16)
    head = model.language_model.get_output_embeddings().weight.requires_grad_()
    average = WeightAverage(0.999)
    begin = head.detach().clone()
    average.on_train_begin(None, None, None, model=model)
    with torch.no_grad():
        head.add_(1)
    for _ in range(1000):
        average.on_step_end(None, None, None, model=model)
    with average.in_use(model):
        moved = (head.float() - begin.float()).mean().item()
    assert moved == pytest.approx(1 - 0.999**1000, abs=0.01)
    assert head.dtype == torch.bfloat16


def test_the_scale_of_an_average_is_bounded_too(tmp_path):
    """Also where the first scale, which is in the average, was larger."""
    model = make_model("opt_clip", ret_token_id=501, logit_scale_max=15.0)
    torch.nn.init.constant_(model.adapter.logit_scale, 5.0)
    make_trainer(tmp_path, model, ema_decay=DECAY, max_steps=2, save_strategy="no").train()
    assert model.adapter.logit_scale.exp().item() == pytest.approx(15)


class _BreaksOff(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_that_is_broken_off_leaves_no_average(tmp_path):
    """What is then evaluated is what is saved, and the next run's average begins with its own weights."""
    watch, model = Watch(), assembled()
    data = rows(model)
    options = {"data": data, "ema_decay": DECAY, "save_strategy": "no", "max_steps": 4}
    stop = _BreaksOff()
    trainer = make_trainer(tmp_path / "run", model, callbacks=[stop], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert make_trainer(tmp_path / "own", model, data=data).evaluate()["eval_loss"] == loss
    trainer.remove_callback(stop)
    trainer.add_callback(watch)
    trainer.train()
    assert_weights(trained(model), average_of(watch.weights))


def train_in_two(rank: int, folder: str):
    found = {}
    for kind in ("whole", "sharded"):
        options = {"ema_decay": DECAY, "shard_backbones": kind == "sharded"}
        model = assembled()
        data = rows(model)
        options |= {"data": data, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        found[kind] = record(make_trainer(Path(folder, kind), model, world_size=2, **options))
        again = make_trainer(Path(folder, kind), assembled(), world_size=2, **options)
        again.train(resume_from_checkpoint=f"{folder}/{kind}/checkpoint-2")
        for name, parameter in again.model.named_parameters():
            assert not parameter.requires_grad or torch.equal(parameter, found[kind]["weights"][name]), name
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def test_two_processes_keep_the_average_of_one(tmp_path):
    """With whole and with sharded backbones; each run resumes bit by bit."""
    in_two_processes(train_in_two, str(tmp_path))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = assembled()
    data = rows(model)
    expected = record(make_trainer(tmp_path / "one", model, data=data, ema_decay=DECAY))
    for kind in ("whole", "sharded"):
        assert_close(found[kind], expected, rtol=1e-3, atol=1e-3)


def test_decays_that_are_none_are_refused(tmp_path):
    for decay in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="`ema_decay` must be between 0 and 1"):
            make_trainer(tmp_path, small(), ema_decay=decay)
