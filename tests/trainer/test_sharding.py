"""Backbones sharded over two processes train, save, resume and evaluate as whole ones do, bit by bit."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from modeling_fromage import FromageForConditionalGeneration, FromageTrainer
from modeling_fromage.trainer.callbacks import refuse_sharding_by_accelerate
from modeling_fromage.trainer.sharding import shard_backbones, shard_for, whole_state
from tests.helpers.backbones import make_model
from tests.helpers.batches import make_batch
from tests.helpers.checkpoints import TRAINED_KEYS, assemble, assert_equal, keys_of, outputs
from tests.helpers.distributed import assert_close, in_two_processes, make_trainer, record
from tests.helpers.paths import PARITY

CASES = {
    "fp32": ("opt_clip", {}),
    "accumulation": ("opt_clip", {"gradient_accumulation_steps": 2}),
    "bf16 backbones": ("llama_clip", {"bf16": True}),
    "layers within": ("opt_clip", {}),
    "chunks": ("opt_clip", {}),
    "recomputed activations": ("llama_clip", {"gradient_checkpointing": True}),
    "LoRA": ("llama_vit", {}),
}


def model_of(case: str) -> FromageForConditionalGeneration:
    config = {"layers within": {"text_embed_layers": [1, -1]}, "chunks": {"gradient_cache_chunk_size": 2}}
    model = make_model(CASES[case][0], ret_token_id=501, **config.get(case, {}))
    if case == "bf16 backbones":
        model.to(torch.bfloat16)
    if case == "LoRA":
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj", modules_to_save=["adapter"]))
    return model


def train_sharded_and_whole(rank: int, folder: str):
    found = {}
    for case, (_, options) in CASES.items():
        for is_sharded in (False, True):
            trainer = make_trainer(
                Path(folder, case), model_of(case), world_size=2, shard_backbones=is_sharded, **options
            )
            sharded = [name for name, p in trainer.model.named_parameters() if isinstance(p, DTensor)]
            assert bool(sharded) == is_sharded
            assert all(".layers." in name for name in sharded) and not any("lora" in name for name in sharded)
            found[case, is_sharded] = record(trainer) | {"fallbacks": trainer.model.traits.logged_fallbacks}
            found[case, is_sharded]["names"] = sharded
            found[case, is_sharded]["evaluation"] = {
                name: value for name, value in trainer.evaluate().items() if "second" not in name and "time" not in name
            }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def save_and_resume(rank: int, folder: str):
    backbones, options = Path(folder, "backbones"), {"num_train_epochs": 3, "save_strategy": "epoch", "world_size": 2}

    def trainer_of(output: str, model, **more):
        width = model.config.vision_feature_size
        data = [{"pooled_image_features": torch.rand(width, generator=torch.Generator().manual_seed(i)),
                 "caption": f"thing {i}"} for i in range(13)]  # fmt: skip
        return make_trainer(Path(folder, output), model, shard_backbones=True, data=data, **{**options, **more})

    whole = trainer_of("named", assemble(backbones)[0], eval_strategy="epoch", load_best_model_at_end=True)
    expected = record(whole)
    resumed = trainer_of("named", assemble(backbones)[0])
    resumed.train(resume_from_checkpoint=f"{folder}/named/checkpoint-4")
    best = trainer_of("best", assemble(backbones)[0], num_train_epochs=1)
    best.state.best_model_checkpoint = f"{folder}/named/checkpoint-6"
    best._load_best_model()
    for trainer in (resumed, best):
        for name, parameter in trainer.model.named_parameters():
            assert not parameter.requires_grad or torch.equal(parameter, expected["weights"][name]), name
    whole.save_model()
    unnamed = trainer_of("unnamed", make_model("opt_clip", ret_token_id=501), num_train_epochs=1)
    unnamed.train()
    with pytest.raises(ValueError, match="The backbones are sharded: no process has all weights"):
        unnamed.model.save_pretrained(f"{folder}/alone")
    state = whole_state(unnamed.model)
    unnamed.model.save_pretrained(f"{folder}/given", rank == 0, state, save_backbones=True) if rank == 0 else None


def unequal_batches(rank: int, folder: str):
    """Texts that other processes' shortcuts do not take, in one of them alone."""
    torch.distributed.init_process_group("gloo")
    found = {}
    for name, number_of_rets in (("opt_clip", 2), ("mistral_clip", 1)):
        for is_sharded in (False, True):
            model = make_model(name).train()
            if is_sharded:
                shard_backbones(model, init_device_mesh("cpu", (2,)))
            pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
            batch = make_batch(model, pixels, [[0, 1], [2, 3, 4]][rank])
            if rank:
                rows = batch["retrieval_input_ids"]
                rows[0, 1 : 1 + number_of_rets - 1] = model.config.ret_token_id
            loss = model(**batch).loss
            loss.backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            found[name, is_sharded] = {"loss": loss.detach(), **gradients}
    torch.save(found, f"{folder}/unequal{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sharded")
    in_two_processes(train_sharded_and_whole, str(folder))
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_sharded_backbones_train_as_whole_ones(case, trained):
    sharded, whole = (trained[case, is_sharded] for is_sharded in (True, False))
    # Where a layer's output is used twice, sharding changes the order in which its gradients are summed; and all
    # processes run as many chunks, so that some are smaller.
    is_exact = case not in ("layers within", "chunks")
    tolerance = {"rtol": 0, "atol": 0} if is_exact else {"rtol": 1e-5, "atol": 2e-5}
    assert_close(sharded, whole, **tolerance)
    assert sharded["evaluation"] == pytest.approx(whole["evaluation"], rel=tolerance["rtol"])
    assert "eval_text_to_image_R@1" in sharded["evaluation"]
    assert sharded["fallbacks"] == whole["fallbacks"]
    assert case == "LoRA" or not sharded["fallbacks"]
    parts = {"language_model", "vision_model"}
    assert {name.split(".")[0] for name in sharded["names"]} == parts


