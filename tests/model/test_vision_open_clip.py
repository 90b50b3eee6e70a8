"""open_clip's plain ViTs, which need no open_clip, and what is said where it is needed; see tests/backbones too."""

import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.vision_libraries_fromage import split_library
from modeling_fromage.vision_open_clip import OpenClipVisionConfig
from tests.helpers import processes
from tests.helpers.checkpoints import assert_equal, keys_of, outputs
from tests.helpers.open_clip import TOWERS, write_vit
from tests.helpers.strangers import ask_stranger


@pytest.fixture
def vit(tmp_path):
    """The folder of a checkpoint, and the encoder whose weights it holds."""
    return tmp_path / "backbones/vit", write_vit(tmp_path / "backbones/vit")


def assemble(folder, backbones, **kwargs):
    names = (f"open_clip:local-dir:{folder}", str(backbones / "language_model"))
    processor = FromageProcessor.from_vision_text_pretrained(*names, num_image_tokens=2)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        *names, processor=processor, projection_dim=16, **kwargs
    )
    return model, processor


def test_a_vit_becomes_the_encoder_of_transformers(vit, backbones, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)  # not installed here
    folder, encoder = vit
    model, processor = assemble(folder, backbones)
    assert type(model.vision_model) is type(encoder)
    assert model.config.vision_model_library == "open_clip" and model.config.vision_model_id == str(folder)
    pixels = processor.image_processor(Image.new("RGB", (50, 40), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(model.get_pooled_image_features(pixels), encoder(pixels).pooler_output)


@pytest.mark.parametrize("save_backbones", [False, True])
def test_saved_and_loaded(vit, backbones, tmp_path, save_backbones):
    model, processor = assemble(vit[0], backbones)
    model.save_pretrained(tmp_path / "model", save_backbones=save_backbones)
    processor.save_pretrained(tmp_path / "model")
    names_vision = any(key.startswith("vision_model.") for key in keys_of(tmp_path / "model"))
    assert names_vision is save_backbones
    again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert_equal(outputs(again), outputs(model))
    image = Image.effect_noise((67, 41), 80).convert("RGB")
    pixels = [
        each.image_processor(image, return_tensors="pt")["pixel_values"]
        for each in (processor, FromageProcessor.from_pretrained(tmp_path / "model"))
    ]
    assert torch.equal(*pixels)
    found = ask_stranger(tmp_path / "model", tmp_path)
    assert len(found) == 3


def test_a_checkpoint_finds_it_elsewhere(vit, backbones, tmp_path):
    folder, _ = vit
    model, _ = assemble(folder, backbones)
    model.save_pretrained(tmp_path / "model")
    folder.rename(tmp_path / "moved")
    for name in (tmp_path / "moved", f"open_clip:local-dir:{tmp_path}/moved"):
        again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model", vision_model_id=str(name))
        assert_equal(outputs(again), outputs(model))
        assert again.config.vision_model_id == str(tmp_path / "moved")


def test_a_stranger_may_read_the_configuration_first(tmp_path):
    """By remote code, before anything has asked for image processors or models."""
    vision = OpenClipVisionConfig(model_cfg={"embed_dim": 16, "vision_cfg": TOWERS["resnet"]["vision_cfg"]})
    FromageConfig(vision_config=vision).save_pretrained(tmp_path / "model")
    (tmp_path / "program.py").write_text(
        "import sys\nsys.modules['modeling_fromage'] = None\nfrom transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "print(config.vision_config.model_type)\n"
    )
    found = processes.run(tmp_path / "program.py", cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert found.stdout.strip() == "open_clip_vision", found.stderr[-2000:]


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickled_weights_and_those_of_a_training_run(vit, backbones, as_zip):
    folder, encoder = vit
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "open_clip_pytorch_model.bin",
               _use_new_zipfile_serialization=as_zip)  # fmt: skip
    model, _ = assemble(folder, backbones)
    assert torch.equal(model.vision_model.post_layernorm.weight, encoder.post_layernorm.weight)


def test_other_weights_under_its_name_are_refused(vit, backbones, tmp_path):
    folder, _ = vit
    model, _ = assemble(folder, backbones)
    model.save_pretrained(tmp_path / "model")
    state = load_file(folder / "open_clip_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="open_clip_model.safetensors with other contents"):
        FromageForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_changed_weights_are_saved_whole(vit, backbones, tmp_path):
    model, _ = assemble(vit[0], backbones)
    model.vision_model.post_layernorm.weight.data += 1
    model.save_pretrained(tmp_path / "model")
    assert any(key.startswith("vision_model.") for key in keys_of(tmp_path / "model"))


def test_a_missing_weight_is_refused(vit, backbones):
    folder, _ = vit
    state = load_file(folder / "open_clip_model.safetensors")
    del state["visual.ln_post.weight"]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="lacks weights.*post_layernorm.weight"):
        assemble(folder, backbones)


def test_a_weight_that_the_configuration_does_not_speak_of_is_refused(vit, backbones):
    folder, _ = vit
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 1  # of the two whose weights are there
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not speak of: encoder.layers.1.*Correct its `vision_cfg`"):
        assemble(folder, backbones)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_cfg", "image_size", "32"), ("vision_cfg", "image_size", [32]), ("vision_cfg", "image_size", 0),
        ("vision_cfg", "layers", 10**6), ("vision_cfg", "patch_size", 0), ("vision_cfg", "head_width", -8),
        ("vision_cfg", "timm_model_name", "hf-hub:other/model"), ("vision_cfg", "timm_model_name", 7),
        ("model_cfg", "embed_dim", None), ("model_cfg", "quick_gelu", "yes"),
        ("preprocess_cfg", "mode", "L"), ("preprocess_cfg", "mean", None), ("preprocess_cfg", "mean", [0.5, 0.5]),
        ("preprocess_cfg", "std", [0, 0, 0]),
    ],
)  # fmt: skip
def test_values_that_open_clip_has_not(part, field, value, vit, backbones):
    path = vit[0] / "open_clip_config.json"
    config = json.loads(path.read_text())
    parts = {"vision_cfg": config["model_cfg"]["vision_cfg"], "model_cfg": config["model_cfg"]}
    parts.get(part, config.setdefault("preprocess_cfg", {}))[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has values that no model of open_clip has: {field} "):
        assemble(vit[0], backbones)


def _pickled(value) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 605222932\n"
BROKEN = [
    b"", b"<html>" * 90, b"\x80\x02hello", _pickled({"visual.proj": torch.ones(999)})[:900], _pickled([1]),
    _pickled({1: torch.ones(1)}), _pickled({"visual.proj": 3}), _pickled({"state_dict": None}),
]  # fmt: skip


@pytest.mark.parametrize("filename", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("content", [POINTER, *BROKEN], ids=range(len(BROKEN) + 1))
def test_weights_that_cannot_be_read(content, filename, vit, backbones):
    (vit[0] / "open_clip_model.safetensors").unlink()
    (vit[0] / filename).write_bytes(content)
    problem = (
        "a pointer of Git LFS.* `git lfs pull`" if content == POINTER else "cut off, damaged or no .* Get it again"
    )
    with pytest.raises(ValueError, match=f"{filename}, the weights of .*, cannot be read: it is {problem}"):
        assemble(vit[0], backbones)


def test_weights_that_are_cut_off(vit, backbones):
    path = vit[0] / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="open_clip_model.safetensors, the weights of .* it is cut off"):
        assemble(vit[0], backbones)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"model_cfg": null}',
        '{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": [1]}',
        '{"model_cfg": {"vision_cfg": 3}}',
    ],
)
def test_a_configuration_that_is_none(text, vit, backbones):
    (vit[0] / "open_clip_config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"open_clip_config.json of .* (is no JSON|has no `model_cfg`|is \[1\], not a dict)"
    ):
        assemble(vit[0], backbones)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("open_clip:ViT-B-32", "names no checkpoint"),
        ("open_clip:", "names no checkpoint"),
        ("open_clip:hf-hub:", "names no checkpoint"),
        ("open_clip:ViT-B-32/a/b", "names no checkpoint"),
    ],
)
def test_names_that_are_none(name, problem):
    with pytest.raises(ValueError, match=problem):
        split_library(name)


