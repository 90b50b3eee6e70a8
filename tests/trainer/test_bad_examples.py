"""What is a bad example, and what is given in its place."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from modeling_fromage.trainer.bad_example_list import BadExampleList
from modeling_fromage.trainer.bad_examples import (
    BadExampleError,
    ExampleReader,
    GoodExamples,
    TooManyBadExamplesError,
    are_too_many,
)
from tests.helpers.dirty_data import (
    BAD,
    NUMBERS,
    Refusing,
    captions_of,
    dirty,
    good,
    listed,
    make_trainer,
    picture,
    reading,
)
from tests.helpers.training_runs import examples


def seen(dataset, **loading) -> list[str]:
    loader = DataLoader(dataset, batch_size=4, collate_fn=captions_of, **loading)
    return [caption for batch in loader for caption in batch]


# ---- what is bad, and what comes in its place -----------------------------------------------------------------------


def test_every_kind_of_bad_example_is_replaced_and_listed(collator, tmp_path):
    data = dirty(24)
    dataset = reading(collator, tmp_path, data)
    captions = captions_of([dataset[i] for i in range(24)])
    for i, caption in enumerate(captions):
        assert (caption == f"number {i}") == (i not in NUMBERS) and caption.startswith("number")
    found = dataset.reader.noted
    found.merge()
    rows = {row["number"]: row for row in listed(tmp_path)}
    assert list(rows) == NUMBERS and [row["reason"] for row in rows.values()] == list(BAD)
    assert rows[NUMBERS[5]]["place"] == "t.jsonl, line 3" and rows[NUMBERS[2]]["place"] == "nowhere/x.png"
    assert "cut.png" in rows[NUMBERS[0]]["detail"] and rows[NUMBERS[3]]["split"] == "train"
    assert found.metrics()["bad_examples"] == 7 and found.metrics()["bad_examples_not_found"] == 1


def test_raising_names_the_example(collator, tmp_path):
    dataset = GoodExamples(dirty(24), ExampleReader(collator.prepare))
    message = r"example 17 of the train data \(t.jsonl, line 3\): malformed row: not JSON.*`on_bad_example=skip`"
    with pytest.raises(BadExampleError, match=message):
        dataset[17]
    with pytest.raises(BadExampleError, match=r"example 2 .*\(cut.png\): broken: cut.png"):
        dataset[2]
    for workers in (0, 1):
        trainer = make_trainer(tmp_path, dirty(24), options={"dataloader_num_workers": workers, "max_steps": 6})
        with pytest.raises(BadExampleError, match=r"^Cannot use example \d+ of the train data.* one for it\.$"):
            trainer.train()


def test_substitutes_are_a_function_of_seed_and_place(collator, tmp_path):
    data = dirty(24)
    one, again, other = (captions_of([reading(collator, tmp_path, data, seed=seed)[i] for i in NUMBERS])
                         for seed in (0, 0, 1))  # fmt: skip
    assert one == again and one != other
    backwards = captions_of([reading(collator, tmp_path, data)[i] for i in reversed(NUMBERS)])
    assert backwards[::-1] == one


class Shards(list):
    """Shards of eight."""

    def substitutes(self, index):
        first = index // 8 * 8
        return iter([*range(index + 1, first + 8), *range(first, index)])

    def epoch_order(self, seed, epoch):
        return np.arange(len(self))


def test_a_data_set_may_name_substitutes(collator, tmp_path):
    data = Shards(good(24))
    for i in (5, 6, 7, 0, *range(16, 24)):
        data[i]["caption"] = ""
    dataset = reading(collator, tmp_path, data)
    assert captions_of([dataset[5], dataset[6]]) == ["number 1", "number 1"]
    assert dataset[17]["caption"] in captions_of(good(16))  # its whole shard is bad
    assert dataset.epoch_order(0, 0).tolist() == list(range(24))
    assert not hasattr(reading(collator, tmp_path, good(2)), "epoch_order")


def test_bad_captions_of_several_are_left_out(collator, tmp_path):
    data = good(2)
    data[0]["caption"] = ["", "a cat", None, "a dog"]
    data[1]["retrieval_caption"] = ["a", " "]
    dataset = reading(collator, tmp_path, data)
    assert dataset[0]["caption"] == ["a cat", "a dog"] and dataset[1]["retrieval_caption"] == ["a"]
    data[0]["caption"] = ["", None]
    assert dataset[0]["caption"] == "number 1"


class Decoding(torch.utils.data.Dataset):
    """Raises for some rows, as data sets do that decode."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index in (1, 4):
            raise OSError("image file is truncated")
        return self.rows[index]

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_data_sets_that_raise(collator, tmp_path):
    captions = seen(reading(collator, tmp_path, Decoding(good(8))))
    assert captions[0] == "number 0" and captions[5] == "number 5" and not {"number 1", "number 4"} & {*captions}
    assert len(captions) == 8


