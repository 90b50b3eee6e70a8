"""Train a small FROMAGe on emoji, test it on emoji it never saw, talk with it, and write a report.

Run it with `make quickstart`. Packages from the Python Package Index are all it needs; `--language-model` and
`--vision-model` take any Hub id or folder instead, `--data` a folder or TSV of captioned images.
"""

import argparse
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm
from transformers import set_seed

from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromageImageIndex,
    FromagePipeline,
    FromageProcessor,
    FromageTrainer,
    UnreadableImageError,
)
from modeling_fromage.images_fromage import is_url, load_rgb_image
from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .arguments import parse_config
from .config import CONFIGS
from .data.captioned_images import load_captioned_images
from .evaluation.captioning import generate_captions, score_captions
from .publishing.provenance import provenance
from .quickstart_emoji import report
from .train import assemble, describe_parameters, make_collator

logger = logging.getLogger(__name__)
CONFIG = CONFIGS / "quickstart.yaml"


@dataclass
class Split:
    """Captions, image files and the encoder's pooled features (N, vision width) of one side of the data."""

    captions: list[str]
    images: list[str]
    features: torch.Tensor

    def dataset(self) -> Dataset:
        """Rows for the collator."""
        columns = {"pooled_image_features": self.features.numpy(), "caption": self.captions}
        return Dataset.from_dict(columns).with_format("torch")


