"""Runs over streams that go on after a kill in any epoch: what they see, and the weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import TrainerState

from modeling_fromage import FromageTrainer
from modeling_fromage.trainer.stream_position import StreamPosition
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.distributed import in_two_processes
from tests.helpers.training_runs import arguments, examples


class Turning(IterableDataset):
    """A stream of torch whose epochs are turned round one step more each."""

    def __init__(self, rows):
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        start = self.epoch % len(self.rows)
        return iter(self.rows[start:] + self.rows[:start])


class Sized(Turning):
    def __len__(self):
        return len(self.rows)


def stream_of(kind: str, count: int = 11, is_dirty: bool = False) -> IterableDataset:
    rows = examples(count)
    if is_dirty:
        rows[4]["caption"] = rows[7]["caption"] = ""
    if kind == "datasets":
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=5)
    return {"torch": Turning, "sized": Sized}[kind](rows)


def run(folder, data, resume=None, **options):
    """The first features of each batch that is trained on, draws of the global generator, and the trained parts."""
    own = {name: options.pop(name) for name in ("on_bad_example", "max_bad_share") if name in options}
    torch.manual_seed(0)
    model = make_model("opt_clip")
    args = arguments(folder, **{"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch",
                                "seed": 3, **options})  # fmt: skip
    trainer = FromageTrainer(
        model, args, train_dataset=data, eval_dataset=examples(3), processing_class=make_processor(), **own
    )
    seen, step = [], trainer.training_step

    def training_step(model, inputs, *more, **kwargs):
        seen.append([*inputs["pooled_image_features"][:, 0].tolist(), torch.rand(()).item()])  # as dropout draws
        return step(model, inputs, *more, **kwargs)

    trainer.training_step = training_step
    trainer.train(resume_from_checkpoint=resume)
    trained = {name: value.clone() for name, value in trainer._unwrapped.adapter.state_dict().items()}
    return seen, trained, trainer.state.log_history


def resume_everywhere(folder, kind, killed, micro=1, count=11, **options):
    """A whole run, and one from each of its checkpoints `killed`: the same bit by bit. What the whole one has seen."""
    data = stream_of(kind, count, is_dirty="on_bad_example" in options)
    whole, weights, log = run(Path(folder, "whole"), data, **options)
    for steps in killed:
        checkpoint = str(Path(folder, "whole", f"checkpoint-{steps}"))
        data = stream_of(kind, count, is_dirty="on_bad_example" in options)
        seen, found, resumed_log = run(Path(folder, "resumed"), data, checkpoint, **options)
        assert seen == whole[micro * steps :], steps
        assert all(torch.equal(found[name], weights[name]) for name in weights), steps
        for name in ("epoch", "loss", "eval_loss") if os.environ.get("RANK", "0") == "0" else ():  # a log is its
            assert [row[name] for row in resumed_log if name in row] == [row[name] for row in log if name in row], steps
    return whole


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_resumed_run_sees_what_is_left_of_its_epoch(tmp_path, kind):
    """Three batches an epoch: killed in epochs 0, 1 and 2, in the middle and at the end."""
    whole = resume_everywhere(tmp_path, kind, (2, 3, 7))
    epochs = [[value for batch in whole[3 * e : 3 * e + 3] for value in batch[:-1]] for e in range(3)]
    features = [row["pooled_image_features"][0] for row in examples(11)]
    assert all(sorted(epoch) == pytest.approx(sorted(features)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("is_persistent", [False, True])
def test_workers_resume_too(tmp_path, is_persistent):
    """Each of two workers has two of the four shards: four batches an epoch, two of them smaller."""
    options = {"dataloader_persistent_workers": is_persistent, "eval_strategy": "no" if is_persistent else "epoch"}
    killed = (6,) if is_persistent else (4, 6)
    resume_everywhere(tmp_path, "datasets", killed, dataloader_num_workers=2, **options)


def test_streams_with_errors_resume_too(tmp_path):
    resume_everywhere(tmp_path, "datasets", (5,), dataloader_num_workers=2, on_bad_example="skip", max_bad_share=1.0)


def test_epochs_by_length(tmp_path):
    """The Trainer counts these; what is skipped keeps the length."""
    options = {"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "no", "on_bad_example": "skip"}
    assert len(resume_everywhere(tmp_path, "sized", (3, 5), max_bad_share=1.0, **options)) == 9


def test_accumulated_batches_resume_too(tmp_path):
    """Of three batches an epoch, two make a step, and the third is left out."""
    whole = resume_everywhere(tmp_path, "torch", (2, 3), micro=2, max_steps=4, gradient_accumulation_steps=2)
    assert len(whole) == 8 and all(len(batch) == 5 for batch in whole)


def test_checkpoints_at_the_end_of_epochs(tmp_path):
    resume_everywhere(tmp_path, "datasets", (3, 6), save_strategy="epoch")


def test_a_run_that_stops_at_the_end_of_an_epoch_is_made_longer(tmp_path):
    whole, *_ = run(tmp_path / "whole", stream_of("torch"), lr_scheduler_type="constant")
    for steps in (3, 6):
        options = {"lr_scheduler_type": "constant", "save_strategy": "epoch"}
        folder = tmp_path / str(steps)
        seen, *_ = run(folder, stream_of("torch"), max_steps=steps, **options)
        rest, *_ = run(folder, stream_of("torch"), str(folder / f"checkpoint-{steps}"), **options)
        assert seen + rest == whole


def in_two(rank: int, folder: str):
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "max_steps": 8, "eval_strategy": "no",
               "on_bad_example": "skip", "max_bad_share": 1.0}  # fmt: skip
    resume_everywhere(folder, "datasets", (6,), count=9, **options)
    state = TrainerState.load_from_json(str(Path(folder, "whole", "checkpoint-6", "trainer_state.json")))
    Path(folder, f"{rank}.json").write_text(json.dumps(state.stateful_callbacks["stream_position"]["positions"]))


def test_two_processes_resume_where_each_was(tmp_path):
    """Of four shards of 9 examples, one process has five and the other four: three batches of an epoch, and two."""
    in_two_processes(in_two, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[[1, 3], [2, 2]]] * 2
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    told = "of 2 processes with 0 workers each, but 1 with 0 resume.*`ignore_data_skip=True`"
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "one", stream_of("datasets"), checkpoint)
    seen, *_ = run(tmp_path / "one", stream_of("datasets"), checkpoint, max_steps=8, ignore_data_skip=True)
    first, *_ = run(tmp_path / "new", stream_of("datasets"), max_steps=2, save_strategy="no")
    assert [row[:-1] for row in seen] == [row[:-1] for row in first]


def test_a_checkpoint_without_a_position(tmp_path):
    """That of the plain Trainer is right within the first epoch."""
    position, args = StreamPosition(), arguments(tmp_path)
    position.count(DataLoaderShard(stream_of("torch")))
    assert position.start((0, 4), TrainerState(epoch=0.4, global_step=4), args) == (0, 4)
    with pytest.raises(ValueError, match="positions in the stream of 0 processes"):
        position.start((0, 4), TrainerState(epoch=1.4, global_step=4), args)


def test_workers_that_would_stay_in_their_first_epoch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not reached by Turning.set_epoch.*`dataloader_persistent_workers`"):
        run(tmp_path, stream_of("torch"), dataloader_num_workers=1, dataloader_persistent_workers=True)
