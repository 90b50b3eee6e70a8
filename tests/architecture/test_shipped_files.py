"""The flat files of `modeling_fromage/` are those that checkpoints carry, and load as remote code."""

import sys

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from modeling_fromage import FromagePipeline
from tests.helpers.checkpoints import assemble
from tests.helpers.source_code import flat_files, imports

# What the wheel requires; anything else is not there where a checkpoint is loaded.
REQUIRED = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
FLAT = {path.name: path for path in flat_files()}


def test_flat_files_are_those_that_are_saved(backbones, tmp_path):
    """By the model, the processor and the pipeline. What does not ship belongs into a sub-package."""
    model, processor = assemble(backbones)
    saved = {}
    for each in (model, processor, FromagePipeline(model=model, processor=processor)):
        folder = tmp_path / type(each).__name__
        each.save_pretrained(folder)
        saved |= {path.name: path for path in folder.rglob("*.py")}
    assert sorted(saved) == sorted(FLAT)
    assert all(saved[name].read_bytes() == path.read_bytes() for name, path in FLAT.items())


@pytest.mark.parametrize("name", sorted(FLAT))
def test_remote_code_can_be_imported(name):
    """By transformers' own reading of it, a line at a time, which takes prose for code where it looks like it."""
    path = FLAT[name]
    needed = {module.partition(".")[0] for module in get_imports(path)}
    assert needed <= REQUIRED | sys.stdlib_module_names
    found = list(imports(path.stem, path))
    siblings = {f"{each.module}.py" for each in found if each.relative}
    assert {f"{module}.py" for module in get_relative_imports(path)} == siblings <= FLAT.keys()
    for each in found:
        assert "*" not in each.names and each.module, f"{each}: `from . import x` and `import *` do not load"
