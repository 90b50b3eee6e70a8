"""Retrieval first: the two projections of the shared space are trained on cached vectors before anything else is.

While `[RET]` is fixed, a frozen language model's hidden states at `[RET]` are constants, as a frozen encoder's features
are. The contrastive loss is then one of two linear maps, and takes batches of hundreds or thousands of pairs in
milliseconds; neither backbone runs. Axes: N pairs, W the encoder's width.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, SchedulerType, Trainer, TrainerCallback, TrainingArguments

from ..modeling_fromage import FromageForConditionalGeneration
from ..training_losses_fromage import matching_loss
from .data_collator import FromageDataCollator
from .pair_states import PairStates, Statistics, TooFewPairsError, read_pairs
from .ranking import recall_in_both_directions

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RetrievalWarmStart:
    """Options of [`FromageTrainer`] for training the two retrieval projections first, on cached vectors."""

    retrieval_warm_start_steps: int = field(
        default=0, metadata={"help": "Steps of contrastive training on cached vectors before joint training; 0: none."}
    )
    retrieval_warm_start_batch_size: int = field(default=512, metadata={"help": "Pairs of such a step, per process."})
    retrieval_warm_start_learning_rate: float = field(default=2e-3, metadata={"help": "Its peak; a cosine to 0."})
    retrieval_warm_start_dropout: float = field(default=0.5, metadata={"help": "Dropout of the image features."})
    retrieval_warm_start_standardize: bool = field(
        default=True,
        metadata={"help": "Centre and scale each input, folded into the projections afterwards; these start anew."},
    )
    ret_state_cache: str | None = field(
        default=None, metadata={"help": "Folder for the states of [RET]; by default ret_states in output_dir."}
    )

    def __post_init__(self) -> None:
        if self.retrieval_warm_start_steps < 0 or self.retrieval_warm_start_batch_size < 2:
            raise ValueError(
                "`retrieval_warm_start_steps` must be at least 0 and `retrieval_warm_start_batch_size` at least 2, got "
                f"{self.retrieval_warm_start_steps} and {self.retrieval_warm_start_batch_size}."
            )
        if not 0 <= self.retrieval_warm_start_dropout < 1:
            raise ValueError(
                f"`retrieval_warm_start_dropout` must be in [0, 1), got {self.retrieval_warm_start_dropout}."
            )

    def run(
        self,
        model: FromageForConditionalGeneration,
        collator: FromageDataCollator,
        args: TrainingArguments,
        train_dataset: Any,
        eval_dataset: Any,
        resume_from_checkpoint: str | None,
    ) -> dict[str, float]:
        """Cache the states of `[RET]`, train the projections on them, and put them into `model`.

        Args:
            args (`TrainingArguments`): Of the joint training. Checkpoints and logs go to `retrieval_warm_start` in its
                `output_dir`.
            resume_from_checkpoint (`str`, *optional*): One of these checkpoints.

        Returns:
            The metrics: loss and seconds, and of an evaluation set the recall.

        Raises:
            ValueError: The states are no constants (LoRA, an unfrozen language model), or there is no list of pairs.
        """
        check_warm_start(model, args, train_dataset)
        if not isinstance(collator, FromageDataCollator):
            raise ValueError(
                f"The warm start lays texts out with a FromageDataCollator, got {type(collator).__name__}. Leave "
                "`retrieval_warm_start_steps` out, or give one."
            )
        model.normalize_ret_embedding()  # as after each step of joint training
        directory = Path(self.ret_state_cache or Path(args.output_dir or "", "ret_states"))
        pairs = read_pairs(model, collator, train_dataset, directory / "train", args.seed)
        held_out = _held_out(model, collator, eval_dataset, directory)
        widths = [linear.in_features for linear in CachedRetrieval.projections(model.adapter)]
        statistics = pairs.statistics(widths) if self.retrieval_warm_start_standardize else None
        module = CachedRetrieval(model, statistics, self.retrieval_warm_start_dropout)
        trainer = _CachedTrainer(
            module,
            self._arguments(args, len(pairs), bool(held_out)),
            data_collator=_as_it_is,
            train_dataset=pairs,
            eval_dataset=held_out.get("", held_out or None),
            compute_metrics=_recall,
            callbacks=[_ClampLogitScale()],
        )
        metrics = trainer.train(resume_from_checkpoint).metrics
        if held_out:
            metrics |= trainer.evaluate()
        trainer.save_state()
        module.fold_into(model)
        logger.info("Retrieval warm start: %s", metrics)
        return metrics

    @staticmethod
    def warn_where_undone(rate: float, rates: Mapping[str, float]) -> None:
        """Warn of joint training that moves what the warm start has trained, or trained for, as fast as the rest."""
        if moved := sorted({"visual_projection", "text_projection", "ret_embedding"} - rates.keys()):
            logger.warning(
                "Joint training now moves %s at a rate of %g, which may undo the warm start. Give them small rates: "
                "`learning_rates={'%s': 1e-5, ...}`.",
                " and ".join(moved),
                rate,
                moved[0],
            )

    def folder(self, args: TrainingArguments) -> Path:
        """Where checkpoints and logs go."""
        return Path(args.output_dir or "", "retrieval_warm_start")

    def _arguments(self, args: TrainingArguments, count: int, evaluates: bool) -> TrainingArguments:
        own = copy.copy(args)
        changed = {
            "output_dir": str(self.folder(args)),
            "max_steps": self.retrieval_warm_start_steps,
            "learning_rate": self.retrieval_warm_start_learning_rate,
            "lr_scheduler_type": SchedulerType.COSINE,
            "warmup_steps": min(20, self.retrieval_warm_start_steps // 5),
            "per_device_train_batch_size": min(self.retrieval_warm_start_batch_size, max(1, count // args.world_size)),
            "gradient_accumulation_steps": 1,
            "dataloader_drop_last": True,
            "dataloader_num_workers": 0,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "report_to": [],
            "eval_strategy": args.eval_strategy if evaluates else "no",
        }
        for name, value in changed.items():
            setattr(own, name, value)
        return own


class _CachedTrainer(Trainer):
    """The Trainer, whose evaluation leaves no pair out: dropping a short last batch is for training."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last


