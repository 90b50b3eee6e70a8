"""The trained parts: fp32 whatever is done to the backbones, their fingerprint, and models that are pickled."""

import copy
import hashlib
import io
import pickle

import pytest
import torch
from transformers import AutoModel

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromagePipeline
from tests.helpers import processes
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.checkpoints import assemble, assert_equal, edit, outputs
from tests.helpers.paths import ROOT

CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to("cpu", torch.float16), torch.float16),
    "half and back": (lambda model: model.half().float(), torch.float32),
    "double": (lambda model: model.double(), torch.float64),
    "double, then half": (lambda model: model.double().half(), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_for_the_backbones(backbones, tmp_path, cast):
    model, _ = assemble(backbones)
    model.save_pretrained(tmp_path / "model")
    trained = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    index = FromageImageIndex(torch.randn(3, 16), ["a", "b", "c"], model_fingerprint=model.retrieval_fingerprint())
    apply, dtype = CASTS[cast]
    assert apply(model) is model
    assert model.language_model.dtype == model.vision_model.dtype == dtype
    for name, value in model.adapter.state_dict().items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(value.float(), trained[name])
    index.check_model(model)
    if dtype != torch.float64 and cast != "half and back":
        assert_equal(outputs(model), outputs(AutoModel.from_pretrained(tmp_path / "model", dtype=dtype)))


@pytest.mark.parametrize("save_backbones", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_rounded_checkpoint_has_its_originals_fingerprint(backbones, tmp_path, dtype, save_backbones):
    model, _ = assemble(backbones)
    expected = model.retrieval_fingerprint()
    model.save_pretrained(tmp_path / "one", adapter_dtype=dtype, save_backbones=save_backbones)
    one = AutoModel.from_pretrained(tmp_path / "one")
    if dtype == "float16":
        rounded = {name: value.half().bfloat16() for name, value in model.adapter.state_dict().items()}
        assert any(not torch.equal(v, model.adapter.state_dict()[n].bfloat16()) for n, v in rounded.items())
    assert one.retrieval_fingerprint() == expected
    assert pickle.loads(pickle.dumps(one)).retrieval_fingerprint() == expected
    one.save_pretrained(tmp_path / "two", save_backbones=save_backbones)
    two = AutoModel.from_pretrained(tmp_path / "two")
    assert two.retrieval_fingerprint() == expected
    two.adapter.visual_projection.weight.data[0, 0] += 1
    assert two.retrieval_fingerprint() != expected
    two.save_pretrained(tmp_path / "three", save_backbones=save_backbones)
    assert AutoModel.from_pretrained(tmp_path / "three").retrieval_fingerprint() == two.retrieval_fingerprint()


def test_a_dtype_that_does_not_hold_the_trained_parts(backbones, tmp_path):
    model, _ = assemble(backbones)
    model.adapter.visual_projection.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="float16 does not hold adapter.visual_projection.weight"):
        model.save_pretrained(tmp_path / "model", adapter_dtype="float16")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", adapter_dtype="bfloat16")
    assert AutoModel.from_pretrained(tmp_path / "model").adapter.visual_projection.weight[0, 0] > 9e4


def test_fingerprints_are_those_of_older_versions():
    model = make_model("opt_clip")
    for parameter in model.adapter.parameters():
        parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    assert model.retrieval_fingerprint() == "4b2f7e8176dc2983"


def test_hashed_once_a_change(monkeypatch):
    model = make_model("opt_clip")
    index = FromageImageIndex(torch.randn(3, 16), ["a", "b", "c"], model_fingerprint=model.retrieval_fingerprint())
    counted, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *args, **kwargs: counted.append(1) or sha256(*args, **kwargs))
    for _ in range(5):
        index.search(torch.randn(1, 16), model=model)
    assert not counted
    weight = model.adapter.visual_projection.weight
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.1)
    state = {name: value + 1 for name, value in model.adapter.state_dict().items()}

    def step():
        weight.square().sum().backward()
        optimizer.step()

    def in_place_rows():
        weight.data[3] = 0

    changes = (step, lambda: model.adapter.load_state_dict(state), lambda: weight.data.mul_(2), in_place_rows)
    seen = {model.retrieval_fingerprint()}
    for number, change in enumerate(changes, start=1):
        change()
        for _ in range(3):
            seen.add(model.retrieval_fingerprint())
        assert len(seen) == number + 1 == len(counted) + 1
        with pytest.raises(ValueError, match="was made by the model"):
            index.search(torch.randn(1, 16), model=model)
    assert copy.deepcopy(model).retrieval_fingerprint() == model.retrieval_fingerprint()
    assert len(counted) == len(changes)


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ROUND_TRIPS = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("name", ["opt_clip", "granite_clip", "gemma2_clip"])
def test_models_and_pipelines_are_pickled(way, name):
    model, processor = make_model(name), make_processor()
    expected = outputs(model)
    again = ROUND_TRIPS[way](model)
    assert_equal(outputs(again), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    index = FromageImageIndex(torch.randn(3, 16), ["a", "b", "c"], model_fingerprint=model.retrieval_fingerprint())
    pipe = FromagePipeline(model=model, processor=processor, index=index)
    answer = pipe("a cat", max_new_tokens=4)
    assert ROUND_TRIPS[way](pipe)("a cat", max_new_tokens=4) == answer


FRESH = """
import sys, pickle, torch
from tests.helpers.checkpoints import outputs
model = pickle.load(open(sys.argv[1], "rb"))
torch.save(outputs(model), sys.argv[2])
"""


def test_a_pickle_is_read_by_another_process(tmp_path):
    model = make_model("granite_clip")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    run = processes.run("-c", FRESH, tmp_path / "model.pickle", tmp_path / "result.pt", cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert_equal(torch.load(tmp_path / "result.pt"), outputs(model))


@pytest.mark.parametrize("save_backbones", [False, True])
def test_a_logit_scale_of_shape_1_loads(backbones, tmp_path, save_backbones):
    """Which FSDP needs where it shards the trained parts, too."""
    model, processor = assemble(backbones)
    model.adapter.logit_scale.data.fill_(3.0)
    model.save_pretrained(tmp_path / "model", save_backbones=save_backbones)
    edit(
        tmp_path / "model" / "model.safetensors",
        lambda tensors: tensors.update({"adapter.logit_scale": tensors["adapter.logit_scale"][None].contiguous()}),
    )
    loaded = FromageForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.adapter.logit_scale.shape == () and loaded.adapter.logit_scale == 3.0
    assert_equal(outputs(loaded), outputs(model.eval()))
