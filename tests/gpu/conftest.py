"""`python -m pytest tests/gpu`, or `make test-gpu`: a GPU gives what the CPU gives.

Where there is no GPU the CPU is compared with itself, so that the tests are known to run. With
`FROMAGE_GPU_RESULTS=results.json` the measured differences are kept, with the hardware and the versions.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from training.publishing.provenance import provenance

RESULTS = "FROMAGE_GPU_RESULTS"


@pytest.fixture
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


@pytest.fixture(scope="session")
def differences():
    """The measured differences and their bounds, by the names of the tests."""
    found: dict[str, dict] = {}
    yield found
    if found and os.environ.get(RESULTS):
        path = Path(os.environ[RESULTS])
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**provenance("cuda" if torch.cuda.is_available() else "cpu"), "differences": found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def check(differences, request):
    """`check("what", difference, bound)`: record a difference, and fail where it is over its bound."""

    def record(what: str, difference: float, bound: float):
        differences.setdefault(request.node.name, {})[what] = {"difference": float(difference), "bound": bound}
        assert difference <= bound, f"{what} differs by {difference:.3g}, over {bound:.3g}"

    return record


@pytest.fixture(autouse=True)
def whole_fp32(monkeypatch):
    """No TF32 in convolutions, as in matrix products: it keeps 10 of the 23 bits of fp32's mantissa."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
