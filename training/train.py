"""Train a FROMAGe model: `python -m training.train CONFIG.yaml [key=value ...]`."""

import argparse
import logging
from pathlib import Path

import torch
from transformers import set_seed

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageProcessor, FromageTrainer
from modeling_fromage.io.command_line import command_parser, errors_in_one_line

from .arguments import DataArguments, ModelArguments, RunArguments, describe_keys, parse_config
from .config import packaged_configs
from .data.feature_cache import with_cached_features
from .data.training_data import INDEXES, DataLoading

logger = logging.getLogger(__name__)


def assemble(
    model_args: ModelArguments, **dtypes: str | torch.dtype
) -> tuple[FromageProcessor, FromageForConditionalGeneration]:
    """Build the processor and a new model from `model_args`, with backbones in `dtypes`."""
    config, quantization = model_args.config_kwargs(), model_args.quantization_config()
    gguf = {"gguf_file": config["text_gguf_file"]} if "text_gguf_file" in config else {}
    processor = FromageProcessor.from_vision_text_pretrained(
        model_args.vision_model, model_args.language_model, num_image_tokens=model_args.num_image_tokens, **gguf
    )
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
    )


def describe_parameters(model: FromageForConditionalGeneration) -> str:
    total = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"


def train(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> dict[str, float]:
    """Build the model, train it, evaluate it, and save it with its processor to `args.output_dir`.

    Returns:
        The metrics, also written to `all_results.json` in that folder.
    """
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
        **args.trainer_options(),
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)  # all_results.json, without entries of an earlier run
    trainer.save_model()  # last, since with push_to_hub it uploads the folder
    return metrics


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, epilog=describe_keys())
    parser.add_argument(
        "config", help=f"YAML file, or one that comes with this package: {', '.join(packaged_configs())}"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        return train(*parse_config(options.config, options.overrides))


if __name__ == "__main__":
    main()
