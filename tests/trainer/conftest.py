import pytest

from modeling_fromage import FromageDataCollator
from tests.helpers.backbones import make_processor


@pytest.fixture
def collator():
    return FromageDataCollator(make_processor())
