"""Study of what training can be changed by: each option against the plain model, at equal steps and at equal time.

On each set of data every option is trained anew with several seeds, from cached image features, and tested on what was
held out: recall of pairs both ways, the captioning loss, and on documents the recall of the next image by its context.
"""

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageProcessor, FromageTrainer
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.messages_fromage import as_parts
from modeling_fromage.trainer.warm_start import RetrievalWarmStart

from ..evaluation.documents import DocumentsEvaluator, read_documents
from ..evaluation.images import EncodedImages, encode_images
from ..publishing.provenance import provenance
from .study_data import Rows, StudyData, read_document_sets, read_pairs

logger = logging.getLogger(__name__)

EQUAL = 0.1  # steps whose times differ by less count as equally long
_LORA = {"target_modules": r"language_model\..*\.(q_proj|v_proj)", "modules_to_save": ["adapter"]}


@dataclass(frozen=True)
class Option:
    """What a model is trained with, beside the defaults.

    Args:
        config: Fields of FromageConfig.
        collator: Arguments of FromageDataCollator.
        trainer: Options of FromageTrainer.
        lora_rank: Train LoRA in the language model too.
        documents: Train on documents, in the place of the pairs in them.
        pairs: Train on pairs beside documents.
        retrieval_first: Train retrieval first, on cached vectors.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    collator: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    documents: bool = False
    pairs: bool = True
    retrieval_first: bool = False


_RATES = {"visual_projection": 1e-5, "text_projection": 1e-5, "logit_scale": 1e-5, "ret_embedding": 1e-5}


def _retrieval_first(documents: bool = False, pairs: bool = True, **config: Any) -> Option:
    """`[RET]`'s input row is untied, so that it can stay where the warm start has seen it."""
    untied = {"tie_ret_embedding": False, **config}
    return Option(
        config=untied, trainer={"learning_rates": _RATES}, documents=documents, pairs=pairs, retrieval_first=True
    )


_LAYERS = {"text_embed_layers": [8, 16, 24, -1]}
_SIGLIP = {"contrastive_loss_type": "siglip", "logit_scale_init_value": math.log(10)}
_LATE = {"num_ret_tokens": 4, "ret_aggregation": "max"}

OPTIONS: dict[str, Option] = {
    "plain": Option(),
    "several layers": Option(config=_LAYERS),
    "4 visual tokens": Option(config={"num_image_tokens": 4}),
    "4 visual tokens, a hidden layer": Option(config={"num_image_tokens": 4, "projector_type": "mlp"}),
    "4 visual tokens of 16 patches": Option(config={"num_image_tokens": 4, "vision_patch_tokens": 16}),
    "4 visual tokens, resampler": Option(
        config={"num_image_tokens": 4, "vision_patch_tokens": 16, "projector_type": "resampler"}
    ),
    "4 [RET] tokens": Option(config={"num_ret_tokens": 4}),
    "4 [RET] tokens, late interaction": Option(config=_LATE),
    "SigLIP's loss": Option(config=_SIGLIP),
    "label smoothing": Option(config={"contrastive_label_smoothing": 0.1}),
    "captions smoothed": Option(config={"captioning_label_smoothing": 0.1}),
    "largest scale 100": Option(config={"logit_scale_max": 100.0}),
    "weight averaging": Option(trainer={"ema_decay": 0.9}),
    "LoRA": Option(lora_rank=8),
    "retrieval first": _retrieval_first(),
    "retrieval first, several layers": _retrieval_first(**_LAYERS),
    "retrieval first, 4 [RET] tokens": _retrieval_first(num_ret_tokens=4),
    "retrieval first, late interaction": _retrieval_first(**_LATE),
    "retrieval first, SigLIP's loss": _retrieval_first(**_SIGLIP),
    "retrieval first, label smoothing": _retrieval_first(contrastive_label_smoothing=0.1),
    "retrieval first, largest scale 100": _retrieval_first(logit_scale_max=100.0),
    "documents": Option(documents=True, pairs=False),
    "documents, half of the images shown": Option(documents=True, pairs=False, collator={"document_ret_prob": 0.5}),
    "documents and pairs": Option(documents=True),
    "documents, several layers": Option(config=_LAYERS, documents=True, pairs=False),
    "documents, retrieval first": _retrieval_first(documents=True, pairs=False),
    "documents, retrieval first, several layers": _retrieval_first(documents=True, pairs=False, **_LAYERS),
}


