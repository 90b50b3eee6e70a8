"""The order of epochs, sources by weight, and what is held out."""

import itertools
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from modeling_fromage import FromageForConditionalGeneration
from tests.helpers.backbones import PARITY
from tests.helpers.captioned_data import tar_members, write_tar
from training.arguments import DataArguments
from training.cache_features import main as cache_features
from training.data.captioned_images import load_captioned_images
from training.data.examples import Mixture, Selected, hold_out
from training.data.training_data import DataLoading, read_sources
from training.train import main as train


def plain(count: int, name: str = "") -> Dataset:
    return Dataset.from_dict(
        {"image": [f"{name}{n}.png" for n in range(count)], "caption": [f"{name}{n}" for n in range(count)]}
    )


@pytest.fixture
def shards(tmp_path):
    rows = [{"image": f"{n}.png", "caption": str(n)} for n in range(1000)]
    for number, (start, end) in enumerate(((0, 300), (300, 301), (301, 301), (301, 1000))):
        text = "".join(json.dumps(row) + "\n" for row in rows[start:end])
        (tmp_path / f"{number}.jsonl").write_text(text)
    return load_captioned_images(f"{tmp_path}/*.jsonl", streaming=True, shuffle_window=80)


def test_an_epoch_is_a_permutation_whose_reads_stay_near_each_other(shards):
    orders = [shards.epoch_order(3, epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
        for start in range(0, 1000, 80):  # eight blocks of ten rows, one more where a window began in between
            assert len(set(order[start : start + 80] // 10)) <= 3 * 8
    assert not np.array_equal(*orders)
    assert not np.array_equal(orders[0], shards.epoch_order(4, 0)) and np.array_equal(
        orders[0], shards.epoch_order(3, 0)
    )
    near = np.abs(np.diff(orders[0]))
    assert (near == 1).mean() < 0.05 and abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.2


def test_weights_say_how_often_an_epoch_sees_an_example(shards):
    mixture = Mixture([plain(10, "a"), plain(40, "b"), shards], [2, 0.5, 0.25])
    assert len(mixture) == 1050 and mixture[10]["caption"] == "b0" and mixture[50]["caption"] == "0"
    seen = Counter()
    for epoch in range(4):
        order = mixture.epoch_order(0, epoch)
        assert len(order) == 20 + 20 + 250
        counts = Counter(order.tolist())
        assert all(counts[number] == 2 for number in range(10)) and max(counts.values()) == 2
        halves = [np.searchsorted(order[order < 10], 5)]  # interleaved: each source in every part of the epoch
        assert halves and all(
            ((order[part] < 10).any(), (order[part] >= 50).any()) for part in (slice(145), slice(145, None))
        )
        seen += counts
        if epoch % 2:
            assert {seen[number] for number in range(10, 50)} == {(epoch + 1) // 2}  # the other half
    assert {seen[number] for number in range(50, 1050)} == {1}
    assert np.array_equal(mixture.epoch_order(0, 1), mixture.epoch_order(0, 1))
    assert next(mixture.substitutes(10)) == 11 and next(mixture.substitutes(49)) == 10
    assert list(mixture.substitutes(50))[:1] == [51]
    for weight in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="`weight` .*more than 0"):
            Mixture([plain(2)], [weight])


@pytest.mark.parametrize("kind", ["datasets", "shards"])
def test_what_is_held_out_is_never_trained_on(kind, shards):
    whole = plain(1000) if kind == "datasets" else shards
    train, held = hold_out(whole, 0.2, seed=1)
    captions = [row["caption"] for row in train], [row["caption"] for row in held]
    assert sorted(captions[0] + captions[1], key=int) == [str(n) for n in range(1000)]
    assert 150 < len(held) < 250 and type(train) is type(held)
    again = hold_out(plain(1200), 0.2, seed=1)[1]["caption"]
    assert again[: len(held)] == captions[1]  # rows that are added change no row's side
    assert hold_out(whole, 0.2, seed=2)[1]["caption"] != captions[1]
    if kind == "shards":
        order = train.epoch_order(0, 1)
        assert sorted(order.tolist()) == list(range(len(train)))
        numbers = train.numbers[order]
        assert np.array_equal(numbers, [n for n in shards.epoch_order(0, 1) if n in set(train.numbers.tolist())])
        assert all(train.numbers[n] in set(shards.substitutes(5)) for n in Selected(train, range(9)).substitutes(3))


def test_examples_behave_like_a_dataset(shards):
    part = shards.select(range(10, 20))
    assert len(part) == 10 and part[-1]["caption"] == "19" and part["caption"] == [str(n) for n in range(10, 20)]
    assert [len(batch["image"]) for batch in part.select_columns(["image"]).iter(4)] == [4, 4, 2]
    assert part.select([3]).select_columns(["caption"])[0] == {"caption": "13"}
    with pytest.raises(IndexError):
        part[10]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "list of data is empty"),
        ([{"weight": 2}], "a mapping with `source: ...`"),
        ([{"source": "a", "wieght": 2}], "no key 'wieght'. Did you mean weight"),
        ([{"source": "a", "weight": 0}], "`weight` .* of a: more than 0, got 0"),
        ([{"source": "a", "weight": "two"}], "got 'two'"),
    ],
)
def test_sources_that_cannot_be(data, message):
    with pytest.raises(ValueError, match=message):
        read_sources(data, "train", None, None)


def test_evaluation_data_are_of_one_kind(tmp_path):
    (tmp_path / "t.tsv").write_text("caption\timage\na\tb\nc\td\n")
    table = str(tmp_path / "t.tsv")
    for options, message in (
        ({"eval_data": table, "eval_fraction": 0.1}, "`eval_data` is named"),
        ({"eval_fraction": 1e-9}, "of 2 examples leaves none"),
    ):
        with pytest.raises(ValueError, match=message):
            DataLoading(DataArguments(table, **options)).train_and_eval(None)
    with pytest.raises(ValueError, match="from 0 to below 1, got 1"):
        DataArguments(table, eval_fraction=1)


def test_training_on_a_mixture_with_cached_features(tmp_path, monkeypatch):
    """Of shards and a table, of which a share is held out: the same with features that were computed before."""
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", tar_members(range(10)))
    rows = (PARITY / "common" / "captions.tsv").read_text(encoding="utf-8").splitlines()[1:9]
    images = (PARITY / "common" / "images").resolve()
    lines = [
        f"{caption}\t{images / image}\n" for caption, image in (row.split("\t") for row in rows if row.count("\t") == 1)
    ]
    (tmp_path / "b.tsv").write_text("title\tfile_name\n" + "".join(lines))
    case = PARITY / "case_a_opt_tied"
    (tmp_path / "config.yaml").write_text(
        f"language_model: {case / 'language_model'}\nvision_model: {case / 'vision_model'}\nprojection_dim: 16\n"
        "train_data: [{source: a.tar, weight: 0.5}, {source: b.tsv, weight: 2}]\neval_fraction: 0.3\nstreaming: true\n"
        "num_train_epochs: 1\nlogging_steps: 1\nper_device_train_batch_size: 3\nsave_strategy: 'no'\nreport_to: none\n"
        "use_cpu: true\n"
    )
    live = train(["config.yaml", "output_dir=live"])
    assert len(list((tmp_path / "live" / "_shard_indexes").iterdir())) == 2
    cache_features(["config.yaml", "features", "output_dir=x"])
    cached = train(["config.yaml", "output_dir=cached", "feature_cache=features"])
    for name in ("eval_num_pairs", "eval_loss"):
        assert cached[name] == pytest.approx(live[name], rel=1e-2)
    for folder in ("live", "cached"):
        assert torch.isfinite(FromageForConditionalGeneration.from_pretrained(folder).adapter.logit_scale)


class Numbers:
    def __len__(self):
        return 2_000_000


@pytest.mark.parametrize("chosen", [range(0, 2_000_000, 2), np.arange(0, 2_000_000, 2), np.arange(1_999_998, -1, -2)])
def test_substitutes_cost_nothing_that_grows_with_the_data(chosen):
    """One is asked for at every example that cannot be read."""
    part = Selected(Numbers(), chosen)
    tracemalloc.start()
    first = list(itertools.islice(part.substitutes(5), 3))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first == ([6, 7, 8] if chosen[0] == 0 else [4, 3, 2])
    assert most < 100_000


def test_substitutes_of_a_part_are_of_that_part():
    for chosen in ([1, 4, 5], [5, 1, 4], range(1, 6, 2)):
        part = Selected(list("abcdef"), chosen)
        for number in range(3):
            after = [other % 6 for other in range(chosen[number] + 1, chosen[number] + 6)]
            expected = [list(chosen).index(other) for other in after if other in chosen]
            assert list(part.substitutes(number)) == expected
