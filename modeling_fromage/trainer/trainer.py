"""Training with the HF Trainer: the `[RET]` norm callback, what a run logs, recall in evaluation."""

import logging
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import (
    EvalLoopOutput,
    HubStrategy,
    SaveStrategy,
    TrainOutput,
)

from ..processing_fromage import FromageProcessor
from .averaging import AveragingTrainer, WeightAverage
from .callbacks import (
    UNSUPPORTED_IN_EVALUATION,
    UNSUPPORTED_IN_TRAINING,
    NormalizeRetEmbeddingCallback,
    refuse_arguments,
    refuse_sharding_by_accelerate,
    refuse_unsound_step,
)
from .checkpoints import last_complete_checkpoint, restore_trained, where_to_resume
from .data_collator import FromageDataCollator
from .dirty_data import DirtyData
from .epoch_order import SetEpochCallback, epoch_order_sampler
from .evaluation import evaluating, kept_of, mean_losses_and_recall
from .heartbeat import watched_processes
from .monitoring import TrainingMonitor
from .options import TrainerOptions, set_learning_rates
from .rank_batches import share_last_batch
from .run_card import write_model_card
from .samples import EvaluationSamples
from .sharding import data_parallel, gathered, is_sharded, shard_for
from .stream_position import StreamPosition

logger = logging.getLogger(__name__)


