"""Epochs in a dataset's own order: what is seen, also after a kill in any epoch, with workers and in processes."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from torch.utils.data import BatchSampler, Dataset, RandomSampler, SequentialSampler
from transformers import TrainerState

from modeling_fromage import FromageTrainer
from modeling_fromage.trainer.epoch_order import EpochOrderSampler, SetEpochCallback
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.training_runs import arguments, examples


class Ordered(Dataset):
    """Examples whose epochs are turned round one step more each, and one of them comes twice."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]

    def epoch_order(self, seed, epoch):
        return np.append(np.roll(np.arange(len(self)), epoch + seed), 0)


def run(folder, monkeypatch, workers=0, steps=9, resume=None, saves=2, **options):
    """The captions of each batch that is trained on, and the trained parts."""
    rows, processor, seen = examples(11), make_processor(), []
    torch.manual_seed(0)
    model = make_model("opt_clip")
    args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=saves, seed=3,
                     dataloader_num_workers=workers, **options)  # fmt: skip
    trainer = FromageTrainer(model=model, args=args, train_dataset=Ordered(rows), processing_class=processor)
    step = trainer.training_step

    def training_step(model, inputs, *more, **kwargs):
        seen.append(inputs["pooled_image_features"][:, 0].tolist())
        return step(model, inputs, *more, **kwargs)

    monkeypatch.setattr(trainer, "training_step", training_step)
    trainer.train(resume_from_checkpoint=resume)
    return seen, {name: value.clone() for name, value in model.adapter.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_is_left_of_its_epoch(workers, tmp_path, monkeypatch):
    """Three batches an epoch: killed in epochs 0, 1 and 2, in the middle and at the end."""
    whole, weights = run(tmp_path / "whole", monkeypatch, workers)
    features = [row["pooled_image_features"][0] for row in examples(11)]
    for epoch in range(3):
        seen = [value for batch in whole[3 * epoch : 3 * epoch + 3] for value in batch]
        order = np.append(np.roll(np.arange(11), epoch + 3), 0)
        assert seen == pytest.approx([features[number] for number in order])
    for killed in (4, 6, 8) if workers == 0 else (8,):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{killed}")
        seen, found = run(tmp_path / "resumed", monkeypatch, workers, resume=checkpoint)
        assert seen == whole[killed:], killed
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_accumulated_batches_resume_too(tmp_path, monkeypatch):
    options = {"gradient_accumulation_steps": 2, "steps": 4, "saves": 3}
    whole, _ = run(tmp_path / "whole", monkeypatch, **options)
    seen, _ = run(tmp_path / "resumed", monkeypatch, resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert seen == whole[-len(seen) :] and 0 < len(seen) < len(whole)


@pytest.mark.parametrize("skipped", [0, 1])
def test_the_epoch_reaches_the_sampler_in_several_processes(skipped):
    """As the Trainer tells it, whatever accelerate has wrapped around: it is lost where batches are skipped."""
    dataset = Ordered(list(range(16)))
    shares = []
    for rank in range(2):
        batches = BatchSampler(EpochOrderSampler(dataset, seed=0), 4, drop_last=False)
        loader = DataLoaderShard(dataset, batch_sampler=BatchSamplerShard(batches, 2, rank))
        SetEpochCallback().on_epoch_begin(None, TrainerState(epoch=5.0 + skipped / 3), None, train_dataloader=loader)
        if skipped:
            loader = skip_first_batches(loader, skipped)
        loader.set_epoch(5)
        shares.append([batch.tolist() for batch in loader])
    order = np.append(np.roll(np.arange(16), 5), 0).tolist()
    together = [number for batches in zip(*shares, strict=True) for batch in batches for number in batch]
    assert together[: 17 - 8 * skipped] == order[8 * skipped :]


def test_other_samplers_are_the_trainers(tmp_path):
    rows, kwargs = examples(4), {"model": make_model("opt_clip"), "processing_class": make_processor()}
    plain = FromageTrainer(args=arguments(tmp_path), train_dataset=rows, **kwargs)
    assert isinstance(plain._get_train_sampler(), RandomSampler)
    args = arguments(tmp_path, train_sampling_strategy="sequential", data_seed=7)
    trainer = FromageTrainer(args=args, train_dataset=Ordered(rows), **kwargs)
    assert isinstance(trainer._get_train_sampler(), SequentialSampler)
    args.train_sampling_strategy = "random"
    assert trainer._get_train_sampler().seed == 7