def test_names():
    assert split_library("openai/clip-vit-base-patch32") == ("transformers", "openai/clip-vit-base-patch32")
    assert split_library("open_clip:hf-hub:org/name") == ("open_clip", "org/name")
    assert split_library("open_clip:local-dir:/a/b") == ("open_clip", "/a/b")


def test_a_folder_that_is_no_checkpoint(backbones, tmp_path):
    with pytest.raises(ValueError, match="no open_clip_config.json"):
        assemble(backbones / "vision_model", backbones)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 3}}))
    with pytest.raises(ValueError, match="no `model_cfg` with a `vision_cfg`"):
        assemble(tmp_path / "empty", backbones)


@pytest.mark.parametrize("tower", ["resnet", "timm", "vit, average", "vit, sin-cos", "coca"])
def test_other_towers_name_the_extra(vit, backbones, monkeypatch, tower):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    folder, _ = vit
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"] |= TOWERS[tower]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match=r"pip install 'modeling-fromage\[open-clip\]'"):
        assemble(folder, backbones)
    with pytest.raises(ImportError, match=r"open-clip"):
        split_library("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_the_library_is_said_once(vit, backbones):
    with pytest.raises(ValueError, match="Leave `vision_model_library` out"):
        assemble(vit[0], backbones, vision_model_library="transformers")


def test_a_resize_that_no_processor_has(vit, backbones):
    folder, _ = vit
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"resize_mode": "longest"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'longest', which no image processor"):
        assemble(folder, backbones)
