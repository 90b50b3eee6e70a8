"""The keys of a training file: model, data, and transformers' own `TrainingArguments`."""

import inspect
import re
import textwrap
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from transformers import (
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    TorchAoConfig,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from modeling_fromage import FromageConfig
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.io.command_line import dtype_name
from modeling_fromage.io.option_files import to_dataclasses, type_name
from modeling_fromage.trainer.options import TrainerOptions

from .benchmarks.timing import fastest_dtype
from .config import read_config
from .data.sharded_examples import SHUFFLE_WINDOW

if TYPE_CHECKING:
    from peft import LoraConfig

_LOADED = "it is read from the backbone that `{}` names"
DECIDED_ELSEWHERE = {  # fields of FromageConfig that a training file cannot set, and why
    "text_config": _LOADED.format("language_model"),
    "vision_config": _LOADED.format("vision_model"),
    "image_token_id": "the processor adds the token and knows its id",
    "ret_token_id": "the processor adds the token and knows its id",
    "ret_embedding_scale": "it is measured on the language model",
    "text_embedding_scale": "it is measured on the language model",
    "vision_feature_size": "it is measured on the vision model",
    "tie_word_embeddings": "the language model ties its own embeddings, and nothing is tied across the parts",
    "text_model_id": "say `language_model` instead",
    "vision_model_id": "say `vision_model` instead",
    "vision_model_library": "say `vision_model: open_clip:...` for a checkpoint of open_clip",
    "text_model_revision": "it is the commit that `language_model` was loaded from",
    "vision_model_revision": "it is the commit that `vision_model` was loaded from",
    "text_model_fingerprint": "it is computed from the weight files of `language_model`",
    "vision_model_fingerprint": "it is computed from the weight files of `vision_model`",
    "retrieval_fingerprint": "it is computed when the model is saved",
}


def _documented(cls: type) -> dict[str, str]:
    """Descriptions of the arguments in the Args section of a docstring."""
    text = inspect.getdoc(cls) or ""
    body = re.split(r"^(?:Args|Parameters):\n", text, maxsplit=1, flags=re.MULTILINE)[-1]
    entries = re.findall(r"^    (\w[\w, ]*) \(.*?\):((?:.*\n?)(?:^ {8}.*\n?)*)", body, re.MULTILINE)
    return {name: " ".join(told.split()) for names, told in entries for name in names.split(", ")}


def _config_fields() -> list[tuple[str, Any, Any]]:
    hints, docs = (
        inspect.get_annotations(FromageConfig, eval_str=True),
        _documented(FromageConfig),
    )  # not inherited
    own = [known for known in fields(FromageConfig) if known.name in hints]
    return [
        (known.name, hints[known.name], field(default=known.default, metadata={"help": docs.get(known.name, "")}))
        for known in own
        if known.name not in DECIDED_ELSEWHERE
    ]


ConfigArguments = make_dataclass("ConfigArguments", _config_fields(), kw_only=True)


@dataclass(kw_only=True)
class ModelArguments(ConfigArguments):
    """The backbones, and all fields of FromageConfig that do not follow from them."""

    language_model: str = field(metadata={"help": "Hub id or folder of a causal language model."})
    vision_model: str = field(metadata={"help": "Hub id or folder of a vision encoder."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the frozen backbones: float32, bfloat16, ...; fastest: bfloat16 where that is faster."},
    )
    compile_vision_model: bool = field(default=False, metadata={"help": "torch.compile the frozen vision encoder."})
    quantization: Literal["int8", "nf4"] | None = field(
        default=None, metadata={"help": "Of the language model's linear layers: int8 by torchao, nf4 by bitsandbytes."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train LoRA of this rank in the language model too."})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA's scale; by default twice its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what LoRA reads."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that LoRA is put into; by default [q_proj, v_proj]."}
    )

    def __post_init__(self) -> None:
        self.dtype = dtype_name(fastest_dtype() if self.dtype == "fastest" else self.dtype)
        if self.lora_rank is None and (self.lora_alpha, self.lora_dropout, self.lora_target_modules) != (None, 0, None):
            raise ValueError("The other keys of LoRA do nothing without `lora_rank`. Set it, or leave them out.")
        for known in fields(ConfigArguments):
            value = getattr(self, known.name)
            if known.type in (float, float | None) and value is not None:  # FromageConfig refuses integers
                setattr(self, known.name, float(value))

    def config_kwargs(self) -> dict[str, Any]:
        """The fields of FromageConfig that are set."""
        values = {known.name: getattr(self, known.name) for known in fields(ConfigArguments)}
        return {name: value for name, value in values.items() if value is not None}

    def image_vector(self) -> ImageVector:
        """What one vector stands for an image."""
        values: Any = self  # whose fields are those of FromageConfig
        return ImageVector(values.vision_pooling, values.vision_feature_layer, values.vision_patch_tokens)

    def quantization_config(self) -> QuantizationConfigMixin | None:
        """For `text_quantization_config`, with all of each library's defaults but double quantisation."""
        if self.quantization == "nf4":
            _require("bitsandbytes", "quantization: nf4")
            return BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )  # fmt: skip
        if self.quantization == "int8":
            _require("torchao", "quantization: int8")
            from torchao.quantization import Int8WeightOnlyConfig  # takes seconds

            return TorchAoConfig(Int8WeightOnlyConfig())
        return None

    def lora_config(self) -> "LoraConfig | None":
        """For `add_adapter`: LoRA in the language model, and a copy of the trained parts, which it trains and saves."""
        if self.lora_rank is None:
            return None
        _require("peft", "lora_rank")
        from peft import LoraConfig  # takes a second, and is asked for by few

        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=rf"language_model\..*\.({'|'.join(self.lora_target_modules or ['q_proj', 'v_proj'])})",
            modules_to_save=["adapter"],
        )


@dataclass
class DataArguments:
    """The captioned images, and how they become sequences: see FromageDataCollator and FromageProcessor."""

    train_data: str | list[Any] = field(
        metadata={
            "help": "Tables (TSV, CSV, JSONL, Parquet), tar shards, a folder, or a Hub dataset; or a list of such, "
            "each a text or a mapping {source: ..., weight: 2, split: ..., image_column: ..., caption_column: ...}."
        }
    )
    eval_data: list[Any] | str | None = field(
        default=None, metadata={"help": "As train_data; evaluated while training."}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of train_data that is held out for evaluation, without eval_data."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of a folder or Hub dataset."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a folder or Hub dataset."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images, paths or URLs; by default image, file_name, url, ..."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "By default caption, text, captions, title or txt."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read tables and Parquet files in place, without a copy of them."}
    )
    shuffle_window: int = field(
        default=SHUFFLE_WINDOW,
        metadata={"help": "Rows shuffled among each other where they are read in place."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a caption, BOS and [RET] included."})
    concat_captions_prob: float = field(default=0.5, metadata={"help": "Chance that two pairs share a sequence."})
    caption_prefix: str | None = field(default=None, metadata={"help": "Text between the image and its caption."})
    caption_suffix: str | None = field(default=None, metadata={"help": "Text that ends a caption."})
    max_document_length: int = field(default=512, metadata={"help": "Tokens of a document, images included."})
    document_ret_prob: float = field(
        default=1.0, metadata={"help": "Chance that a document's image is to be found from what stands before it."}
    )
    hard_negatives: int = field(
        default=1, metadata={"help": "Images drawn of an example's negative_images, where the data have them; 0: none."}
    )
    feature_cache: str | None = field(default=None, metadata={"help": "Folder that the command cache-features wrote."})
    eval_feature_cache: str | None = field(default=None, metadata={"help": "The same, of eval_data."})

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` is a share of train_data: from 0 to below 1, got {self.eval_fraction}.")
        if self.shuffle_window < 1:
            raise ValueError(f"`shuffle_window` is a number of rows: at least 1, got {self.shuffle_window}.")


@dataclass(kw_only=True)
class RunArguments(TrainerOptions, TrainingArguments):
    """transformers' `TrainingArguments`, and the options of FromageTrainer."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a better metric_for_best_model after which training ends."},
    )

    def __post_init__(self) -> None:
        TrainingArguments.__post_init__(self)
        TrainerOptions.__post_init__(self)
        if self.early_stopping_patience is not None and not (
            self.early_stopping_patience > 0 and self.load_best_model_at_end
        ):
            raise ValueError(
                "`early_stopping_patience` counts evaluations since the best one: it must be at least 1, and it needs "
                "`eval_strategy`, `load_best_model_at_end: true` and `metric_for_best_model` "
                f"(eval_text_to_image_R@1, ...), got {self.early_stopping_patience}."
            )

    def callbacks(self) -> list[TrainerCallback]:
        """What the keys above ask for."""
        if self.early_stopping_patience is None:
            return []
        return [EarlyStoppingCallback(self.early_stopping_patience)]

    def trainer_options(self) -> dict[str, Any]:
        """What FromageTrainer takes beside `args`."""
        return {known.name: getattr(self, known.name) for known in fields(TrainerOptions)}


def parse_config(path: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read a YAML file and `key=value` overrides.

    Raises:
        ValueError: The file cannot be read; a key is unknown, missing, or cannot be set in a training file; or a value
            has the wrong type.
    """
    config = read_config(path, overrides)
    for name, reason in DECIDED_ELSEWHERE.items():
        if name in config:
            raise ValueError(f"`{name}` cannot be set: {reason}. Leave it out.")
    config.setdefault("remove_unused_columns", False)  # the collator reads the raw columns
    if isinstance(resume := config.get("resume_from_checkpoint"), bool):  # transformers declares a string, the folder
        config["resume_from_checkpoint"] = str(resume).lower()
    return to_dataclasses(config, (ModelArguments, DataArguments, RunArguments))


# The keys that nearly every file sets, by what they are for, and what is said of those of transformers.
USUAL_KEYS = {
    "the two frozen models": ("language_model", "vision_model", "dtype"),
    "the data": ("train_data", "eval_data", "max_length"),
    "the run": ("output_dir", "per_device_train_batch_size", "learning_rate", "max_steps", "num_train_epochs"),
    "evaluating, saving, reporting": ("eval_steps", "save_steps", "logging_steps", "report_to"),
}
_OF_TRANSFORMERS = {
    "output_dir": "Where the model, its checkpoints and the log go.",
    "per_device_train_batch_size": "Pairs a step and device; the others of a step are a pair's negatives.",
    "learning_rate": "Its peak, of AdamW.",
    "max_steps": "Steps of the optimiser; goes before num_train_epochs.",
    "num_train_epochs": "How often the data are gone through.",
    "eval_steps": "Steps between evaluations, with `eval_strategy: steps`.",
    "save_steps": "Steps between checkpoints; `resume_from_checkpoint: true` goes on after the last.",
    "logging_steps": "Steps between lines of the log.",
    "report_to": "tensorboard, trackio, wandb, ...; none for no report.",
}


def describe_usual_keys() -> str:
    """The keys that nearly every file sets, for `--help`."""
    kinds = (ModelArguments, DataArguments, RunArguments)
    known = {each.name: (each, hints[each.name]) for cls in kinds for hints in [get_type_hints(cls)]
             for each in fields(cls)}  # fmt: skip
    lines = ["keys that nearly every file sets (all of them: --help-all):"]
    for title, names in USUAL_KEYS.items():
        lines += ["", f"{title}:", *(line for name in names for line in _told(*known[name]))]
    example = ["language_model: facebook/opt-125m", "vision_model: openai/clip-vit-base-patch32",
               "train_data: pairs.tsv  # columns caption and image", "output_dir: outputs/mine"]  # fmt: skip
    return "\n".join([*lines, "", "a whole file:", *(f"  {line}" for line in example)])


def describe_keys() -> str:
    """All keys of a training file with types, defaults and meanings, for `--help-all`."""
    lines = ["keys of the model (the fields of FromageConfig among them):", *_describe(ModelArguments)]
    lines += ["", "keys of the data:", *_describe(DataArguments)]
    lines += ["", "keys of the training:", *_describe(RunArguments, but=TrainingArguments)]
    lines += ["", "keys of transformers.TrainingArguments:", *_describe(TrainingArguments)]
    return "\n".join(lines)


def _require(package: str, key: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"`{key}` needs the package {package}: pip install {package}.")


def _describe(cls: type, but: type = object) -> list[str]:
    """The fields of a dataclass, those first that must be given; none that `but` has too."""
    hints = get_type_hints(cls)
    others = getattr(but, "__dataclass_fields__", {})
    ordered = sorted(fields(cls), key=lambda known: known.default is not MISSING)
    return [line for known in ordered if known.init and known.name not in others
            for line in _told(known, hints[known.name])]  # fmt: skip


def _told(known: Field, hint: Any) -> list[str]:
    """A key with its type, default and meaning, as lines."""
    is_required = known.default is MISSING and known.default_factory is MISSING
    default = "required" if is_required else "by default " + _shown(known)
    if known.default is None:
        default = "optional"
    meaning = _OF_TRANSFORMERS.get(known.name) or " ".join(known.metadata.get("help", "").split())
    text = f"{known.name} ({_kind(hint)}; {default}): {meaning}"
    return textwrap.wrap(text.removesuffix(": "), 100, initial_indent="  ", subsequent_indent="      ")


def _kind(hint: Any) -> str:
    return " or ".join(each for each in type_name(hint).split(" or ") if each != "nothing")


def _shown(known: Field) -> str:
    value = known.default if known.default is not MISSING else known.default_factory()
    return str(getattr(value, "value", value)) if value != "" else "empty"
