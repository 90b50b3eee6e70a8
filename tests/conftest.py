import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers.backbones import BACKBONES, make_model, make_processor
from tests.helpers.paths import PARITY

# Runs repeat: what one machine finds, all find. `--hypothesis-profile=default` looks for other examples.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=sorted(BACKBONES))
def model(request):
    return make_model(request.param)


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def backbones(tmp_path) -> Path:
    """Folders of an OPT and of a CLIP vision encoder, with tokenizer and image processor."""
    for name in ("language_model", "vision_model"):
        shutil.copytree(PARITY / "case_a_opt_tied" / name, tmp_path / "backbones" / name)
    return tmp_path / "backbones"
