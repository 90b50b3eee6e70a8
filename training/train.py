"""Train a FROMAGe model: `python -m training.train CONFIG.yaml [key=value ...]`."""

import argparse
import logging
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments, set_seed

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageProcessor, FromageTrainer
from modeling_fromage.io.command_line import dtype_name, errors_in_one_line

from .config import read_config, to_dataclasses
from .data.captioned_images import load_captioned_images
from .data.feature_cache import with_cached_features

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The backbones and what is trained between them (see FromageConfig)."""

    language_model: str = field(metadata={"help": "Hub id or folder of a causal language model."})
    vision_model: str = field(metadata={"help": "Hub id or folder of a vision encoder."})
    num_image_tokens: int = 1
    projection_dim: int = 256
    text_embed_layers: list[int] = field(default_factory=lambda: [-1])
    vision_pooling: str = "pooler"
    image_feature_dropout: float = 0.0
    gradient_cache_chunk_size: int | None = None
    compile_vision_model: bool = field(default=False, metadata={"help": "torch.compile the frozen vision encoder."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the frozen backbones: float32, bfloat16, ..."})

    def __post_init__(self):
        self.dtype = dtype_name(self.dtype)


@dataclass
class DataArguments:
    """The captioned images and how they become sequences (see FromageDataCollator and FromageProcessor)."""

    train_data: str = field(metadata={"help": "A TSV or CSV file, an image folder, or a datasets repository."})
    eval_data: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    image_column: str = "image"
    caption_column: str | None = None
    max_length: int | None = None
    concat_captions_prob: float = 0.5
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    feature_cache: str | None = field(default=None, metadata={"help": "Folder of training.cache_features."})
    eval_feature_cache: str | None = None


def parse_config(path: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read a YAML file and `key=value` overrides.

    Raises:
        ValueError: The file cannot be read, a key is unknown or missing, or a value is none that it can have.
    """
    config = read_config(path, overrides)
    config.setdefault("remove_unused_columns", False)  # the collator reads the raw columns
    if isinstance(resume := config.get("resume_from_checkpoint"), bool):  # declared as a text: of a folder
        config["resume_from_checkpoint"] = str(resume).lower()
    return to_dataclasses(config, (ModelArguments, DataArguments, TrainingArguments))


def assemble(
    model_args: ModelArguments, **dtypes: str | torch.dtype
) -> tuple[FromageProcessor, FromageForConditionalGeneration]:
    """The processor and the new model that `model_args` ask for, their backbones in `dtypes`."""
    processor = FromageProcessor.from_vision_text_pretrained(
        model_args.vision_model, model_args.language_model, num_image_tokens=model_args.num_image_tokens
    )
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        model_args.vision_model,
        model_args.language_model,
        processor=processor,
        projection_dim=model_args.projection_dim,
        text_embed_layers=model_args.text_embed_layers,
        vision_pooling=model_args.vision_pooling,
        gradient_cache_chunk_size=model_args.gradient_cache_chunk_size,
        image_feature_dropout=model_args.image_feature_dropout,
        **dtypes,
    )
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


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict[str, float]:
    """Assemble the model, train it, evaluate it and save it with its processor to `args.output_dir`.

    Returns:
        The metrics, which `all_results.json` there holds too.
    """
    set_seed(args.seed)
    processor, model = assemble(model_args, dtype=model_args.dtype)
    logger.info(describe_parameters(model))
    if model_args.compile_vision_model:
        model.vision_model.compile()

    def load(source: str | None, split: str, feature_cache: str | None):
        if source is None:
            return None
        dataset = load_captioned_images(source, split, data_args.image_column, data_args.caption_column)
        if feature_cache is None:
            return dataset
        return with_cached_features(dataset, feature_cache, model, processor)

    eval_dataset = load(data_args.eval_data, data_args.eval_split, data_args.eval_feature_cache)
    trainer = FromageTrainer(
        model=model,
        args=args,
        train_dataset=load(data_args.train_data, data_args.train_split, data_args.feature_cache),
        eval_dataset=eval_dataset,
        data_collator=make_collator(processor, data_args, args.seed),
        processing_class=processor,
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)  # all_results.json, without what an earlier run left there
    trainer.save_model()  # last: with push_to_hub it publishes the folder, or says why that cannot be
    return metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file; training/configs/ holds examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        return train(*parse_config(arguments.config, arguments.overrides))


if __name__ == "__main__":
    main()