def test_an_image_processor_that_raises(collator, tmp_path):
    collator.processor.image_processor = refusing = Refusing(collator.processor.image_processor, 5)
    dataset = reading(collator, tmp_path, good(8))
    rows = [dataset[i] for i in range(4)]
    collator(rows)
    assert refusing.passes == 1
    rows = [dataset[i] for i in range(4, 8)]
    inputs = collator.image_inputs(rows)
    assert rows[1]["caption"] != "number 5" and [row["caption"] for row in rows[2:]] == ["number 6", "number 7"]
    assert torch.equal(inputs["pixel_values"], collator.image_inputs(rows)["pixel_values"])
    dataset.reader.noted.merge()
    assert [row["number"] for row in listed(tmp_path)] == [5]
    with pytest.raises(BadExampleError, match="example 5 of the train data.*RuntimeError: no size left"):
        collator([GoodExamples(good(8), ExampleReader(collator.prepare))[5]])


def test_features_that_are_not_finite(collator, tmp_path):
    rows = examples(8)
    rows[3]["pooled_image_features"][2] = float("nan")
    assert reading(collator, tmp_path, rows)[3]["caption"] != rows[3]["caption"]
    make_trainer(tmp_path, rows, on_bad_example="skip", max_bad_share=0.5).train()
    assert [row["reason"] for row in listed(tmp_path)] == ["features not finite"]


def test_pictures_are_decoded_once(collator, tmp_path, monkeypatch):
    from modeling_fromage.trainer import data_collator

    decoded, load = [], data_collator.load_rgb_image
    monkeypatch.setattr(data_collator, "load_rgb_image", lambda image: decoded.append(image) or load(image))
    dataset = reading(collator, tmp_path, good(4))
    batch = collator([dataset[i] for i in range(4)])
    assert len(decoded) == 4
    plain = collator(good(4))
    assert plain.keys() == batch.keys() and all(torch.equal(plain[name], batch[name]) for name in plain)


def test_a_share_is_judged_beyond_chance(collator, tmp_path):
    assert not are_too_many(255, 255, 0.05, 1000) and are_too_many(24, 256, 0.05, 1000)
    assert not are_too_many(23, 256, 0.05, 1000)  # 9 %, of 256
    assert are_too_many(51, 1000, 0.05, 1000) and not are_too_many(50, 1000, 0.05, 1000)  # all of them
    assert are_too_many(2, 8, 0.2, 8) and not are_too_many(8, 8, 1.0, 8)
    share = torch.rand(200, 5000, generator=torch.Generator().manual_seed(0)) < 0.03
    seen = torch.arange(1, 5001)
    bad = share.cumsum(1)
    stopped = (bad > seen * 0.05 + 3 * (seen * 0.05 * 0.95).sqrt()) & (seen >= 256)
    assert not stopped.any(1).any()  # 200 runs with 3 % bad ones, where 5 % may be
    data = [{"image": picture(0), "caption": "" if i % 5 else "a"} for i in range(1000)]
    dataset = reading(collator, tmp_path, data, share=0.1)
    [dataset[5 * i] for i in range(200)]
    with pytest.raises(TooManyBadExamplesError, match="45 of the 256 examples"):
        for i in range(1, 1000):
            dataset[i]
    nothing = reading(collator, tmp_path, [{"image": None, "caption": "a"}] * 50)
    with pytest.raises(TooManyBadExamplesError, match="Example 7 .* and so are all that were tried"):
        nothing[7]


def test_a_worker_that_is_spawned_does_the_same(collator, tmp_path):
    dataset = reading(collator, tmp_path, dirty(24))
    dataset[2]
    spawned = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert captions_of(spawned[i] for i in range(24)) == captions_of(dataset[i] for i in range(24))
    dataset.reader.noted.merge()
    assert [row["number"] for row in listed(tmp_path)] == NUMBERS


def test_half_an_emoji_is_no_caption(collator, tmp_path):
    rows = good(6)
    rows[2] = {**rows[2], "caption": "cut \ud83d"}
    dataset = reading(collator, tmp_path, rows)
    collator([dataset[i] for i in range(6)])
    dataset.reader.noted.merge(write=True)
    (entry,) = listed(tmp_path)
    assert (entry["number"], entry["reason"]) == (2, "caption is not Unicode")


def test_a_part_of_the_data_is_judged_as_a_sample():
    assert not are_too_many(1, 10, 0.05, math.inf) and are_too_many(1, 10, 0.05, 10)
    assert not are_too_many(20, 300, 0.05, math.inf) and are_too_many(60, 300, 0.05, math.inf)


def test_every_process_that_resumes_knows_the_whole_list(tmp_path):
    first = BadExampleList(tmp_path)
    first.add({"split": "train", "number": 1, "place": None, "reason": "broken", "detail": ""})
    first.write()
    for process_index in (0, 1):
        resumed = BadExampleList(tmp_path, process_index)
        resumed.begin(keep=True)
        resumed.write()
        assert len((tmp_path / "_bad_examples.jsonl").read_text().splitlines()) == 1