@dataclass(frozen=True)
class Plan:
    """How long and how often.

    Args:
        minutes: Of joint training of the plain model.
        seeds: Runs of each option.
        batch_size, documents_batch_size: Pairs, and documents, of a step.
        learning_rate: Its peak; a cosine to 0.
        warm_start_steps, warm_start_learning_rate: Of training retrieval first.
        max_length, max_document_length: Tokens of a caption and of a document.
        max_queries: Images of documents that are searched for, and pairs that are held out, at most.
        dtype: Of the frozen models.
    """

    minutes: float = 1.5
    seeds: int = 3
    batch_size: int = 32
    documents_batch_size: int = 8
    learning_rate: float = 1e-3
    warm_start_steps: int = 400
    warm_start_learning_rate: float = 2e-3
    max_length: int = 64
    max_document_length: int = 256
    max_queries: int = 150
    dtype: str = "float32"


class Side:
    """A set of data for one kind of model: image features are computed once for all options that share the encoder's
    settings."""

    def __init__(self, backbones: tuple[str, str], data: StudyData, plan: Plan):
        self.backbones, self.data, self.plan = backbones, data, plan
        self.held_out = data.held_out[:: math.ceil(len(data.held_out) / plan.max_queries)]
        self._features: dict[str, dict[str, torch.Tensor]] = {}
        self._encoded: dict[str, EncodedImages] = {}

    def assemble(self, option: Option, seed: int) -> tuple[FromageForConditionalGeneration, FromageProcessor]:
        set_seed(seed)
        vision, text = self.backbones
        own = {name: option.config[name] for name in ("num_image_tokens", "num_ret_tokens") if name in option.config}
        processor = FromageProcessor.from_vision_text_pretrained(vision, text, **own)
        model = FromageForConditionalGeneration.from_vision_text_pretrained(
            vision, text, processor=processor, dtype=self.plan.dtype, **option.config
        )
        if option.lora_rank is not None:
            from peft import LoraConfig
            from peft.functional import cast_adapter_dtype

            model.add_adapter(LoraConfig(r=option.lora_rank, lora_alpha=2 * option.lora_rank, **_LORA))
            cast_adapter_dtype(model, "default")
        return model, processor

    @torch.no_grad()
    def features(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> dict[str, torch.Tensor]:
        """The vector of each image, by its path, for the model's settings of the encoder."""
        key = str(ImageVector.of(model.config))
        if key not in self._features:
            paths = {row["image"] for row in (*self.data.train, *self.held_out)}
            paths |= {part["image"] for row in self.data.documents for part in as_parts(row["document"])
                      if part["type"] == "image"}  # fmt: skip
            collator, ordered, found = FromageDataCollator(processor), sorted(paths), []
            for start in range(0, len(ordered), 32):
                rows = [{"image": path} for path in ordered[start : start + 32]]
                found.append(model.get_pooled_image_features(**collator.image_inputs(rows)).float())
            self._features[key] = dict(zip(ordered, torch.cat(found), strict=True))
        return self._features[key]

    def next_images(
        self, option: Option, model: FromageForConditionalGeneration, processor: FromageProcessor
    ) -> dict[str, Any]:
        """Recall of the images of held-out documents, by what they are found from."""
        evaluator = DocumentsEvaluator(
            data=str(self.data.test_documents), texts=[1], max_tokens=self.plan.max_document_length,
            max_queries=self.plan.max_queries, batch_size=16, rets_in_context=option.documents,
        )  # fmt: skip
        documents = read_documents(evaluator.data, processor)
        key = str(ImageVector.of(model.config))
        if key not in self._encoded:
            self._encoded[key] = encode_images(model, processor, documents.sources)
        return evaluator.rank(model, processor, documents, self._encoded[key]).results["contexts"]

    def rows(self, option: Option, features: Mapping[str, torch.Tensor], collator: FromageDataCollator) -> Rows:
        """What an option trains on."""
        pairs = _with_features(self.data.train, features)
        if not option.documents:
            return pairs
        documents = []
        for row in self.data.documents:
            images = [part["image"] for part in as_parts(row["document"]) if part["type"] == "image"]
            found = {**row, "pooled_image_features": torch.stack([features[image] for image in images])}
            try:
                collator.prepare(found)
                documents.append(found)
            except ValueError:  # no image within the length
                continue
        return documents + pairs if option.pairs else documents


def _with_features(rows: Rows, features: Mapping[str, torch.Tensor]) -> Rows:
    names = ("caption", "retrieval_caption", "negative_images")
    return [
        {"pooled_image_features": features[row["image"]], **{name: row[name] for name in names if name in row}}
        for row in rows
    ]


def _arguments(folder: str, plan: Plan, option: Option, steps: int, seed: int) -> TrainingArguments:
    is_of_documents = option.documents
    return TrainingArguments(
        folder, max_steps=steps, seed=seed, learning_rate=plan.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10), weight_decay=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False,
        per_device_train_batch_size=plan.documents_batch_size if is_of_documents else plan.batch_size,
    )  # fmt: skip