def test_checkpoints_of_sharded_backbones(tmp_path):
    for name in ("language_model", "vision_model"):
        shutil.copytree(PARITY / "case_a_opt_tied" / name, tmp_path / "backbones" / name)
    in_two_processes(save_and_resume, str(tmp_path))
    assert keys_of(tmp_path / "named" / "checkpoint-2") == keys_of(tmp_path / "named") == TRAINED_KEYS
    assert not (tmp_path / "alone").exists()
    saved = [
        FromageForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("unnamed/checkpoint-2", "given")
    ]
    assert keys_of(tmp_path / "given") > TRAINED_KEYS
    assert_equal(outputs(saved[0].eval()), outputs(saved[1].eval()))
    backbones = make_model("opt_clip", ret_token_id=501).state_dict()
    for name, value in saved[0].state_dict().items():
        assert name.startswith("adapter.") or torch.equal(value, backbones[name]), name


def test_processes_with_other_batches_make_the_same_passes(tmp_path):
    in_two_processes(unequal_batches, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"unequal{rank}.pt", weights_only=True)
        for name in ("opt_clip", "mistral_clip"):
            for key, value in found[name, False].items():
                torch.testing.assert_close(found[name, True][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_what_cannot_be_sharded_is_refused():
    mesh = None  # which is not come to
    model = make_model("opt_clip")
    model.vision_model.compile()
    with pytest.raises(ValueError, match="compiled vision model. Leave `compile_vision_model` out"):
        shard_backbones(model, mesh)
    model = make_model("opt_clip")
    packed = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.language_model.model.decoder.layers[0].fc1.weight = packed
    with pytest.raises(ValueError, match="does not shard a quantised language model"):
        shard_backbones(model, mesh)


@pytest.mark.parametrize("options", [{"fsdp": True}, {"deepspeed": {"zero_optimization": {"stage": 3}}}])
def test_the_trainers_own_sharding_is_refused(options, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    name, value = next(iter(options.items()))
    setattr(args, name, value)  # without the packages that they need
    with pytest.raises(ValueError, match=f"`{name}=.*give FromageTrainer `shard_backbones=True`"):
        FromageTrainer(make_model("opt_clip"), args)


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_by_accelerate_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}, in accelerate's configuration, does not .*`shard_backbones=True`"):
        refuse_sharding_by_accelerate(name == "FSDP", name == "DeepSpeed")


def test_one_process_has_nothing_to_shard(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = make_model("opt_clip")
    shard_for(args, model)
    assert "does nothing in one process: start several" in caplog.text and not model.traits.is_sharded
