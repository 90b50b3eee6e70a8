"""Train a FROMAGe model: `python -m training.train CONFIG.yaml [key=value ...]`.

Example: `python -m training.train paper train_data=cc3m/train.tsv eval_data=cc3m/validation.tsv --dry-run` tells what
would be trained, how long and in what memory. Without `--dry-run` it is trained.
"""

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageProcessor, FromageTrainer
from modeling_fromage.io.command_line import command_parser, errors_in_one_line
from modeling_fromage.trainer.heartbeat import watched_processes

from .arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    describe_keys,
    describe_usual_keys,
    parse_config,
)
from .config import packaged_configs
from .curves import plot_curves
from .data.feature_cache import with_cached_features
from .data.training_data import INDEXES, DataLoading
from .dry_run import dry_run

logger = logging.getLogger(__name__)


def assemble(
    model_args: ModelArguments, **dtypes: str | torch.dtype
) -> tuple[FromageProcessor, FromageForConditionalGeneration]:
    """Build the processor and a new model from `model_args`, with backbones in `dtypes`."""
    config, quantization = model_args.config_kwargs(), model_args.quantization_config()
    gguf = {"gguf_file": config["text_gguf_file"]} if "text_gguf_file" in config else {}
    processor = FromageProcessor.from_vision_text_pretrained(
        model_args.vision_model, model_args.language_model, num_image_tokens=model_args.num_image_tokens,
        num_ret_tokens=model_args.num_ret_tokens, **gguf,
    )  # fmt: skip
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        model_args.vision_model, model_args.language_model, processor=processor, **config, **dtypes,
        text_quantization_config=quantization,
    )  # fmt: skip
    if (lora := model_args.lora_config()) is not None:
        from peft.functional import cast_adapter_dtype

        model.add_adapter(lora)
        cast_adapter_dtype(model, "default")  # to fp32, as the other trained parts: bf16 would lose small steps
    return processor, model


def make_collator(processor: FromageProcessor, data_args: DataArguments, seed: int) -> FromageDataCollator:
    return FromageDataCollator(
        processor,
        max_length=data_args.max_length,
        concat_captions_prob=data_args.concat_captions_prob,
        caption_prefix=data_args.caption_prefix,
        caption_suffix=data_args.caption_suffix,
        seed=seed,
        max_document_length=data_args.max_document_length,
        document_ret_prob=data_args.document_ret_prob,
        hard_negatives=data_args.hard_negatives,
    )


def describe_parameters(model: FromageForConditionalGeneration) -> str:
    total = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"


def prepare(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> FromageTrainer:
    """The model, the data, and the trainer that joins them."""
    set_seed(args.seed)
    processor, model = assemble(model_args, dtype=model_args.dtype)
    logger.info(describe_parameters(model))
    if model_args.compile_vision_model:
        model.vision_model.compile()

    loading = DataLoading(data_args, args.seed, args.on_bad_example == "skip", Path(args.output_dir or ".") / INDEXES)
    train_dataset, eval_dataset = loading.train_and_eval(
        lambda dataset, directory: with_cached_features(dataset, directory, model, processor)
    )
    trainer = FromageTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=make_collator(processor, data_args, args.seed),
        processing_class=processor,
        callbacks=args.callbacks(),
        **args.trainer_options(),
    )
    names = name_sources(data_args.train_data, data_args.train_split)
    held_out = name_sources(data_args.eval_data, data_args.eval_split)
    if data_args.eval_fraction:
        held_out = [{**name, "split": f"held out of {name['split'] or 'it'}"} for name in names]
    trainer.data_names = {"train": names, "eval": held_out}
    return trainer


def train(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> dict[str, float]:
    """Build the model, train it, evaluate it, and save it with its processor to `args.output_dir`, with the model card
    and a plot of the curves.

    Returns:
        The metrics, also written to `all_results.json` in that folder.
    """
    with watched_processes(args):
        trainer = prepare(model_args, data_args, args)
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        trainer.save_state()
        trainer.save_metrics("all", metrics, combined=False)  # all_results.json, without entries of an earlier run
        if trainer.is_world_process_zero():
            plot_curves(trainer.state.log_history, Path(args.output_dir or ""))
        trainer.save_model()  # after what it uploads with push_to_hub
        trainer.create_model_card()
    return metrics


def name_sources(sources: Any, split: str | None) -> list[dict[str, Any]]:
    """Data sets by their Hub ids, or by the names of files and folders, which name no path of this machine."""
    if sources is None:
        return []
    if isinstance(sources, (list, tuple)):
        return [each for source in sources for each in name_sources(source, split)]
    if isinstance(sources, dict):  # with a weight, a split of its own, ...
        return name_sources(sources["source"], sources.get("split", split))
    path = Path(sources)
    if not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", sources):
        return [{"name": sources, "split": split, "on_hub": True}]
    is_address = "://" in sources
    return [{"name": sources if is_address else path.name, "split": split if path.is_dir() else None, "on_hub": False}]


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, epilog=describe_usual_keys())
    parser.add_argument(
        "config", help=f"YAML file, or one that comes with this package: {', '.join(packaged_configs())}"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    parser.add_argument("--dry-run", action="store_true", help="take a few steps, tell what a run comes to, and stop")
    parser.add_argument("--help-all", action=HelpAll, help="show all keys with types, defaults and meanings, and exit")
    return parser


class HelpAll(argparse.Action):
    """As `--help`, with every key."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        parser.epilog = describe_keys()
        parser.print_help()
        parser.exit()


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(sorted(words, key=lambda word: not word.startswith("-")))  # wherever --dry-run stands
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        arguments = parse_config(options.config, options.overrides)
        if not options.dry_run:
            return train(*arguments)
        arguments[2].push_to_hub = False  # the Trainer would make the repository now
        with watched_processes(arguments[2]):
            trainer = prepare(*arguments)
            told = dry_run(trainer)
        if trainer.is_world_process_zero():
            print(told)
        return {}


if __name__ == "__main__":
    main()