def step_seconds(side: Side, option: Option) -> float:
    """Seconds of one training step, the shortest of three after the first. They are the processor's, divided by its
    threads, and so the same whatever else the machine does."""
    model, processor = side.assemble(option, 0)
    collator = _collator(processor, side.plan, option, 0)
    rows = side.rows(option, side.features(model, processor), collator)
    size = side.plan.documents_batch_size if option.documents else side.plan.batch_size
    found = []
    model.train()
    for number in range(4):
        batch = collator([rows[(number * size + i) * 7919 % len(rows)] for i in range(min(size, len(rows)))])
        start = _seconds()
        model(**batch).loss.backward()
        found.append(_seconds() - start)
    return min(found[1:])


def _seconds() -> float:
    return time.process_time() / torch.get_num_threads()


def _collator(processor: FromageProcessor, plan: Plan, option: Option, seed: int) -> FromageDataCollator:
    return FromageDataCollator(
        processor, max_length=plan.max_length, max_document_length=plan.max_document_length, seed=seed,
        **{"concat_captions_prob": 0.0, **option.collator},
    )  # fmt: skip


def run(side: Side, option: Option, seed: int, steps: int | None, step: float) -> dict[str, Any]:
    """Train and test once: seconds of training, parameters, and figures of what was held out.

    Args:
        steps: Of joint training; `None` for as many as the plan's minutes leave when retrieval has been trained, each
            of `step` seconds.
    """
    model, processor = side.assemble(option, seed)
    collator = _collator(processor, side.plan, option, seed)
    features = side.features(model, processor)
    rows = side.rows(option, features, collator)
    held_out = _with_features(side.held_out, features)
    start = _seconds()
    with tempfile.TemporaryDirectory() as folder:
        if option.retrieval_first:
            arguments = _arguments(folder, side.plan, option, 1, seed)
            warm_start = RetrievalWarmStart(
                retrieval_warm_start_steps=side.plan.warm_start_steps,
                retrieval_warm_start_learning_rate=side.plan.warm_start_learning_rate,
            )
            warm_start.run(model, collator, arguments, rows, None, None)
        if steps is None:
            steps = max(2, int((60 * side.plan.minutes - (_seconds() - start)) / step))
        trainer = FromageTrainer(
            model, _arguments(folder, side.plan, option, steps, seed), collator, train_dataset=rows, eval_samples=0,
            **option.trainer,
        )  # fmt: skip
        trainer.train()
        seconds = _seconds() - start
        metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate(held_out).items()}
    model.eval()
    found = {
        "seed": seed, "steps": steps, "seconds": seconds, "parameters": model.num_parameters(only_trainable=True),
        "recall": {name: value for name, value in metrics.items() if "R@" in name},
        "captioning_loss": metrics["captioning_loss"],
    }  # fmt: skip
    if side.data.test_documents is not None:
        contexts = side.next_images(option, model, processor)
        found["documents"] = {name: own["ours"]["R@10"] for name, own in contexts.items()}
        found["documents R@1"] = {name: own["ours"]["R@1"] for name, own in contexts.items()}
    return found