class FromageTrainer(AveragingTrainer):
    """The HF Trainer with [`NormalizeRetEmbeddingCallback`], the three losses in the log, and recall in both directions
    over the whole evaluation set, as `eval_text_to_image_R@1`, ..., next to `eval_num_pairs`.

    It sets `remove_unused_columns=False`, since the collator reads the raw columns, and
    `accelerator_config={"dispatch_batches": False}`, so that each process collates its own batches of a streamed data
    set: a batch of concatenated captions has fewer captioning rows than images and cannot be cut.

    A run's checkpoints hold the trained parts and the optimiser's state. They name the backbones by Hub id and commit,
    else by absolute path; on another machine `from_pretrained(checkpoint, text_model_id=..., vision_model_id=...)`
    loads them, and `train(resume_from_checkpoint=...)` continues with a model assembled there. A backbone whose weights
    have changed is saved whole. The plain Trainer's checkpoints are those of `save_pretrained`: they also hold
    backbones that are on no Hub and lie more than two folders up.

    Args:
        model ([`FromageForConditionalGeneration`]): The model, or one that PEFT wraps.
        args ([`TrainingArguments`], *optional*): As in transformers.
        data_collator ([`FromageDataCollator`], *optional*): Defaults to one of `processing_class`.
        more, kwargs: As in transformers: `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...; and the
            fields of [`TrainerOptions`]: `retrieval_warm_start_steps`, `learning_rates`, `on_bad_example`, ...

    Raises:
        ValueError: An argument would train something other than the model's losses (`label_smoothing_factor`,
            `compute_loss_func`, ...); there is neither a collator nor a [`FromageProcessor`] to make one of; or the
            collator's processor has other token ids than the model, or another caption format than `processing_class`,
            which is saved. In `train`: checkpoints that are to be pushed during the run name folders of this machine,
            or would leave out what PEFT trains.
        FloatingPointError: A loss, gradient or trained parameter is NaN or infinite; names the step.

    Example:

        args = TrainingArguments("outputs", per_device_train_batch_size=32, max_steps=500)
        trainer = FromageTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=processor)
        trainer.train(resume_from_checkpoint=True)
        trainer.evaluate()["eval_text_to_image_R@1"]
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *more: Any,
        **kwargs: Any,
    ):
        self.options = TrainerOptions(
            **{known.name: kwargs.pop(known.name) for known in fields(TrainerOptions) if known.name in kwargs}
        )
        args = TrainingArguments("tmp_trainer") if args is None else args
        refuse_arguments(args, UNSUPPORTED_IN_TRAINING | UNSUPPORTED_IN_EVALUATION)
        accelerator_config = cast(AcceleratorConfig, args.accelerator_config)  # TrainingArguments makes it one
        if accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches=True` cuts every tensor of a batch alike, but a batch of concatenated captions has "
                "fewer captioning rows than images. Leave it out."
            )
        accelerator_config.dispatch_batches = False
        args.remove_unused_columns = False
        if self.options.shard_backbones:
            shard_for(args, model)
        super().__init__(model, args, data_collator, *more, **kwargs)
        refuse_sharding_by_accelerate(self.is_fsdp_enabled, self.is_deepspeed_enabled)
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` would replace the model's three losses. Weight them in FromageConfig "
                "(`captioning_loss_weight`, ...), or override `compute_loss` in a subclass."
            )
        if data_collator is None:
            self.data_collator = _default_collator(self.processing_class, args.seed)
        processor, config = getattr(self.data_collator, "processor", None), getattr(self.model, "config", None)
        if processor is not None and config is not None:
            processor.check_config(config)
        if isinstance(self.data_collator, FromageDataCollator) and isinstance(self.processing_class, FromageProcessor):
            self.data_collator.check_format(self.processing_class)
        self.dirty_data = DirtyData(
            self.data_collator, args, self.options.on_bad_example == "skip", self.options.max_bad_share
        )
        self.data_names: dict[str, Any] = {}  # for the model card: see `CardFacts`
        self.monitor, self.stream_position = TrainingMonitor(), StreamPosition()
        self.samples = EvaluationSamples(self.options.eval_samples, self.data_collator, self.callback_handler.callbacks)
        self.average = WeightAverage(self.options.ema_decay)
        own = (NormalizeRetEmbeddingCallback(), SetEpochCallback(), self.stream_position, self.monitor, self.samples)
        for callback in (*own, self.average):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers. With `resume_from_checkpoint=True` training continues after the last complete checkpoint,
        or starts from the beginning where there is none, so that a run that may be killed needs only one command."""
        resumes, resume_from_checkpoint = where_to_resume(resume_from_checkpoint, self.args.output_dir or "")
        # A run whose checkpoints could not be saved or pushed is refused before its first step.
        is_bare = isinstance(self._unwrapped, PreTrainedModel)  # and not in a PeftModel
        if self.args.save_strategy != SaveStrategy.NO and is_bare:
            self._unwrapped.refuse_unsaved_peft()
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:  # pushes during the run
            self._refuse_local_backbones()
        with watched_processes(self.args), self.dirty_data.run(keep=bool(resume_from_checkpoint)):
            if self.options.retrieval_warm_start_steps and not resume_from_checkpoint:
                self._train_retrieval(resumes)
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        output.metrics.update(self.dirty_data.metrics())
        return output

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        split = "train" if kwargs.get("is_training") else kwargs.get("dataloader_key") or description.lower()
        return super()._get_dataloader(self.dirty_data.reading(dataset, split), description, *args, **kwargs)

    def _train_retrieval(self, resume: bool) -> None:
        """The warm start, from its last checkpoint with `resume`. Its metrics are `warm_start_metrics` afterwards."""
        checkpoint = last_complete_checkpoint(self.options.folder(self.args)) if resume else None
        model, collator = cast(Any, self.model), cast(Any, self.data_collator)
        train = self.dirty_data.reading(self.train_dataset, "train")
        held_out = self.dirty_data.reading_evaluation(self.eval_dataset)
        self.warm_start_metrics = self.options.run(model, collator, self.args, train, held_out, checkpoint)
        self.options.warn_where_undone(self.args.learning_rate, self.options.learning_rates or {})

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        given = self.dirty_data.as_given(dataset)
        return epoch_order_sampler(dataset, self.args) or super()._get_train_sampler(given)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return super()._get_eval_sampler(self.dirty_data.as_given(eval_dataset))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in the Trainer, with the rates of `learning_rates` in parameter groups of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            set_learning_rates(optimizer, self._unwrapped, self.options.learning_rates or {})
        return optimizer

    @property
    def _unwrapped(self) -> Any:  # the model, a PeftModel around it, or another module
        return self.accelerator.unwrap_model(self.model)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: DataLoader | None = None) -> torch.nn.Module:
        if training and model is self.model and is_sharded(model):
            return data_parallel(cast(torch.nn.Module, model), self.accelerator)
        return super()._wrap_model(model, training, dataloader)

    def get_train_dataloader(self) -> DataLoader:
        """As in the Trainer; the last, smaller batch of an epoch is shared out rather than filled up."""
        return self.stream_position.count(share_last_batch(super().get_train_dataloader()))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.stream_position.start(super()._init_training_state(*args, **kwargs), self.state, self.args)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in the Trainer: all processes call it."""
        with gathered(self._unwrapped):
            super().save_model(*args, **kwargs)

    def _refuse_local_backbones(self) -> None:
        if hasattr(self._unwrapped, "refuse_local_backbones"):
            self._unwrapped.refuse_local_backbones(compare_weights=not is_sharded(self._unwrapped))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, but backbones are named, if need be by a path of this machine, rather than copied."""
        self.dirty_data.save()
        self.stream_position.save(self.state, self.args)
        unwrapped = self._unwrapped
        with unwrapped.absolute_paths() if hasattr(unwrapped, "absolute_paths") else nullcontext():
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not restore_trained(self._unwrapped, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not restore_trained(self._unwrapped, self.state.best_model_checkpoint):
            super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The model card of `fromage push`, with what this run has measured; `data_names` tells its data sets."""
        names = {name: value for name, value in kwargs.items() if name in ("license", "model_name")}
        if self.is_world_process_zero() and isinstance(self.processing_class, FromageProcessor):
            write_model_card(self, self._unwrapped, self.data_names, **names)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_local_backbones()
        return super().push_to_hub(*args, **kwargs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training:
            self.monitor.take(outputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        refuse_unsound_step(self.state.global_step + 1, loss, self.monitor.parts, self.accelerator.scaler)
        self.monitor.add(1 / self.current_gradient_accumulation_steps)
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        batches, *count = super().get_batch_samples(self.monitor.watch(epoch_iterator), num_batches, *args, **kwargs)
        return self.stream_position.take(batches, num_batches), *count

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = self.dirty_data.logged({**logs, **self.monitor.means(self.accelerator, self._unwrapped)})
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in the Trainer, with the mean of each loss and the recall among all pairs.

        Raises:
            ValueError: Several processes share a streamed data set: none of them knows which examples fill up the last
                batch, so these would count twice.
        """
        if isinstance(dataloader.dataset, IterableDataset) and self.args.world_size > 1:
            raise ValueError(
                f"{description} on a streamed data set in {self.args.world_size} processes would count examples twice. "
                "Give a data set with a length, or evaluate in one process."
            )
        if self.args.world_size == 1:  # else the last batch is cut to a row an example, and documents have more
            self.gather_function = self.accelerator.gather
        with evaluating(self.data_collator):
            output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        self.samples.embeds = values = dict(zip(self._output_names, output.predictions, strict=True))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in mean_losses_and_recall(values).items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        if "ret_targets" in inputs and self.args.world_size > 1:
            raise ValueError("Documents have several images each: evaluate on them in one process.")
        inputs = {**self._prepare_inputs(inputs), "return_logits": False}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        kept, count = kept_of(outputs), len(inputs["input_ids"])
        self._output_names = list(kept)
        repeated = tuple(p.repeat(count) if p.dim() == 0 else p for p in kept.values())  # a loss counts once a row
        return loss.detach(), repeated, inputs.get("labels")


def _default_collator(processor: Any, seed: int) -> FromageDataCollator:
    if not isinstance(processor, FromageProcessor):
        raise ValueError(
            f"Without a `data_collator`, `processing_class` must be a FromageProcessor, got "
            f"{type(processor).__name__}. Give `data_collator=FromageDataCollator(processor)` or "
            "`processing_class=processor`."
        )
    return FromageDataCollator(processor, seed=seed)


__all__ = ["FromageTrainer"]
