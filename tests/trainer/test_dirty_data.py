"""Runs on data with errors in it: the list, when a run stops, evaluations, the warm start, streams, two processes."""

import io
import json
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from datasets import IterableDataset as StreamedDataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from modeling_fromage import FromageDataCollator
from modeling_fromage.trainer.bad_examples import BadExampleError, TooManyBadExamplesError
from modeling_fromage.trainer.dirty_data import DirtyData
from modeling_fromage.trainer.good_streams import GoodStream
from modeling_fromage.trainer.row_contents import contents_of
from tests.helpers.backbones import make_processor
from tests.helpers.dirty_data import (
    NUMBERS,
    SKIP,
    Refusing,
    captions_of,
    dirty,
    good,
    listed,
    make_trainer,
    picture,
    png,
    reading,
)
from tests.helpers.distributed import in_two_processes
from tests.helpers.hub import uploaded
from tests.helpers.training_runs import arguments, examples


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]


# ---- runs -----------------------------------------------------------------------------------------------------------


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
    assert " 1 " in told and str(tmp_path / "_bad_examples.jsonl") in told
    for row in listed(tmp_path):
        assert row["reason"] in told and (row["place"] or f"example {row['number']}") in told


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


class Hub:
    """Takes the calls of `HfApi`."""

    uploads: ClassVar[list[set[str]]] = []

    def upload_folder(self, folder_path, ignore_patterns, **kwargs):
        self.uploads.append(uploaded(folder_path, ignore_patterns))


def test_the_list_is_never_pushed(tmp_path, monkeypatch):
    """Nor what a killed run has noted: both may name files of this machine."""
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make_trainer(tmp_path, dirty(24), options={"num_train_epochs": 1, "max_steps": -1}, **SKIP)
    monkeypatch.setattr(trainer, "_refuse_local_backbones", lambda: None)
    trainer.hub_model_id, trainer.push_in_progress = "org/run", None
    trainer.train()
    (tmp_path / "_bad_examples").mkdir()
    (tmp_path / "_bad_examples" / "00000-77.jsonl").write_text("{}")
    trainer.push_to_hub()
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert len(listed(tmp_path)) == 7 and len(Hub.uploads) == 2
    for names in Hub.uploads:
        assert "config.json" in names and not any("bad_examples" in name for name in names)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_stream_lists_each_bad_example_once(collator, tmp_path, workers):
    """Wherever later epochs come across it; of two that are equal, both."""
    rows = examples(12)
    for i, caption in ((0, ""), (4, "a [RET]"), (5, "a [RET]"), (6, " "), (9, "")):
        rows[i]["caption"] = caption
    rows[5] |= rows[4]
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=2, buffer_size=6)
    options = {"max_steps": 9, "dataloader_num_workers": workers, "save_strategy": "steps", "save_steps": 5}
    places = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        trainer = make_trainer(tmp_path, stream, collator, options=options, **SKIP)
        assert trainer.train(resume_from_checkpoint=resume).metrics["bad_examples"] == 5
        places.append([row["place"] for row in listed(tmp_path)])
    assert places[0] == places[1] and sorted(row["copy"] for row in listed(tmp_path)) == [1, 1, 1, 1, 2]


def test_a_stream_whose_pictures_share_a_file(collator, tmp_path):
    """A file with two captions that are bad stands twice."""
    rows = [{"image": {"bytes": png(0), "path": "0.png"}, "caption": caption} for caption in ("a", "", " ", "b")]
    make_trainer(tmp_path, Stream(rows), collator, options={"max_steps": 2}, **SKIP).train()
    assert [(row["place"], row["detail"]) for row in listed(tmp_path)] == [("0.png", "''"), ("0.png", "' '")]


@pytest.mark.parametrize(
    "value",
    [
        picture(1),
        torch.arange(6).view(2, 3).bfloat16(),
        np.arange(6, dtype=np.int8),
        np.array(["a", None], dtype=object),
        {"b": [1.5, "\ud800"], "a": (b"x", None)},
    ],
)
def test_contents_of_an_example(value):
    copied = pickle.loads(pickle.dumps(value))
    assert contents_of({"image": value}) == contents_of({"image": copied})
    others = [picture(2), torch.arange(6).view(3, 2).bfloat16(), np.arange(6, dtype=np.uint8), {"a": 1}, object()]
    assert contents_of({"image": value}) not in [contents_of({"image": other}) for other in others]


def test_contents_that_cannot_be_seen():
    """Of an object whose `repr` is its address, and of a picture that is cut off."""
    assert contents_of(object()) == contents_of(object()) != contents_of(None)
    cut = [PIL.Image.open(io.BytesIO(png(1)[:60])) for _ in range(2)]
    assert contents_of(cut[0]) == contents_of(cut[1]) != contents_of(picture(1))


def test_a_stream_of_pictures_that_decode_themselves(collator, tmp_path):
    """The one that is broken is noted; and such a stream reaches workers that are spawned."""
    rows = [{"image": {"bytes": png(i), "path": None}, "caption": f"number {i}"} for i in range(4)]
    rows[1]["image"]["bytes"] = b"no picture"
    features = Features({"image": Image(), "caption": Value("string")})
    stream = Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=2)
    trainer = make_trainer(tmp_path, stream, collator, **SKIP)
    wrapped = pickle.loads(pickle.dumps(trainer.dirty_data.reading(stream, "train")))
    assert captions_of(wrapped) == ["number 0", "number 2", "number 2", "number 3"]


# ---- processes ------------------------------------------------------------------------------------------------------


def train_in_two(rank: int, folder: str):
    options = {"ddp_backend": "gloo", "num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 2}
    trainer = make_trainer(Path(folder, "out"), dirty(24), options=options, eval_dataset=dirty(21), **SKIP)
    trainer.train()
    stream = Dataset.from_list(examples(8)).to_iterable_dataset(num_shards=2)
    own = [
        row["caption"]
        for row in DataLoader(trainer.dirty_data.reading(stream, "train").shard(2, rank), batch_size=None)
    ]
    told = ""
    try:
        trainer.dirty_data.reading(Stream(good(8)), "train")
    except ValueError as error:
        told = str(error)
    found = {
        "metrics": trainer.dirty_data.metrics(),
        "pairs": trainer.evaluate()["eval_num_pairs"],
        "own": own,
        "told": told,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_make_one_list(tmp_path):
    in_two_processes(train_in_two, str(tmp_path))
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
