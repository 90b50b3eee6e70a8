"""Training with the HF Trainer: the `[RET]` norm callback, separate losses in the log, recall in evaluation."""

from collections import defaultdict
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .retrieval_fromage import recall_at_k

LOSS_PARTS = ("captioning_loss", "ret_token_loss", "contrastive_loss")


class NormalizeRetEmbeddingCallback(TrainerCallback):
    """After each optimiser step, rescale `[RET]` to the mean norm of the LM's other embeddings (authors' code)."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs: Any):
        unwrapped = getattr(model, "module", model)
        unwrapped.normalize_ret_embedding()


class FromageTrainer(Trainer):
    """The HF Trainer with [`NormalizeRetEmbeddingCallback`], the three losses in the log, and recall over the whole
    evaluation set, both directions, as `eval_text_to_image_R@1`, ..., beside their number of pairs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(NormalizeRetEmbeddingCallback())
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

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
        inputs = self._prepare_inputs(inputs)
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
        similarity = texts @ images.t()  # (N, N)
        metrics: dict[str, float] = {f"{prefix}_num_pairs": len(images)}
        for direction, scores in (("text_to_image", similarity), ("image_to_text", similarity.t())):
            metrics.update({f"{prefix}_{direction}_{name}": value for name, value in recall_at_k(scores).items()})
        return metrics


__all__ = ["FromageTrainer", "NormalizeRetEmbeddingCallback"]
