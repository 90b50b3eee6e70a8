"""A torchvision that was built for another torch, played by a package that registers operators as it does."""

import pytest

from modeling_fromage.io import torchvision_operators
from tests.helpers import processes

# As torchvision/_meta_registrations.py begins.
BROKEN = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda *arguments: None)
"""
PROGRAM = """
import runpy, sys
runpy.run_path(sys.argv[1])["supply_missing_operators"]()
import torch
print(hasattr(torch.ops.torchvision, "nms"))
import torchvision
print(torchvision.__version__)
"""


def run(tmp_path, torchvision: str):
    """Supply operators to this code of torchvision, then import it, in a process of its own."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(torchvision)
    (tmp_path / "program.py").write_text(PROGRAM)
    return processes.run(tmp_path / "program.py", torchvision_operators.__file__, cwd=tmp_path)


def test_missing_operators_are_declared(tmp_path):
    found = run(tmp_path, BROKEN + '__version__ = "0.0"\n')
    assert found.returncode == 0 and found.stdout.split() == ["True", "0.0"], found.stderr
    assert found.stderr.count("torchvision's compiled operators do not load") == 1


def test_one_that_works_is_left_alone(tmp_path):
    found = run(tmp_path, '__version__ = "1.0"\n')
    assert found.stdout.split() == ["False", "1.0"] and not found.stderr, found.stderr


@pytest.mark.parametrize("error", ["ImportError('no libjpeg')", "RuntimeError('of some other kind')"])
def test_one_that_fails_otherwise_is_left_alone(tmp_path, error):
    found = run(tmp_path, f"raise {error}\n")
    assert found.stdout.split() == ["False"] and error.partition("(")[0] in found.stderr
    assert "compiled operators" not in found.stderr


def test_the_operators_are_what_it_lacks(tmp_path):
    found = run(tmp_path, BROKEN + "torch.library.register_fake('torchvision::other')(lambda *arguments: None)\n")
    assert found.returncode != 0 and "operator torchvision::other does not exist" in found.stderr
    assert "compiled operators" not in found.stderr
