import pytest

from modeling_fromage.serving.engine import Engine
from tests.helpers.talking import make_talker


@pytest.fixture
def talker():
    """An engine that waits a little for more requests, and the pace of its model."""
    pipe, pace = make_talker()
    engine = Engine(pipe, wait_seconds=0.2)
    yield engine, pace
    engine.close()
