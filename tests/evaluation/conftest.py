"""The models that evaluations are run on."""

import shutil

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from tests.helpers.backbones import PARITY
from tests.helpers.evaluation import Scripts
from tests.helpers.parity import CASES


@pytest.fixture(scope="module", params=sorted(CASES))
def scripts(request, tmp_path_factory):
    return Scripts(request.param, tmp_path_factory.mktemp("scripts"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A FROMAGe whose vision tower has a text half: (checkpoint, the CLIP)."""
    folder = tmp_path_factory.mktemp("models")
    backbones = PARITY / "case_a_opt_tied"
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 512, "max_position_embeddings": 20, "eos_token_id": 3},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    clip = folder / "clip"
    CLIPModel(config).save_pretrained(clip)
    AutoImageProcessor.from_pretrained(backbones / "vision_model").save_pretrained(clip)
    AutoTokenizer.from_pretrained(backbones / "language_model").save_pretrained(clip)
    language_model = str(shutil.copytree(backbones / "language_model", folder / "lm"))
    processor = FromageProcessor.from_vision_text_pretrained(str(clip), language_model)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        str(clip), language_model, processor=processor, projection_dim=16
    )
    model.save_pretrained(folder / "fromage")
    processor.save_pretrained(folder / "fromage")
    return folder / "fromage", clip
