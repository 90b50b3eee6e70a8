"""The command that builds indexes, and the authors' pickles, hostile ones included."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hub_scripts import build_image_index
from hub_scripts.original_embeddings import read_original_embeddings
from modeling_fromage import FromageImageIndex, FromageProcessor
from tests.helpers.backbones import PARITY, make_model, make_processor
from tests.helpers.parity import Inference

IMAGES = PARITY / "common" / "images"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("opt_clip").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def test_build_in_shards_and_merge(checkpoint, tmp_path, capsys):
    build_image_index.main([checkpoint, str(IMAGES), str(tmp_path / "whole"), "--dtype", "float32"])
    for i in range(3):
        build_image_index.main([checkpoint, str(IMAGES), str(tmp_path / f"part-{i}"), "--dtype", "float32",
                                "--shard", f"{i}/3"])  # fmt: skip
    parts = [str(tmp_path / f"part-{i}") for i in range(3)]
    build_image_index.main([checkpoint, *parts, str(tmp_path / "merged"), "--merge", "--faiss", "IVF4,Flat",
                            "--nprobe", "4"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "FromageImageIndex(50 images, 16 dimensions, torch.float32, faiss)" in printed
    assert f"from_pretrained({str(tmp_path / 'whole')!r}, image_root={str(IMAGES)!r})" in printed
    whole, merged = (
        FromageImageIndex.from_pretrained(tmp_path / name, image_root=IMAGES) for name in ("whole", "merged")
    )
    assert sorted(merged.ids) == whole.ids and merged.backend == "faiss"
    queries = torch.randn(5, 16)
    for ours, theirs in zip(whole.search(queries, 7)[:1], merged.search(queries, 7)[:1], strict=True):
        assert ours == theirs
    assert merged.load_image("img_003.png").size == whole.load_image("img_003.png").size


def test_bad_arguments(checkpoint, tmp_path, capsys):
    for arguments, message in [
        ([checkpoint, str(IMAGES), str(IMAGES), str(tmp_path / "a")], "--merge"),
        ([checkpoint, str(tmp_path / "missing"), str(tmp_path / "a")], "Expected a folder"),
        ([checkpoint, str(IMAGES), str(tmp_path / "a"), "--shard", "3/3"], "from 0 to n - 1"),
    ]:
        with pytest.raises(SystemExit):
            build_image_index.main(arguments)
        assert message in capsys.readouterr().err


# ---- the authors' pickles ----


def test_original_embeddings_are_the_index(tmp_path, capsys):
    inference = Inference("case_a_opt_tied")
    inference.model.save_pretrained(tmp_path / "model")
    pickled = PARITY / "case_a_opt_tied" / "fromage_model" / "cc3m_embeddings.pkl"
    for paths, count in (([pickled], 50), ([pickled, pickled], 50)):
        build_image_index.main([str(tmp_path / "model"), *map(str, paths), str(tmp_path / f"index-{len(paths)}")])
        index = FromageImageIndex.from_pretrained(tmp_path / f"index-{len(paths)}")
        assert index.ids == inference.index.ids and len(index) == count
        torch.testing.assert_close(index.embeds, inference.index.embeds, atol=2e-5, rtol=0)
        index.check_model(inference.model)
    assert "50 that occurred before" in capsys.readouterr().out
    assert isinstance(inference.processor, FromageProcessor)


@pytest.mark.parametrize(
    "embeddings",
    [
        np.ones((2, 4), dtype=np.float32),
        [torch.ones(4, dtype=torch.bfloat16), torch.ones(1, 4)[0]],
        [torch.ones(4), torch.ones(4)],
        [np.ones(4, dtype=np.float16), np.ones(4, dtype=np.float16)],
    ],
    ids=["array", "bfloat16 tensors", "tensors", "list of arrays"],
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_kinds_of_original_embeddings(embeddings, protocol, tmp_path):
    path = tmp_path / "cc3m_embeddings.pkl"
    path.write_bytes(pickle.dumps({"paths": ["a", "b"], "embeddings": embeddings}, protocol=protocol))
    names, embeds = read_original_embeddings(path)
    assert names == ["a", "b"] and torch.equal(embeds, torch.ones(2, 4))


class _Runs:
    """A pickle of this calls `function`, if it is let."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def _within_a_storage(trace):
    """A harmless-looking tensor whose storage holds a pickle of its own."""
    return _Runs(torch.storage._load_from_bytes, pickle.dumps(_Runs(Path.touch, trace)))


@pytest.mark.parametrize(
    "make",
    [
        lambda trace: _Runs(Path.touch, trace),
        lambda trace: _Runs(eval, f"open({str(trace)!r}, 'w')"),
        lambda trace: _Runs(getattr, trace, "touch"),
        _within_a_storage,
        lambda trace: {"paths": ["a"], "embeddings": [_Runs(collections.Counter, "a")]},
        lambda trace: {"paths": ["a"], "embeddings": [torch.tensor([1.0, float("nan")])]},
        lambda trace: {"paths": ["a", "b"], "embeddings": [torch.ones(2)]},
        lambda trace: {"paths": [3], "embeddings": [torch.ones(2)]},
        lambda trace: {"paths": ["a", "b"], "embeddings": [torch.ones(2), torch.ones(3)]},
        lambda trace: ["a"],
    ],
)
def test_hostile_pickles(make, tmp_path):
    trace = tmp_path / "it ran"
    path = tmp_path / "cc3m_embeddings.pkl"
    path.write_bytes(pickle.dumps(make(trace)))
    with pytest.raises(ValueError, match="cc3m_embeddings.pkl"):
        read_original_embeddings(path)
    assert not trace.exists()


def test_truncated_pickle(tmp_path):
    path = tmp_path / "cc3m_embeddings.pkl"
    path.write_bytes(pickle.dumps({"paths": ["a"], "embeddings": np.ones((1, 4))})[:-20])
    with pytest.raises(ValueError, match="refused"):
        read_original_embeddings(path)
