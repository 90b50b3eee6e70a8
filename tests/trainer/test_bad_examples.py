"""Data with errors in it: what is bad, what is trained on in its place, the list, and when a run stops."""

import io
import json
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from modeling_fromage import FromageDataCollator, FromageTrainer
from modeling_fromage.trainer.bad_example_list import BadExampleList
from modeling_fromage.trainer.bad_examples import (
    BadExampleError,
    ExampleReader,
    GoodExamples,
    TooManyBadExamplesError,
    are_too_many,
)
from modeling_fromage.trainer.dirty_data import DirtyData
from modeling_fromage.trainer.good_streams import GoodStream
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import arguments, examples

SKIP = {"on_bad_example": "skip", "max_bad_share": 1.0}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (number * 5 % 256, 90, 200))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def good(count: int) -> list[dict]:
    return [{"image": {"bytes": png(i), "path": f"{i}.png"}, "caption": f"number {i}"} for i in range(count)]


BAD = {
    "broken": {"image": {"bytes": png(1)[:60], "path": "cut.png"}},
    "no image": {"image": {"bytes": b"GIF89 of a kind", "path": "x.gif"}},
    "not found": {"image": "nowhere/x.png"},
    "empty caption": {"caption": "  "},
    "caption with a special token": {"caption": "a cat [RET]"},
    "malformed row": {"problem": "not JSON: ...", "image": None, "caption": None, "place": "t.jsonl, line 3"},
    "too thin": {"image": Image.new("RGB", (4000, 2))},
}


def dirty(count: int) -> list[dict]:
    """Examples, of which one of each kind is bad."""
    rows = good(count)
    for place, row in enumerate(BAD.values()):
        rows[3 * place + 2] |= row
    return rows


NUMBERS = [3 * place + 2 for place in range(len(BAD))]


def make_trainer(folder, data, collator=None, options=None, **kwargs):
    collator = collator or FromageDataCollator(make_processor(), concat_captions_prob=0.5)
    return FromageTrainer(model=make_model("opt_clip"), args=arguments(folder, **(options or {})), train_dataset=data,
                          data_collator=collator, **kwargs)  # fmt: skip


def listed(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "bad_examples.jsonl").read_text().splitlines()]


def seen(dataset, **loading) -> list[str]:
    loader = DataLoader(dataset, batch_size=4, collate_fn=captions_of, **loading)
    return [caption for batch in loader for caption in batch]


def captions_of(rows):
    return [row["caption"] for row in rows]


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]


@pytest.fixture
def collator():
    return FromageDataCollator(make_processor())


def reading(collator, folder, data, share=1.0, **kwargs):
    return GoodExamples(data, ExampleReader(collator.prepare, BadExampleList(folder), "train", share), **kwargs)


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
        with pytest.raises(BadExampleError, match=r"^Cannot use example \d+ of the train data.*on_bad_example=skip"):
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


class Refusing:
    """An image processor that raises for the picture of a number."""

    def __init__(self, inner, number):
        self.inner, self.number, self.passes = inner, number, 0

    def __call__(self, images, **kwargs):
        self.passes += 1
        if any(image.getpixel((0, 0)) == picture(self.number).getpixel((0, 0)) for image in images):
            raise RuntimeError("no size left")
        return self.inner(images, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)


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


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_spawned_does_the_same(collator, tmp_path):
    dataset = reading(collator, tmp_path, dirty(24))
    dataset[2]
    spawned = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert captions_of(spawned[i] for i in range(24)) == captions_of(dataset[i] for i in range(24))
    dataset.reader.noted.merge()
    assert [row["number"] for row in listed(tmp_path)] == NUMBERS


