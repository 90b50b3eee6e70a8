"""Benchmark of the retrieval warm start: the recall of joint training, and how soon the warm start has it.

Both train on the same cached image features, with the same captions; the recall is that of held-out pairs. The seconds
of the warm start are those of all that it does: it reads the pairs, takes the fingerprint of the language model, runs
it over the captions, and trains. Evaluation counts in neither.
"""

import copy
import hashlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments, set_seed

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageProcessor,
    FromageTrainer,
)
from modeling_fromage.trainer.pair_states import read_pairs
from modeling_fromage.trainer.ranking import recall_in_both_directions
from modeling_fromage.trainer.warm_start import RetrievalWarmStart

from ..data.captioned_images import load_captioned_images
from ..evaluation.prompts import embed_prompts, image_embeds
from ..publishing.provenance import provenance
from .step import our_step, plain_step

logger = logging.getLogger(__name__)

METRICS = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of joint training, of which the best is taken
Rows = list[dict[str, Any]]


@dataclass
class Plan:
    """Steps and batch size of joint training, steps of warm starts, seeds of each, and rounds of timed steps."""

    joint_steps: int
    batch_size: int
    steps: list[int]
    joint_seeds: int
    seeds: int
    rounds: int


class Seconds(NamedTuple):
    """By the clock, and of the processor, which others' work beside ours changes less."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def read_rows(source: str) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, of `TRAIN` or `TRAIN,HELD_OUT`: an image and its captions. Without
    `HELD_OUT` every tenth caption is held out, by its hash. Of what is held out, a caption's first image is kept."""
    train, _, held_out = source.partition(",")
    rows = _by_image(train)
    found = _by_image(held_out) if held_out else [row for row in rows if _is_tenth(row["caption"])]
    if not held_out:
        rows = [row for row in rows if not _is_tenth(row["caption"])]
    first = {row["caption"]: row for row in reversed(found)}
    if len(rows) < 2 or len(first) < 2:
        raise ValueError(
            f"{source} has {len(rows)} images to train on and {len(first)} held out; both take two or more."
        )
    return rows, list(first.values())


def _by_image(source: str) -> Rows:
    captions: dict[str, list[str]] = {}
    images: dict[str, Any] = {}
    for row in load_captioned_images(source):
        captions.setdefault(str(row["image"]), []).append(row["caption"])
        images[str(row["image"])] = row["image"]
    return [{"image": images[key], "caption": texts[0], "retrieval_caption": texts} for key, texts in captions.items()]


def _is_tenth(caption: str) -> bool:
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


@torch.no_grad()
def encode(model: FromageForConditionalGeneration, collator: FromageDataCollator, rows: Rows) -> Rows:
    """The rows with the encoder's features in the place of images."""
    pooled = []
    for start in range(0, len(rows), 32):
        pooled.append(model.get_pooled_image_features(**collator.image_inputs(rows[start : start + 32])))
    names = ("caption", "retrieval_caption")
    return [
        {"pooled_image_features": features, **{name: row[name] for name in names}}
        for row, features in zip(rows, torch.cat(pooled).float(), strict=True)
    ]


