"""Real open_clip: towers of every kind give its own features, and its transforms' pixels, to the last bit."""

import json

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.vision_libraries_fromage import load_image_processor, split_library
from modeling_fromage.vision_open_clip import load_open_clip
from tests.helpers import processes
from tests.helpers.checkpoints import assert_equal, outputs, saved_both_ways
from tests.helpers.open_clip import SIGLIP, TOWERS, write_checkpoint
from tests.helpers.strangers import ask_stranger

WORKS = torchvision.extension._has_ops()  # not PyPI's beside a CPU build of torch
CURE = (
    ""
    if WORKS
    else """
import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
)
PLAIN = {"vit", "vit with defaults"}
IMAGES = [Image.effect_noise((60, 50), 90).convert("RGB") for _ in range(2)]


def own_features(model: torch.nn.Module, pixels: torch.Tensor, projected: bool) -> torch.Tensor:
    """What open_clip computes, before or behind its projection."""
    visual = model.visual
    if projected or not hasattr(visual, "trunk") and getattr(visual, "proj", None) is None:
        features = visual(pixels)
    elif hasattr(visual, "trunk"):
        features = visual.trunk(pixels)
    else:
        projection, visual.proj = visual.proj, None
        features = visual(pixels)
        visual.proj = projection
    return features[0] if isinstance(features, tuple) else features


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_features_are_those_of_open_clip(tower, projected, tmp_path):
    theirs = write_checkpoint(tower, tmp_path / "tower")
    ours = load_open_clip(str(tmp_path / "tower"), projected=projected).eval()
    size = TOWERS[tower]["vision_cfg"]["image_size"]
    pixels = torch.randn(3, 3, size, size)
    expected, found = own_features(theirs, pixels, projected), ours(pixels).pooler_output
    assert found.shape == expected.shape == (3, ours.config.hidden_size)
    assert (type(ours).__name__ == "CLIPVisionModel") is (tower in PLAIN and not projected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    alone = torch.cat([ours(row[None]).pooler_output for row in pixels])
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tower, projected", [("vit", False), ("vit", True), ("resnet", False), ("timm", True), ("siglip", False),
                         ("rope", False)]
)  # fmt: skip
def test_trained_saved_and_loaded(tower, projected, backbones, tmp_path):
    write_checkpoint(tower, tmp_path / "backbones/tower")
    names = (f"open_clip:local-dir:{tmp_path}/backbones/tower", str(backbones / "language_model"))
    processor = FromageProcessor.from_vision_text_pretrained(*names, num_image_tokens=2)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        *names, processor=processor, projection_dim=16, vision_projected=projected
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = ["<|image|>a cat[RET]", "<|image|>two dogs[RET]"]
    batch = processor(images=IMAGES, text=texts, return_tensors="pt", padding=True)
    size = TOWERS[tower]["vision_cfg"]["image_size"]
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch, labels=batch.input_ids).loss.backward()
    optimizer.step()
    model.eval()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("adapter.") for name in moved)
    places = []
    for place, again in saved_both_ways(model, processor, tmp_path):
        assert_equal(outputs(again, size), outputs(model, size))
        places.append(place)
    folder = places[-1]
    half = FromageForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    embeds = [each.get_image_embeds(batch.pixel_values).float() for each in (half, model)]
    torch.testing.assert_close(*embeds, rtol=0.1, atol=0.05)
    # By remote code, with open_clip for the towers that need it.
    absent = 'sys.modules["open_clip"] = None\n' if tower == "vit" and not projected else ""
    assert len(ask_stranger(folder, tmp_path, prelude=CURE + absent)) == 3


@pytest.mark.skipif(WORKS, reason="this torchvision's operators load")
def test_remote_code_names_the_cure(backbones, tmp_path):
    write_checkpoint("vit", tmp_path / "backbones/tower")
    names = (f"open_clip:local-dir:{tmp_path}/backbones/tower", str(backbones / "language_model"))
    model = FromageForConditionalGeneration.from_vision_text_pretrained(*names)
    model.save_pretrained(tmp_path / "model", save_backbones=True)
    (tmp_path / "program.py").write_text(
        "import sys\nsys.modules['modeling_fromage'] = None\nfrom transformers import AutoModel\n"
        f"AutoModel.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
    )
    found = processes.run(tmp_path / "program.py", cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert found.returncode != 0 and "ImportError: transformers cannot import torchvision" in found.stderr


@pytest.mark.parametrize("first", ["transformers", "modeling_fromage"])
def test_imports_in_both_orders(first, tmp_path):
    then = "import modeling_fromage, open_clip, timm\nfrom transformers import AutoProcessor, CLIPImageProcessor\n"
    (tmp_path / "program.py").write_text(f"import {first}\n{then}print(CLIPImageProcessor.__name__)\n")
    found = processes.run(tmp_path / "program.py", cwd=tmp_path)
    assert found.stdout.strip() == "CLIPImageProcessor", found.stderr[-2000:]
    assert found.stderr.count("compiled operators do not load") == (0 if WORKS else 1)


SHAPES = {"RGB": [(64, 64), (301, 333), (333, 301), (67, 41), (33, 200), (1000, 37)], "L": [(50, 71)]}  # fmt: skip


@pytest.mark.parametrize("size", [32, 33, 224])
@pytest.mark.parametrize("preprocess", [{}, SIGLIP, {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}])
def test_pixels_are_those_of_open_clip(size, preprocess, tmp_path):
    config = {"model_cfg": {"vision_cfg": {"image_size": size}}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    processor = load_image_processor(f"open_clip:local-dir:{tmp_path}")
    settings = open_clip.transform.PreprocessCfg(size=size, **preprocess)
    transform = open_clip.transform.image_transform_v2(settings, is_train=False)
    random = np.random.RandomState(0)
    for mode, shapes in SHAPES.items():
        for width, height in shapes:
            image = Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
            ours = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(ours, transform(image)), (mode, width, height)


def test_tags():
    assert split_library("open_clip:ViT-B-32/laion2b_s34b_b79k") == (
        "open_clip", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    )  # fmt: skip
    with pytest.raises(ValueError, match="no weights 'none' of 'ViT-B-32'; it has .*laion2b_s34b_b79k"):
        split_library("open_clip:ViT-B-32/none")
    with pytest.raises(ValueError, match="there is no such model"):
        split_library("open_clip:ViT-Z-1/openai")
    with pytest.raises(ValueError, match="local-dir:PATH"):
        split_library("open_clip:ViTamin-S/datacomp1b")
    tags = open_clip.list_pretrained()
    known = [split for split in (_hub_id(*pair) for pair in tags) if split]
    assert len(known) > 0.7 * len(tags)


def _hub_id(model: str, tag: str) -> str | None:
    try:
        return split_library(f"open_clip:{model}/{tag}")[1]
    except ValueError as error:
        assert "local-dir" in str(error)
        return None
