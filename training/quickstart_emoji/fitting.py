"""The quickstart's training, for as many steps as its minutes allow."""

import time

import torch
from datasets import Dataset

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageTrainer

from ..arguments import RunArguments


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else fp32: emulated bfloat16 is tens of times slower."""
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def steps_that_fit(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    dataset: Dataset,
    batch_size: int,
    seconds: float,
) -> int:
    """How many training steps fit in `seconds`, from the time of one. The learning-rate schedule needs the number."""
    batch = collator(list(dataset.shuffle(seed=0).select(range(min(batch_size, len(dataset))))))
    model.train()
    for _ in range(3):  # the first one warms up
        start = time.monotonic()
        model(**batch).loss.backward()
        elapsed = time.monotonic() - start
    model.zero_grad()
    return max(1, int(seconds / elapsed))


def fit(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    args: RunArguments,
    dataset: Dataset,
    seconds: float,
) -> FromageTrainer:
    """Retrieval first, then joint training for about `seconds`, `args.max_steps` at most.

    Returns:
        The trainer, its model in eval mode.
    """
    steps = steps_that_fit(model, collator, dataset, args.per_device_train_batch_size, seconds)
    args.max_steps = min(args.max_steps, steps)
    trainer = FromageTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collator, **args.trainer_options()
    )
    trainer.train()
    model.eval()
    return trainer
