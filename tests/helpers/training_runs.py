"""Examples of cached features, and arguments of short runs on a CPU."""

import torch
from transformers import TrainingArguments


def examples(count: int) -> list[dict]:
    features = torch.rand(count, 24, generator=torch.Generator().manual_seed(5))
    captions = [f"number {i}" + " and so on" * (i % 4) for i in range(count)]
    return [{"pooled_image_features": row.tolist(), "caption": c} for row, c in zip(features, captions, strict=True)]


def arguments(folder, **options) -> TrainingArguments:
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "report_to": "none",
                "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "logging_steps": 1,
                "disable_tqdm": True}  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})