def steps_that_fit(model, collator: FromageDataCollator, dataset: Dataset, batch_size: int, seconds: float) -> int:
    """How many training steps take `seconds`, from the time of one: the learning-rate schedule ends with the run."""
    batch = collator(list(dataset.shuffle(seed=0).select(range(min(batch_size, len(dataset))))))
    model.train()
    for _ in range(3):  # the first one warms up
        start = time.monotonic()
        model(**batch).loss.backward()
        elapsed = time.monotonic() - start
    model.zero_grad()
    return max(1, int(seconds / elapsed))


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else fp32: emulated bfloat16 is tens of times slower."""
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def encode(dataset: Dataset, model, processor, folder: Path, batch_size: int = 8) -> Split:
    """Run the frozen vision encoder once over a dataset. Images that are not files, but from the web or within the
    dataset, become files in `folder`: they are shown later. Those that cannot be read are left out.

    Raises:
        ValueError: No image can be read.
    """
    captions, files, features = [], [], []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Encoding images"):
        rows, images = dataset[start : start + batch_size], []
        for number, (source, caption) in enumerate(zip(rows["image"], rows["caption"], strict=True), start):
            try:
                images.append(load_rgb_image(source))
            except UnreadableImageError as error:
                logger.warning("%s", error)
                continue
            captions.append(caption)
            files.append(_as_file(source, images[-1], folder / f"{number:06d}.png"))
        if images:
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            features.append(model.get_pooled_image_features(pixels).float())
    if not files:
        raise ValueError(f"None of the {len(dataset)} images can be read. Check the paths or URLs in your data.")
    return Split(captions, files, torch.cat(features))


def _as_file(source: Any, image: Image.Image, path: Path) -> str:
    """The file that an image was read from; where there was none, `path`, to which it is written."""
    where = source if not isinstance(source, dict) else None if source.get("bytes") else source.get("path")
    if where is not None and not is_url(where):
        return str(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def make_index(model, splits: Sequence[Split]) -> tuple[FromageImageIndex, Path]:
    """An index of all images, with their captions and files, and the folder that they are below. An image that occurs
    several times has the first of its captions."""
    files = [file for split in splits for file in split.images]
    captions = [caption for split in splits for caption in split.captions]
    first: dict[str, int] = {}
    for row, file in enumerate(files):
        first.setdefault(file, row)
    rows = list(first.values())
    paths = [str(Path(files[row]).resolve()) for row in rows]
    index = FromageImageIndex(
        model.get_image_embeds(pooled_image_features=torch.cat([split.features for split in splits])[rows]),
        list(first),
        [{"caption": captions[row], "path": path} for row, path in zip(rows, paths, strict=True)],
        model_fingerprint=model.retrieval_fingerprint(),
    )
    return index, Path(os.path.commonpath([os.path.dirname(path) for path in paths]))


def wilson_interval(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate among n (Wilson score)."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(model, processor, collator, trainer, held_out: Split) -> dict[str, Any]:
    """Recall both ways, caption loss with right and shuffled images, captions, and text-to-image rankings."""
    metrics = trainer.evaluate()
    collator.training = False
    n = len(held_out.captions)
    results: dict[str, Any] = {"num_pairs": n, "chance": {f"R@{k}": min(1.0, k / n) for k in (1, 5, 10)}}
    for direction in ("text_to_image", "image_to_text"):
        results[direction] = {f"R@{k}": metrics[f"eval_{direction}_R@{k}"] for k in (1, 5, 10)}
        results[direction]["R@1_95%"] = wilson_interval(results[direction]["R@1"], n)
    rows = list(range(n))
    for name, order in (("caption_loss", rows), ("caption_loss_shuffled_images", rows[n // 2 :] + rows[: n // 2])):
        results[name], _, _ = score_captions(model, collator, held_out.features, order, held_out.captions)
    results["captions"] = generate_captions(model, processor, held_out.features, max_new_tokens=16)
    return results


@torch.no_grad()
def search_texts(model, processor, texts: list[str], index: FromageImageIndex, top_k: int):
    inputs = processor(text=[processor.retrieval_text(text) for text in texts], return_tensors="pt", padding=True)
    return index.search(model.get_text_embeds(inputs["input_ids"], inputs["attention_mask"]), top_k)


def converse(pipe: FromagePipeline, held_out: Split, prompts: list[str]) -> list[dict[str, Any]]:
    """A short interleaved conversation: the model says what a picture shows, and shows what a text asks for."""
    turns: list[dict[str, Any]] = []
    shown: list[str] = []
    for i in (0, len(held_out.images) // 2):
        turns.append({"role": "user", "image": held_out.images[i], "text": f"{pipe.processor.caption_prefix} ..."})
        said = pipe(Path(held_out.images[i]), max_new_tokens=16, max_num_rets=0, eos_token_id=None)
        text = " ".join(segment["text"] for segment in said)
        turns.append({"role": "model", "text": text, "truth": held_out.captions[i]})
        shown.append(held_out.images[i])
    for prompt in prompts:
        turns.append({"role": "user", "text": prompt})
        turns.append(answer(pipe, prompt, shown))
        shown += [turns[-1]["image"]] if "image" in turns[-1] else []
    return turns


def answer(pipe: FromagePipeline, prompt: str, shown: list[str]) -> dict[str, Any]:
    """Continue `prompt` up to the image of the first `[RET]`. A bias helps only where needed."""
    for ret_bias in (0.0, 2.0, 4.0, 8.0):
        segments = pipe(
            prompt,
            max_new_tokens=8,
            ret_bias=ret_bias,
            eos_token_id=pipe.processor.ret_token_id,
            stop_strings=None,
            exclude_ids=shown,
        )
        text = " ".join(segment["text"] for segment in segments if segment["type"] == "text")
        turn = {"role": "model", "text": text, "ret_bias": ret_bias}
        if segments and segments[-1]["type"] == "image":
            found = segments[-1]
            caption = found["metadata"]["caption"]
            return {**turn, "image": found["id"], "score": found["score"], "image_caption": caption}
    return turn


def prepare(options: argparse.Namespace, output: Path) -> tuple[str, str, Dataset, Dataset]:
    """Backbones and data: the given ones, else those of the packages (imported only where they are needed)."""
    language_model, vision_model = options.language_model, options.vision_model
    if not (language_model and vision_model and options.data):
        from .quickstart_emoji import emoji

        language_model = language_model or str(emoji.convert_language_model(output / "backbones/language_model"))
        vision_model = vision_model or str(emoji.convert_vision_model(output / "backbones/vision_model"))
    if options.data:
        parts = load_captioned_images(options.data).train_test_split(test_size=0.1, seed=0)
        return language_model, vision_model, parts["train"], parts["test"]
    tables = emoji.render_emoji(output / "data")
    return language_model, vision_model, *(load_captioned_images(str(table)) for table in tables)


def run(options: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    set_seed(0)
    parse_config(str(CONFIG), options.overrides)  # says now, not in some minutes, what is wrong with them
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"This takes about {options.train_minutes + 3:.0f} minutes on two CPU cores; a report follows in {output}.")
    language_model, vision_model, train_set, held_out_set = prepare(options, output)
    overrides = [f"language_model={language_model}", f"vision_model={vision_model}", f"output_dir={output / 'model'}"]
    model_args, data_args, args = parse_config(str(CONFIG), overrides + options.overrides)
    processor, model = assemble(model_args, text_dtype=fast_dtype(), vision_dtype=torch.float32)
    print(f"{type(model.language_model).__name__} in {model.language_model.dtype}. {describe_parameters(model)}.")
    train_split = encode(train_set, model, processor, output / "images" / "train")
    held_out = encode(held_out_set, model, processor, output / "images" / "held_out")
    collator = make_collator(processor, data_args, args.seed)
    train_dataset = train_split.dataset()
    seconds = 60 * options.train_minutes
    steps = steps_that_fit(model, collator, train_dataset, args.per_device_train_batch_size, seconds)
    args.max_steps = min(args.max_steps, steps)
    trainer = FromageTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=held_out.dataset(),
        data_collator=collator,
    )
    trainer.train()
    model.eval()
    results = evaluate(model, processor, collator, trainer, held_out)
    results["log_history"] = trainer.state.log_history
    results["steps"] = trainer.state.global_step

    figures = ("num_pairs", "steps", "text_to_image", "image_to_text", "caption_loss", "caption_loss_shuffled_images")
    trainer.save_metrics("all", {name: results[name] for name in figures}, combined=False)  # for the model card
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    index, image_root = make_index(model, [train_split, held_out])
    index.save_pretrained(output / "index")

    # What follows uses what a user would load.
    model = FromageForConditionalGeneration.from_pretrained(output / "model", dtype=model.language_model.dtype)
    processor = FromageProcessor.from_pretrained(output / "model")
    index = FromageImageIndex.from_pretrained(output / "index", image_root=image_root)
    pipe = FromagePipeline(model=model, processor=processor, index=index)
    gallery, _ = make_index(model, [held_out])
    results["rankings"] = search_texts(model, processor, held_out.captions, gallery, top_k=min(5, len(gallery)))[0]
    prompts = options.prompts or report.DEFAULT_PROMPTS
    results["conversation"] = converse(pipe, held_out, prompts)
    results["seconds"] = time.monotonic() - start
    results.update(provenance("cpu"))
    report.write(output, results, held_out.images, held_out.captions)
    return results


def main(argv: list[str] | None = None):
    parser = command_parser(__doc__)
    parser.add_argument("--language-model", help="Hub id or folder of a causal language model")
    parser.add_argument("--vision-model", help="Hub id or folder of a vision encoder")
    parser.add_argument("--data", help="TSV file or folder of captioned images")
    parser.add_argument("--output-dir", default="outputs/quickstart")
    parser.add_argument(
        "--train-minutes", type=at_least(0, float), default=5.0, help="about how long to train, 300 steps at most"
    )
    parser.add_argument("--prompts", nargs="*", help="texts to be answered with an image")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"replaces a key of {CONFIG.name}")
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        print(report.summary(run(options)))


if __name__ == "__main__":
    main()