class _ClampLogitScale(TrainerCallback):
    """As [`NormalizeRetEmbeddingCallback`] does in joint training."""

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        module: CachedRetrieval = kwargs["model"]
        module.adapter.clamp_logit_scale(module.config.logit_scale_max)


class CachedRetrieval(nn.Module):
    """An adapter's two projections, and the scale and bias of its logits, trained on standardised vectors.

    Args:
        model ([`FromageForConditionalGeneration`]): Its adapter is copied.
        statistics (`list[Statistics]`, *optional*): Mean and scale of the image features and of each layer's states.
            With them the projections start anew.
        dropout (`float`): Of the image features.
    """

    def __init__(self, model: FromageForConditionalGeneration, statistics: list[Statistics] | None, dropout: float):
        super().__init__()
        self.config = model.config
        self.adapter = copy.deepcopy(model.adapter).requires_grad_(False)
        self.adapter.feature_dropout.p = dropout
        self.adapter.num_vectors = 1  # the pairs are without patches
        for scalar in self.adapter.scalars():
            scalar.requires_grad_()
        for linear in self.projections(self.adapter):
            linear.requires_grad_()
            if statistics is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        self.is_standardized = statistics is not None
        for number, (mean, scale) in enumerate(statistics or []):
            self.register_buffer(f"mean_{number}", mean.to(model.adapter.logit_scale.device))
            self.register_buffer(f"scale_{number}", scale.to(model.adapter.logit_scale.device))

    @staticmethod
    def projections(adapter: nn.Module) -> list[nn.Linear]:
        """Of images, and of each layer's states."""
        owner: Any = adapter
        return [owner.visual_projection, *owner.text_projection]

    def _standardized(self, rows: torch.Tensor, number: int) -> torch.Tensor:
        if not self.is_standardized:
            return rows
        mean, scale = self.get_buffer(f"mean_{number}"), self.get_buffer(f"scale_{number}")
        vectors = rows.unflatten(-1, (-1, len(mean)))  # several, where each [RET] token is projected by itself
        return ((vectors - mean) * scale).flatten(1)

    def forward(
        self,
        pooled_image_features: torch.Tensor,
        ret_states: list[torch.Tensor],
        labels: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The model's contrastive loss of N pairs: features (N, W), and states (N, width) a layer."""
        layers = [self._standardized(layer, number) for number, layer in enumerate(ret_states, start=1)]
        features = self._standardized(pooled_image_features, 0)
        found = matching_loss(self.adapter, self.config, features, self.adapter.text_embeds(layers))
        embeds = {name: found[name] for name in ("image_embeds", "text_embeds")}
        return {"loss": found["contrastive_loss"], **embeds}

    @torch.no_grad()
    def fold_into(self, model: FromageForConditionalGeneration) -> None:
        """Give the model these projections, the standardisation within them."""
        owner: Any = model.adapter
        for scalar, trained in zip(owner.scalars(), self.adapter.scalars(), strict=True):
            scalar.copy_(trained)
        pairs = zip(self.projections(owner), self.projections(self.adapter), strict=True)
        for number, (theirs, ours) in enumerate(pairs):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
            if self.is_standardized:
                theirs.weight.mul_(self.get_buffer(f"scale_{number}"))
                theirs.bias.sub_(theirs.weight @ self.get_buffer(f"mean_{number}"))


def check_warm_start(model: Any, args: TrainingArguments, dataset: Any) -> None:
    """Raise a `ValueError` where states of `[RET]` are no constants, or pairs cannot be cached."""
    hint = "Leave `retrieval_warm_start_steps` out, or "
    if not isinstance(model, FromageForConditionalGeneration) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The warm start trains on hidden states of the language model as constants, and PEFT (LoRA) changes them. "
            f"{hint}run it without PEFT and save the model; then train that one with PEFT."
        )
    if any(parameter.requires_grad for parameter in model.language_model.parameters()):
        raise ValueError(f"The warm start needs a frozen language model. {hint}freeze it: `model.freeze_backbones()`.")
    if not _is_numbered(dataset):
        raise ValueError(
            f"The warm start reads its pairs by number, and a {type(dataset).__name__} has no length. {hint}give a "
            "data set with a length."
        )
    if len(dataset) < 2:
        raise ValueError(f"The warm start needs two pairs or more, got {len(dataset)}.")
    if args.world_size > 1:
        raise ValueError(
            f"The warm start runs in one process, and there are {args.world_size}. Run it by itself (`max_steps: 1`), "
            "and train its model in several."
        )


def _is_numbered(dataset: Any) -> bool:
    """Whether examples can be read by their numbers: not those of a stream, nor of `None`."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def _held_out(
    model: FromageForConditionalGeneration, collator: FromageDataCollator, dataset: Any, directory: Path
) -> dict[str, PairStates]:
    """The pairs of evaluation sets by name, of one alone by none; without sets that the warm start cannot be evaluated
    on, which joint training may be."""
    found = {}
    for name, own in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
        if own is None:
            continue
        problem: Any = "it has no length"
        try:
            if _is_numbered(own):
                found[name] = read_pairs(model, collator, own, directory / "-".join(filter(None, ("eval", name))))
                continue
        except TooFewPairsError as error:
            problem = error
        logger.warning("The warm start is not evaluated on the evaluation set %r: %s", name, problem)
    return found


def _recall(found: EvalPrediction) -> dict[str, float]:
    images, texts = (torch.as_tensor(embeds) for embeds in found.predictions)
    return recall_in_both_directions(images, texts)


def _as_it_is(batch: Any) -> Any:
    return batch


__all__ = ["RetrievalWarmStart", "check_warm_start"]
