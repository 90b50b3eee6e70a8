"""The staged Space's app.py makes the page with a model and an index of this machine."""

import pytest

from hub_scripts import push_space
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from tests.helpers.pipelines import picture


def test_app(tmp_path, capsys):
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    model, processor = (
        FromageForConditionalGeneration.from_pretrained(checkpoint),
        FromageProcessor.from_pretrained(checkpoint),
    )
    index = FromageImageIndex.build(model, processor, [picture("red")], show_progress=False)
    index.save_pretrained(tmp_path / "index")
    command = ["org/pictures", "--model", "org/fromage", "--index", "org/index", "--dry-run"]
    push_space.main([*command, "--model-path", str(checkpoint), "--index-path", str(tmp_path / "index")])
    assert "app.py made a page of" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="app.py does not run"):
        push_space.main([*command, "--model-path", str(checkpoint), "--index-path", str(tmp_path / "nothing")])
