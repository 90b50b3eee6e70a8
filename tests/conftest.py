import pytest
import torch

from tests.helpers.backbones import BACKBONES, make_model, make_processor


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=sorted(BACKBONES))
def model(request):
    return make_model(request.param)


@pytest.fixture
def processor():
    return make_processor()
