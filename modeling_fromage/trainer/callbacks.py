"""The callback that keeps `[RET]`'s norm and bounds the contrastive scale, and what training refuses: arguments that
train something else, numbers that are not finite."""

from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..peft_layers_fromage import refuse_prompt_learning
from ..training_losses_fromage import LOSS_WEIGHTS

WHAT_TO_CHECK = (
    "Check the learning rate, the image features, and the dtype of the backbones: float16 overflows where bfloat16 and "
    "float32 do not."
)

# A gradient scaler starts at 2 ** 16 and halves at every step that it skips: here it has skipped 30.
SMALLEST_LOSS_SCALE = 2.0**-14

_SHARDING = (
    "it shards the few trained parameters, and modules that FROMAGe calls one by one. Leave it out, and give "
    "FromageTrainer `shard_backbones=True` (in a training file `shard_backbones: true`), which shards the frozen layers"
)

# Arguments that would train something other than the model's losses, or nothing: the value that is off, and why.
UNSUPPORTED_IN_TRAINING = {
    "label_smoothing_factor": (
        0.0,
        "it replaces the model's three losses by one cross-entropy of labels that are not shifted. Set it to 0; "
        "`captioning_label_smoothing` and `contrastive_label_smoothing` of FromageConfig smooth the labels of two",
    ),
    "neftune_noise_alpha": (
        None,
        "the frozen language model stays in eval mode, where NEFTune adds no noise. Leave it out; "
        "`image_feature_dropout` of FromageConfig regularises the images",
    ),
    "use_liger_kernel": (
        False,
        "Liger has no kernels for this model, which builds no whole logits anyway. Leave it out",
    ),
    "torch_compile": (
        False,
        "a step packs its texts by their lengths, so that nearly every batch would be compiled anew. Compile the "
        "frozen encoder: `model.vision_model.compile()`, or `compile_vision_model: true` of `training.train`",
    ),
    "fsdp": (None, _SHARDING),
    "deepspeed": (None, _SHARDING),
}
UNSUPPORTED_IN_EVALUATION = {
    "batch_eval_metrics": (
        False,
        "recall ranks the whole evaluation set, not a batch. Leave it out: embeddings are kept, never logits",
    ),
    "eval_do_concat_batches": (True, "recall ranks the whole evaluation set, not a batch. Leave it out"),
}


class NormalizeRetEmbeddingCallback(TrainerCallback):
    """After each optimiser step, rescale `[RET]` to the mean norm of the LM's other embeddings (authors' code),
    and cut the contrastive scale to `logit_scale_max`, if there is one.

    It also stops a plain `Trainer` from training something other than the model's losses, and from continuing with
    numbers that are not finite.

    Raises:
        ValueError: An argument would train something else, such as `label_smoothing_factor`.
        FloatingPointError: A gradient is NaN or infinite before the optimiser's step, or a trained parameter after it;
            names the step.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_arguments(args, UNSUPPORTED_IN_TRAINING)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_arguments(args, UNSUPPORTED_IN_TRAINING)  # again, for a callback that was added later
        refuse_prompt_learning(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # the gradient scaler skips such a step and tries a smaller scale
            return
        model: torch.nn.Module = kwargs["model"]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        refuse_non_finite(gradients, state, "was not taken, for gradients that are not finite:")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module = kwargs["model"]
        unwrapped: Any = getattr(model, "module", model)
        unwrapped.normalize_ret_embedding()
        unwrapped.adapter.clamp_logit_scale(unwrapped.config.logit_scale_max)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        refuse_non_finite(trained, state, "left numbers that are not finite:")


def refuse_non_finite(tensors: dict[str, torch.Tensor], state: TrainerState, what: str) -> None:
    """
    Raises:
        FloatingPointError: Names the `tensors` with a NaN or an infinity.
    """
    if not get_total_norm(tensors.values(), float("inf")).isfinite():  # synchronises with the device once
        names = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        raise FloatingPointError(f"Step {state.global_step + 1} {what} {', '.join(names)}. {WHAT_TO_CHECK}")


def refuse_unsound_step(step: int, loss: torch.Tensor, parts: dict[str, torch.Tensor], scaler: Any) -> None:
    """
    Args:
        parts (`dict`): The losses that `loss` is the sum of, and what else is logged of the batch.
        scaler (`torch.amp.GradScaler`, *optional*): Of the gradients in fp16.

    Raises:
        FloatingPointError: `loss` is not finite, or gradients have not been for many steps.
    """
    if not loss.isfinite().all():
        values = ", ".join(f"{name} {parts[name].item():g}" for name in LOSS_WEIGHTS if name in parts)
        raise FloatingPointError(
            f"Step {step} was not taken, for a loss of {loss.item():g} ({values}). {WHAT_TO_CHECK}"
        )
    if scaler is not None and scaler.get_scale() < SMALLEST_LOSS_SCALE:
        raise FloatingPointError(
            f"Step {step} was not taken: the gradients have not been finite for many steps, whatever the loss was "
            f"scaled by ({scaler.get_scale():g} by now). {WHAT_TO_CHECK}"
        )


def refuse_arguments(args: TrainingArguments, unsupported: dict[str, tuple[Any, str]]) -> None:
    """
    Raises:
        ValueError: One of `args` differs from its value in `unsupported`.
    """
    for name, (off, reason) in unsupported.items():
        value = getattr(args, name)
        if value != off:
            raise ValueError(f"`{name}={value}` does not work with FROMAGe: {reason}.")


def refuse_sharding_by_accelerate(has_fsdp: bool, has_deepspeed: bool) -> None:
    """Raise a `ValueError` where accelerate's configuration switches on what `fsdp` and `deepspeed` would."""
    if has_fsdp or has_deepspeed:
        name = "FSDP" if has_fsdp else "DeepSpeed"
        raise ValueError(f"{name}, in accelerate's configuration, does not work with FROMAGe: {_SHARDING}.")


__all__ = [
    "NormalizeRetEmbeddingCallback",
    "refuse_arguments",
    "refuse_non_finite",
    "refuse_sharding_by_accelerate",
    "refuse_unsound_step",
]
