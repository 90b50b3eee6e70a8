"""What a training run writes about itself: `training_run.json`, and the model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..io.model_card import RUN, CardFacts, model_card, of_the_model


def write_model_card(
    trainer: Trainer, model: Any, data: Mapping[str, Any], license: str | None = None, model_name: str | None = None
) -> None:
    """Write `README.md` and `training_run.json` into the run's `output_dir`, next to its saved checkpoint.

    Args:
        trainer (`Trainer`): After training. Its last evaluation, or with `load_best_model_at_end` that of the best
            checkpoint, is the card's.
        model ([`FromageForConditionalGeneration`]): The trainer's, unwrapped.
        data (`Mapping`): See [`CardFacts`].
    """
    folder = Path(trainer.args.output_dir or "")
    hyperparameters = extract_hyperparameters_from_trainer(trainer) | {
        "optimizer": getattr(trainer.args.optim, "value", trainer.args.optim),
        "betas": f"{trainer.args.adam_beta1}, {trainer.args.adam_beta2}",
        "steps taken": trainer.state.global_step,
        "dtype of the frozen models": str(model.language_model.dtype).removeprefix("torch."),
    }
    run = {"data": dict(data), "hyperparameters": {name: str(value) for name, value in hyperparameters.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN).write_text(json.dumps(run, indent=2, ensure_ascii=False), encoding="utf-8")
    facts = CardFacts(
        results=measured(trainer.state, trainer.args),
        run=run,
        license=license,
        holds_backbones=_holds_backbones(folder / "config.json"),
    )
    card = model_card(model, trainer.processing_class, model_name or _name(trainer.args), facts)
    card.save(folder / "README.md")


def measured(state: TrainerState, args: TrainingArguments) -> dict[str, float]:
    """The metrics of the model that a run has ended with: those of the last evaluation, of each set where there are
    several; of the best checkpoint's where that was loaded at the end."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        is_past = args.load_best_model_at_end and state.best_global_step and entry["step"] > state.best_global_step
        if not is_past:
            found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return of_the_model(found)


def _holds_backbones(config: Path) -> bool:
    """Whether the checkpoint beside `config` is whole: then it names no backbones."""
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("text_model_id") is None


def _name(args: TrainingArguments) -> str:
    return args.hub_model_id or Path(args.output_dir or "").resolve().name


__all__ = ["measured", "write_model_card"]