class StopAt(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_lists_what_an_epoch_has(tmp_path, workers):
    options = {"num_train_epochs": 2, "max_steps": -1, "logging_steps": 4, "dataloader_num_workers": workers}
    trainer = make_trainer(tmp_path, dirty(24), options=options, **SKIP)
    metrics = trainer.train().metrics
    rows = listed(tmp_path)
    assert [row["number"] for row in rows] == NUMBERS
    assert metrics["bad_examples"] == 7 and metrics["bad_examples_empty_caption"] == 1
    assert [entry["bad_examples"] for entry in trainer.state.log_history if "loss" in entry][-1] == 7
    assert not Path(tmp_path, "_bad_examples").exists()


def test_workers_change_nothing_and_a_resumed_run_is_the_same(tmp_path):
    def run(folder, steps=5, workers=0, **kwargs):
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": workers}
        trainer = make_trainer(tmp_path / folder, dirty(24), options=options, callbacks=[StopAt(steps)], **SKIP)
        trainer.train(**kwargs)
        return weights(trainer)

    whole = run("whole")
    assert all(map(torch.equal, whole, run("workers", workers=2)))
    run("cut", steps=2)
    before = listed(tmp_path / "cut")
    folder = tmp_path / "cut" / "_bad_examples"
    folder.mkdir()
    late = {"split": "train", "number": 900, "place": "late", "reason": "broken", "detail": ""}
    (folder / "00000-77.jsonl").write_text(json.dumps(late) + '\n{"split": "tr')  # cut off by a kill
    assert all(map(torch.equal, whole, run("cut", resume_from_checkpoint=True)))
    after = listed(tmp_path / "cut")
    assert len(before) < len(after) and after == sorted(
        [*listed(tmp_path / "whole"), late], key=lambda row: row["number"]
    )
    run("cut", steps=1)  # from the beginning
    assert len(listed(tmp_path / "cut")) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stops_above_the_share(tmp_path, workers):
    trainer = make_trainer(tmp_path, dirty(24), options={"max_steps": 30, "dataloader_num_workers": workers},
                           on_bad_example="skip", max_bad_share=0.1)  # fmt: skip
    with pytest.raises(TooManyBadExamplesError) as caught:
        trainer.train()
    told = str(caught.value)
    assert "max_bad_share=0.1" in told and "Traceback" not in told and "Caught" not in told
    assert " 1 " in told and str(tmp_path / "bad_examples.jsonl") in told
    for row in listed(tmp_path):
        assert row["reason"] in told and (row["place"] or f"example {row['number']}") in told


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


def test_collators_of_another_kind(tmp_path):
    class Own(FromageDataCollator):
        def __call__(self, rows):
            return super().__call__([{"image": image, "caption": caption} for image, caption in rows])

    pairs = [(picture(i), f"number {i}") for i in range(8)]
    make_trainer(tmp_path, pairs, Own(make_processor())).train()
    with pytest.raises(ValueError, match="needs a FromageDataCollator, got Own.*Override its `prepare`"):
        make_trainer(tmp_path, pairs, Own(make_processor()), **SKIP)
    for options in ({"on_bad_example": "ignore"}, {"max_bad_share": 5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_trainer(tmp_path, good(4), **options)


# ---- evaluation and the warm start ----------------------------------------------------------------------------------


def test_an_evaluation_leaves_bad_examples_out(tmp_path):
    trainer = make_trainer(tmp_path, good(8), eval_dataset=dirty(24), **SKIP)
    metrics = trainer.evaluate()
    assert metrics["eval_num_pairs"] == 24 - 7
    assert [row["number"] for row in listed(tmp_path)] == NUMBERS and listed(tmp_path)[0]["split"] == "eval"
    clean = make_trainer(tmp_path, good(8), eval_dataset=[row for i, row in enumerate(good(24)) if i not in NUMBERS])
    expected = clean.evaluate()
    same = [name for name in expected if "R@" in name or "loss" in name]
    assert {name: metrics[name] for name in same} == {name: expected[name] for name in same}
    assert "bad_examples" in trainer.train().metrics and len(listed(tmp_path)) == 7  # they stay in the list
    with pytest.raises(BadExampleError, match="example 2 of the eval data"):
        make_trainer(tmp_path, good(8), eval_dataset=dirty(24)).evaluate()
    nothing = [{"image": None, "caption": "a"}] * 3
    with pytest.raises(TooManyBadExamplesError, match="All 3 examples of the eval data are bad"):
        make_trainer(tmp_path, good(8), eval_dataset=nothing, **SKIP).evaluate()


def test_the_warm_start_reads_the_same_pairs(tmp_path):
    def run(folder, data, collator):
        trainer = make_trainer(tmp_path / folder, data, collator, options={"max_steps": 1}, eval_dataset=good(4),
                               retrieval_warm_start_steps=2, retrieval_warm_start_batch_size=8, **SKIP)  # fmt: skip
        trainer.train()
        return weights(trainer)

    refusing, plain = FromageDataCollator(make_processor()), FromageDataCollator(make_processor())
    refusing.processor.image_processor = Refusing(plain.processor.image_processor, number=4)
    stand_ins = reading(refusing, tmp_path / "stand_ins", dirty(24), seed=42)  # that of the run
    rows = [stand_ins[i] for i in range(24)]
    refusing.image_inputs(rows)
    clean = [{"image": row["image"], "caption": row["caption"]} for row in rows]
    assert all(map(torch.equal, run("dirty", dirty(24), refusing), run("clean", clean, plain)))
    assert [row["number"] for row in listed(tmp_path / "dirty")] == sorted([*NUMBERS, 4])


# ---- streams --------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_a_stream_gives_the_next_good_one(collator, tmp_path, kind):
    rows = examples(8)
    for i in (0, 3, 4, 7):
        rows[i]["caption"] = ""
    stream = Stream(rows) if kind == "torch" else Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    data = DirtyData(collator, arguments(tmp_path), skips=True, max_share=1.0)
    wrapped = data.reading(stream, "train")
    assert isinstance(wrapped, GoodStream) and isinstance(wrapped, StreamedDataset) == (kind == "datasets")
    numbers = [int(row["caption"].split()[1]) for row in wrapped]
    assert numbers == [1, 1, 2, 5, 5, 5, 6, 6]
    trainer = make_trainer(tmp_path, stream, collator, options={"max_steps": 2}, **SKIP)
    assert trainer.train().metrics["bad_examples"] == 4
    assert listed(tmp_path)[0]["place"] == "process 0, worker 0, example 0" and listed(tmp_path)[0]["number"] is None
    trainer = make_trainer(tmp_path, rows, collator, eval_dataset=Stream(rows), **SKIP)
    assert trainer.evaluate()["eval_num_pairs"] == 4
    with pytest.raises(TooManyBadExamplesError, match="All 3 examples of this stream"):
        list(data.reading(Stream([{"caption": ""}] * 3), "train"))


# ---- processes ------------------------------------------------------------------------------------------------------


def train_in_two(rank: int, folder: str, port: int):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    options = {"ddp_backend": "gloo", "num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 2}
    trainer = make_trainer(Path(folder, "out"), dirty(24), options=options, eval_dataset=dirty(21), **SKIP)
    trainer.train()
    stream = Dataset.from_list(examples(8)).to_iterable_dataset(num_shards=2)
    own = [row["caption"] for row in DataLoader(trainer._data.reading(stream, "train").shard(2, rank), batch_size=None)]
    told = ""
    try:
        trainer._data.reading(Stream(good(8)), "train")
    except ValueError as error:
        told = str(error)
    found = {
        "metrics": trainer._data.metrics(),
        "pairs": trainer.evaluate()["eval_num_pairs"],
        "own": own,
        "told": told,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_make_one_list(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(train_in_two, str(tmp_path), port)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [row["metrics"]["bad_examples"] for row in found] == [7, 7]
    assert found[0]["pairs"] == 14
    rows = listed(tmp_path / "out")
    assert [(row["split"], row["number"]) for row in rows] == [
        *(("eval", number) for number in NUMBERS),
        *(("train", number) for number in NUMBERS),
    ]
    assert sorted(found[0]["own"] + found[1]["own"]) == sorted(row["caption"] for row in examples(8))
    assert "each of them read all of it" in found[0]["told"]