class Side:
    """A model that is trained anew for each measurement, and pairs to train on and to test with."""

    def __init__(
        self, model: FromageForConditionalGeneration, processor: FromageProcessor, train: Rows, held_out: Rows
    ):
        self.model, self.processor = model, processor
        self.collator = FromageDataCollator(processor)
        self.pixels = [{"image": row["image"], "caption": row["caption"]} for row in train[:: max(1, len(train) // 64)]]
        self.train, self.held_out = (encode(model, self.collator, rows) for rows in (train, held_out))
        self._start = copy.deepcopy(model.adapter.state_dict())

    def _begin(self, seed: int) -> None:
        """The untrained adapter, its projections drawn with `seed`."""
        set_seed(seed)
        self.model.adapter.load_state_dict(self._start)
        for linear in (self.model.adapter.visual_projection, *self.model.adapter.text_projection):
            torch.nn.init.normal_(linear.weight, std=0.02)

    def recall(self) -> dict[str, float]:
        self.model.eval()
        features = torch.stack([row["pooled_image_features"] for row in self.held_out])
        texts = [self.processor.retrieval_text(row["caption"]) for row in self.held_out]
        embeds = embed_prompts(self.model, self.processor, texts)
        found = recall_in_both_directions(image_embeds(self.model, features), embeds)
        return {name: found[name] for name in METRICS}

    def _arguments(self, folder: Path, seed: int, **options: Any) -> TrainingArguments:
        return TrainingArguments(
            str(folder), seed=seed, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
            lr_scheduler_type="cosine", weight_decay=0.0, dataloader_pin_memory=False, **options,
        )  # fmt: skip

    def train_jointly(self, plan: Plan, rate: float, seed: int, folder: Path) -> dict[str, Any]:
        self._begin(seed)
        args = self._arguments(
            folder, seed, max_steps=plan.joint_steps, per_device_train_batch_size=plan.batch_size, learning_rate=rate,
            warmup_steps=plan.joint_steps // 10,
        )  # fmt: skip
        self.collator.training = True
        trainer = FromageTrainer(self.model, args, self.collator, train_dataset=self.train)
        seconds = timed(trainer.train)
        return {"rate": rate, "seconds": seconds._asdict(), "recall": self.recall()}

    def warm_up(self, seed: int, folder: Path, **options: Any) -> Seconds:
        """A warm start; the states of `[RET]` are in `folder` or will be."""
        self._begin(seed)
        run = RetrievalWarmStart(ret_state_cache=str(folder / "states"), **options)
        args = self._arguments(folder, seed)
        return timed(lambda: run.run(self.model, self.collator, args, self.train, None, None))

    def pass_over_captions(self, folder: Path) -> Seconds:
        self._begin(0)
        self.model.normalize_ret_embedding()
        return timed(lambda: read_pairs(self.model, self.collator, self.train, folder / "states" / "train", seed=0))

    def rate_of_joint_training(self, plan: Plan, folder: Path) -> float:
        """The best of `RATES` for the projections alone, on cached vectors, in steps and batches of joint training."""
        found = {}
        for rate in RATES:
            self.warm_up(
                0,
                folder,
                retrieval_warm_start_steps=plan.joint_steps,
                retrieval_warm_start_batch_size=plan.batch_size,
                retrieval_warm_start_learning_rate=rate,
                retrieval_warm_start_dropout=0.0,
                retrieval_warm_start_standardize=False,
            )
            found[rate] = score(self.recall())
        return max(found, key=found.__getitem__)


def score(recall: dict[str, float]) -> float:
    """The mean of R@1, R@5 and R@10 in both directions."""
    return statistics.mean(recall[name] for name in METRICS)


def measure_set(side: Side, plan: Plan) -> dict[str, Any]:
    """Joint training and warm starts on one set."""
    texts = {text for row in side.train for text in row["retrieval_caption"]}
    result: dict[str, Any] = {"images": len(side.train), "texts": len(texts), "held_out": len(side.held_out)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["pass"] = side.pass_over_captions(folder)._asdict()
        rate = side.rate_of_joint_training(plan, folder)
        result["joint"] = [side.train_jointly(plan, rate, seed, folder) for seed in range(plan.joint_seeds)]
        logger.info("%s", result)
        result["warm_start"] = {}
        for steps in plan.steps:
            runs = []
            for seed in range(plan.seeds):
                seconds = side.warm_up(seed, folder, retrieval_warm_start_steps=steps)
                runs.append({"seconds": seconds._asdict(), "recall": side.recall()})
            result["warm_start"][str(steps)] = runs
    return {**result, **summary(result)}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over seeds, and the first warm start whose score is that of joint training, with its whole time."""
    joint = _medians(result["joint"])
    found: dict[str, Any] = {"medians": {"joint": joint}, "reached": None}
    for steps, runs in result["warm_start"].items():
        own = _medians(runs)
        own["seconds"] = {clock: value + result["pass"][clock] for clock, value in own["seconds"].items()}
        own["share"] = {clock: value / joint["seconds"][clock] for clock, value in own["seconds"].items()}
        found["medians"][steps] = own
        if found["reached"] is None and own["score"] >= joint["score"]:
            found["reached"] = steps
    return found


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of recall and seconds; the score is that of the medians."""
    parts = {
        part: {name: statistics.median(run[part][name] for run in runs) for name in runs[0][part]}
        for part in ("seconds", "recall")
    }
    return {**parts, "score": score(parts["recall"])}


def measure_steps(side: Side, plan: Plan) -> dict[str, dict[str, float]]:
    """Medians of a joint step: the original's algorithm, ours, and ours with cached image features, in turns."""
    side._begin(0)
    model, collator, config = side.model, side.collator, side.model.config
    rows = side.pixels[: plan.batch_size]
    batches = {"ours": collator(rows), "ours, image features cached": collator(side.train[: len(rows)])}
    language_model = copy.deepcopy(model.language_model)
    language_model.resize_token_embeddings(config.ret_token_id + 1, mean_resizing=False)
    ids, mask = collator.retrieval_inputs([row["caption"] for row in rows]).values()
    pad = collator.max_length - ids.shape[1]  # to the limit, as the original does
    tokens = torch.nn.functional.pad(ids, (0, pad), value=int(side.processor.tokenizer.pad_token_id))
    batch = {"tokens": tokens, "lengths": mask.sum(-1), "pixel_values": collator.image_inputs(rows)["pixel_values"]}
    steps = {"the original's algorithm": plain_step(language_model, copy.deepcopy(model.vision_model), batch)}
    steps |= {name: our_step(model.train(), inputs, False) for name, inputs in batches.items()}
    seconds: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(plan.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return {
        name: {clock: statistics.median(getattr(each, clock) for each in found) for clock in Seconds._fields}
        for name, found in seconds.items()
    }


def measure(language_model: str, vision_model: str, data: Sequence[str], plan: Plan) -> Iterator[dict[str, Any]]:
    """The results so far, after each of `data`, `NAME=TRAIN[,HELD_OUT]`."""
    rows = {}
    for given in data:
        name, _, source = given.partition("=")
        if not source:
            raise ValueError(f"--data takes NAME=TRAIN[,HELD_OUT], got {given!r}.")
        rows[name] = read_rows(source)
    processor = FromageProcessor.from_vision_text_pretrained(vision_model, language_model)
    set_seed(0)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        vision_model, language_model, processor=processor
    )
    results: dict[str, Any] = {
        "backbones": [type(part).__name__ for part in (model.language_model, model.vision_model)],
        "plan": asdict(plan),
        "sets": {},
        **provenance("cpu"),
    }
    for number, (name, parts) in enumerate(rows.items()):
        side = Side(model, processor, *parts)
        logger.info("%s: %d images to train on, %d held out", name, len(side.train), len(side.held_out))
        results["sets"][name] = measure_set(side, plan)
        logger.info("%s", results["sets"][name])
        if number == 0:
            results["step_seconds"] = measure_steps(side, plan)
        yield results


# ---- the table ----


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = (
        "set",
        "training",
        "R@1 / 5 / 10, text to image",
        "image to text",
        "seconds",
        "CPU seconds",
        "share of these",
    )
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    plan = results["plan"]
    for name, found in results["sets"].items():
        for steps, own in found["medians"].items():
            if steps not in ("joint", found["reached"], str(plan["steps"][-1])):
                continue
            kind = f"{plan['joint_steps']} joint steps of {plan['batch_size']}"
            kind = kind if steps == "joint" else f"warm start, {steps} steps"
            recall = [f"{100 * own['recall'][metric]:.0f}" for metric in METRICS]
            share = f"1/{1 / own['share']['cpu']:.0f}" if "share" in own else "1"
            cells = [name, kind, " / ".join(recall[:3]), " / ".join(recall[3:])]
            seconds = [f"{own['seconds'][clock]:.0f}" for clock in Seconds._fields]
            rows.append(f"| {' | '.join([*cells, *seconds, share])} |")
    sizes = "; ".join(
        f"{name}: {found['images']:,} images, {found['texts']:,} texts, {found['held_out']} pairs held out, the pass "
        f"over the texts {found['pass']['cpu']:.0f} CPU seconds"
        for name, found in results["sets"].items()
    )
    step = {name: seconds["cpu"] for name, seconds in results["step_seconds"].items()}
    original, cached = step["the original's algorithm"], step["ours, image features cached"]
    threads = f"{results['threads']} thread{'s' * (results['threads'] > 1)}"
    note = (
        f"{results['backbones'][0]} and {results['backbones'][1]} in float32, {results['hardware']}, shared with "
        f"other work, {threads}; medians of {plan['seeds']} seeds of warm starts, and {plan['joint_seeds']} of joint "
        f"training at the best of {len(RATES)} rates. {sizes}. A step of the original's algorithm takes "
        f"{original:.1f} CPU seconds, ours with cached features {cached:.1f}. Its numbers are ours, so it has the "
        f"recall of the joint steps after {plan['joint_steps'] * original:,.0f} CPU seconds."
    )
    return "\n".join([*rows, "", note])
