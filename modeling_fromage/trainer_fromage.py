"""Training with the HF Trainer: the `[RET]` norm callback, separate losses in the log, recall in evaluation."""

import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .ranking_fromage import gallery_ranks, recall_at_k

logger = logging.getLogger(__name__)

LOSS_PARTS = ("captioning_loss", "ret_token_loss", "contrastive_loss")


class NormalizeRetEmbeddingCallback(TrainerCallback):
    """After each optimiser step, rescale `[RET]` to the mean norm of the LM's other embeddings (authors' code)."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs: Any):
        unwrapped = getattr(model, "module", model)
        unwrapped.normalize_ret_embedding()


class FromageTrainer(Trainer):
    """The HF Trainer with [`NormalizeRetEmbeddingCallback`], the three losses in the log, and recall over the whole
    evaluation set, both directions, as `eval_text_to_image_R@1`, ..., beside their number of pairs.

    `train(resume_from_checkpoint=True)` passes over a checkpoint that was being written when the run was killed.

    Raises:
        ValueError: The collator's processor has other token ids than the model.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        processor, config = getattr(self.data_collator, "processor", None), getattr(self.model, "config", None)
        if processor is not None and config is not None:
            processor.check_config(config)
        self.add_callback(NormalizeRetEmbeddingCallback())
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any):
        unwrapped = self.accelerator.unwrap_model(self.model)
        if hasattr(unwrapped, "refuse_local_backbones"):
            unwrapped.refuse_local_backbones()
        return super().push_to_hub(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs: Any):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            for name in LOSS_PARTS:
                if outputs.get(name) is not None:
                    self._parts[name].append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any):
        if "loss" in logs and self._parts:
            means = {name: torch.stack(values).mean().item() for name, values in self._parts.items()}
            logs = {**logs, **{name: round(value, 4) for name, value in means.items()}}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As the Trainer's, with each loss part's mean and the recall among all N pairs."""
        collator = self.data_collator
        was_training = getattr(collator, "training", None)
        if was_training is not None:
            collator.training = False  # no concatenated captions
        try:
            output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        finally:
            if was_training is not None:
                collator.training = was_training
        names = [name for name in (*LOSS_PARTS, "image_embeds", "text_embeds") if name in self._output_names]
        values = dict(zip(names, output.predictions, strict=True))
        for name in LOSS_PARTS:
            if name in values:
                output.metrics[f"{metric_key_prefix}_{name}"] = float(torch.as_tensor(values[name]).float().mean())
        if "image_embeds" in values:
            output.metrics.update(self._recall(values, metric_key_prefix))
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = {**self._prepare_inputs(inputs), "return_logits": False}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        names = (*LOSS_PARTS, "image_embeds", "text_embeds")
        self._output_names = [name for name in names if outputs.get(name) is not None]
        count = len(inputs["input_ids"])
        predictions = [outputs[name].detach() for name in self._output_names]
        predictions = tuple(p.repeat(count) if p.dim() == 0 else p for p in predictions)  # a loss counts once a row
        return loss.detach(), predictions, inputs.get("labels")

    @staticmethod
    def _recall(values: dict[str, Any], prefix: str) -> dict[str, float]:
        images = torch.as_tensor(values["image_embeds"]).float()
        texts = torch.as_tensor(values["text_embeds"]).float()
        metrics: dict[str, float] = {f"{prefix}_num_pairs": len(images)}
        for direction, pair in (("text_to_image", (texts, images)), ("image_to_text", (images, texts))):
            recall = recall_at_k(gallery_ranks(*pair))
            metrics.update({f"{prefix}_{direction}_{name}": value for name, value in recall.items()})
        return metrics


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str:
    """The newest checkpoint of a run with a whole `trainer_state.json`, the last file that the Trainer writes into one.

    Raises:
        ValueError: There is none.
    """
    checkpoints = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and passed over.", path)
        else:
            return str(path)
    raise ValueError(f"{output_dir} has no complete checkpoint to resume from. Train without resume_from_checkpoint.")


__all__ = ["FromageTrainer", "NormalizeRetEmbeddingCallback"]