def measure(
    backbones: tuple[str, str], sets: Sequence[StudyData], names: Sequence[str], plan: Plan
) -> Iterator[dict[str, Any]]:
    """The results so far, after each run."""
    results: dict[str, Any] = {"plan": asdict(plan), "sets": {}, **provenance("cpu")}
    for data in sets:
        side = Side(backbones, data, plan)
        found: dict[str, Any] = {
            "pairs": len(data.train), "held_out": len(side.held_out), "documents": len(data.documents), "options": {}
        }  # fmt: skip
        results["sets"][data.name] = found
        plain = step_seconds(side, OPTIONS["plain"])
        for name in names:
            option = OPTIONS[name]
            if option.documents and not data.documents:
                continue
            own = plain if name == "plain" else step_seconds(side, option)
            steps: dict[str, int | None] = {}
            if not option.documents and not option.retrieval_first:  # steps of theirs are not those of the plain one
                steps["equal steps"] = max(2, int(60 * plan.minutes / plain))
            if not steps or not abs(own / plain - 1) < EQUAL:
                steps["equal time"] = None
            found["options"][name] = {"step_seconds": own, **{kind: [] for kind in steps}}
            for seed in range(plan.seeds):
                for kind, count in steps.items():
                    found["options"][name][kind].append(run(side, option, seed, count, own))
                    logger.info("%s, %s, %s: %s", data.name, name, kind, found["options"][name][kind][-1])
                    yield results


# ---- the table ------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: means over seeds, and their standard deviations."""
    lines = []
    for name, found in results["sets"].items():
        contexts = ["1 text", "1 text + images", "all texts", "all texts + images"] if found["documents"] else []
        heads = ["option", "at equal", "R@1 text to image", "image to text", "caption loss",
                 *(f"next image R@10, {context}" for context in contexts), "parameters", "seconds"]  # fmt: skip
        lines += [f"**{name}**: {found['pairs']:,} pairs, {found['held_out']:,} held out"
                  + (f", {found['documents']:,} documents, at most {results['plan']['max_queries']} images of held-out "
                     "ones to be found" if found["documents"] else ""), ""]  # fmt: skip
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for option, kinds in found["options"].items():
            for kind in ("equal steps", "equal time"):
                if kinds.get(kind):
                    lines.append(_row(option, kind.removeprefix("equal "), kinds[kind], contexts))
        lines.append("")
    plan = results["plan"]
    lines.append(
        f"Per cent, mean ± standard deviation of {plan['seeds']} seeds; {plan['minutes']:g} minutes of training for "
        f"the plain model, in seconds of the processor by its threads; {results['hardware']}, {results['threads']} "
        f"threads, {plan['dtype']}. A plain model's option whose steps are as long as its own, within {EQUAL:.0%}, has "
        "one row."
    )
    return "\n".join(lines)


def _row(option: str, kind: str, runs: Sequence[dict[str, Any]], contexts: Sequence[str]) -> str:
    cells = [option, kind]
    cells += [
        _spread([100 * run["recall"][f"{way}_R@1"] for run in runs]) for way in ("text_to_image", "image_to_text")
    ]
    cells.append(_spread([run["captioning_loss"] for run in runs], digits=2))
    cells += [_spread([100 * run["documents"][context] for run in runs]) for context in contexts]
    cells += [f"{runs[0]['parameters']:,}", f"{statistics.mean(run['seconds'] for run in runs):.0f}"]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    mean = statistics.mean(values)
    if len(values) < 2 or math.isnan(mean):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


__all__ = ["OPTIONS", "Option", "Plan", "StudyData", "measure", "read_document_sets", "read_pairs", "run", "table"]
