"""Fixtures of the index's tests."""

import pytest
from huggingface_hub import constants

from tests.helpers.backbones import make_model
from tests.helpers.hub_server import hub_server
from tests.helpers.indexes import (
    small_shards,
)


@pytest.fixture(params=[7, 65_536])
def shard_rows(request, monkeypatch):
    small_shards(monkeypatch, request.param)


@pytest.fixture(scope="module")
def model():
    return make_model("opt_clip")


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
