"""Names of vision encoders and their libraries."""

import json

import pytest
from transformers.utils import is_timm_available

from modeling_fromage import FromageForConditionalGeneration


@pytest.mark.skipif(is_timm_available(), reason="timm is here")
def test_a_model_of_timm_names_the_extra(backbones, tmp_path):
    (tmp_path / "timm").mkdir()
    config = {"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "timm/config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match=r"model of timm.*pip install 'modeling-fromage\[open-clip\]'"):
        FromageForConditionalGeneration.from_vision_text_pretrained(
            str(tmp_path / "timm"), str(backbones / "language_model")
        )
