"""Retrieval of the images of interleaved documents, each from what stands before it: the paper's protocol on VIST
(section 4.1) for any documents.

A context is the last 1, 2, 4, ... or all texts before an image; once alone, once with the images that stand among them.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.backbones_fromage import context_length
from modeling_fromage.images_fromage import is_url
from modeling_fromage.io.command_line import at_least
from modeling_fromage.late_interaction_fromage import similarities
from modeling_fromage.messages_fromage import Part, as_parts, image_source
from modeling_fromage.trainer.document_contexts import last_parts, last_tokens
from modeling_fromage.trainer.document_sequences import with_rets
from modeling_fromage.trainer.documents import document_of

from ..data.captioned_images import load_captioned_images
from .evaluator import Evaluation, Evaluator
from .images import EncodedImages, encode_images
from .metrics import rank_metrics, target_ranks, wilson_interval
from .prompts import embed_prompts, has_special_token, image_embeds

ALL = "all texts"


@dataclass
class Documents:
    """Documents whose images are named by their contents, the images' sources by these names, and counts of what was
    left out by reason."""

    parts: list[list[Part]] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Query:
    """An image to be found, and the parts that stand before it."""

    before: list[Part]
    target: str

    @property
    def texts(self) -> int:
        return sum(part["type"] == "text" for part in self.before)

    def context(self, texts: int | None, with_images: bool) -> list[Part]:
        """The last `texts` texts, or all; with the images from the first of these on."""
        return last_parts(self.before, texts, with_images)


def read_documents(data: str, processor: FromageProcessor, folder: Path | None = None) -> Documents:
    """Read documents from what [`load_captioned_images`] reads. Of a chat the parts of all messages are one document.

    Args:
        folder: Where images are looked for that are not where the data name them, by the names of their files.

    Raises:
        ValueError: The data hold no documents.
    """
    found = Documents()
    for row in load_captioned_images(data, keep_problems=True):
        document = document_of(row)
        if document is None and not row.get("problem"):
            raise ValueError(f"{data} has captioned images, not documents. Evaluate on it with `captions`.")
        try:
            parts = _parts(document)
        except (ValueError, TypeError, KeyError, AttributeError):
            found.left_out["a malformed document"] += 1
            continue
        if has_special_token(processor, [part["text"] for part in parts if part["type"] == "text"]):
            found.left_out["a special token in a text"] += 1
            continue
        for part in parts:
            if part["type"] == "image":
                source = _located(image_source(part), folder)
                part["id"] = _name(source)
                found.sources.setdefault(part["id"], source)
        found.parts.append(parts)
    return found


def _parts(document: dict[str, Any] | None) -> list[Part]:
    if document is None:
        raise ValueError("There is no document.")
    content = document.get("document")
    if content is None:
        content = [part for message in document["messages"] for part in _content_of(message)]
    if not isinstance(content, (list, tuple)):
        raise ValueError("A document is a list.")
    parts = as_parts(content)
    if any(part["type"] not in ("text", "image") for part in parts):
        raise ValueError("A document has texts and images.")
    return [{name: value for name, value in part.items() if name != "ret_index"} for part in parts]


def _content_of(message: dict[str, Any]) -> Sequence[Any]:
    content = message["content"]
    return [content] if isinstance(content, str) else content


def _located(source: Any, folder: Path | None) -> Any:
    if folder is None or not isinstance(source, str) or is_url(source) or Path(source).is_file():
        return source
    return str(folder / Path(source).name)


def _name(source: Any) -> str:
    """What an image is known by: its contents, where they are at hand, so that copies of it are one."""
    path = source.get("path") if isinstance(source, dict) and not source.get("bytes") else source
    data = source.get("bytes") if isinstance(source, dict) else None
    if data is None and isinstance(path, (str, Path)) and not is_url(str(path)) and Path(path).is_file():
        data = Path(path).read_bytes()
    return hashlib.sha256(bytes(data) if data else repr(source).encode()).hexdigest()[:32]


def queries_of(documents: Documents, images: EncodedImages) -> list[Query]:
    """The images with a text before them. What cannot be read is in no context, and is not to be found."""
    found = []
    for parts in documents.parts:
        before: list[Part] = []
        for part in parts:
            if part["type"] == "image" and part["id"] not in images:
                documents.left_out["an image that cannot be read"] += 1
                continue
            if part["type"] == "image" and any(each["type"] == "text" for each in before):
                found.append(Query(before.copy(), part["id"]))
            before.append(part)
    return found


@dataclass
class Prompts:
    """Token ids of prompts that end in `[RET]`, and the ids of the images that each shows."""

    ids: list[list[int]]
    images: list[list[str]]
    num_cut: int


def make_prompts(
    processor: FromageProcessor, contexts: Sequence[list[Part]], max_tokens: int, rets_in_context: bool
) -> Prompts:
    """Lay contexts out as the pipeline lays out prompts. One that is too long loses its first tokens, and an image of
    which any are among these."""
    prompts = Prompts([], [], 0)
    for context in contexts:
        shown = with_rets(context) if rets_in_context else context
        ids = processor.token_ids(processor.join_parts([*shown, {"type": "ret"}]))
        whole = len(ids)
        ids = last_tokens(processor, ids, max_tokens)
        count = ids.count(processor.image_token_id) // processor.num_image_tokens
        images = [part["id"] for part in context if part["type"] == "image"]
        prompts.ids.append(ids)
        prompts.images.append(images[len(images) - count :])
        prompts.num_cut += len(ids) < whole
    return prompts


@dataclass(kw_only=True)
class DocumentsEvaluator(Evaluator):
    """Recall of the images of documents, each from what stands before it.

    The gallery has every readable image of the documents once. A document's images that come before the one to be found
    are no candidates, whether or not they are shown, so that all contexts choose among the same.

    Args:
        data: Documents, in a file or a folder.
        images: A folder of images that are not where the data name them.
        texts: Lengths of the contexts, in texts; all texts come besides.
        max_tokens: Tokens of a context; longer ones lose their beginning. At most what the language model takes.
        max_queries: Images to be found at most, spread evenly over the documents; all where absent.
        rets_in_context: Put `[RET]` before the images of a context, where a model that was trained on documents has
            seen it.
    """

    name: ClassVar[str] = "documents"
    sections: ClassVar[Mapping[str, str]] = {"contexts": "document_to_image"}

    data: str
    images: Path | None = None
    texts: Sequence[int] = (1, 2, 4)
    max_tokens: int = 512
    max_queries: int | None = None
    rets_in_context: bool = False

    @property
    def primary_metric(self) -> str:
        return f"document_to_image_{ALL.replace(' ', '_')}_images_R@1"

    @property
    def data_files(self) -> list[Path]:
        return [Path(self.data)]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", required=True, help="documents: JSON lines, Parquet, a folder, a Hub data set")
        parser.add_argument("--images", type=Path, help="folder of images that are not where the data name them")
        parser.add_argument(
            "--texts", type=at_least(1), nargs="+", default=list(cls.texts), help="texts of a context; and all of them"
        )
        parser.add_argument("--max-tokens", type=at_least(2), default=cls.max_tokens, help="of a context")
        parser.add_argument("--max-queries", type=at_least(1), help="images to be found at most, spread evenly")
        parser.add_argument(
            "--rets-in-context",
            action="store_true",
            help="[RET] before a context's images, as a document has it in training",
        )

    def run(self, model: FromageForConditionalGeneration, processor: FromageProcessor) -> Evaluation:
        if self.dual_encoder is not None:
            raise ValueError("A dual encoder embeds single texts, not documents. Leave it out.")
        documents = read_documents(self.data, processor, self.images)
        if not documents.sources:
            raise ValueError(f"{self.data} has no images in its documents: {dict(documents.left_out)}.")
        return self.rank(
            model, processor, documents, encode_images(model, processor, documents.sources, batch_size=self.batch_size)
        )

    def rank(
        self,
        model: FromageForConditionalGeneration,
        processor: FromageProcessor,
        documents: Documents,
        images: EncodedImages,
    ) -> Evaluation:
        """The evaluation of documents whose images are encoded already."""
        queries = queries_of(documents, images)
        if not queries:
            raise ValueError(f"{self.data} has no image with a text before it: {dict(documents.left_out)}.")
        if self.max_queries is not None:
            step = len(queries) / min(self.max_queries, len(queries))
            queries = [queries[int(number * step)] for number in range(min(self.max_queries, len(queries)))]
        gallery = image_embeds(model, images.features)
        figures: dict[str, dict[str, Any]] = {}
        cut = {}
        for texts in (*sorted(set(self.texts)), None):
            for with_images in (False, True):
                name = ALL if texts is None else f"{texts} text{'s' * (texts > 1)}"
                name += " + images" * with_images
                prompts = self._prompts(model, processor, queries, texts, with_images)
                features = [images.features[images.rows_of(shown)] for shown in prompts.images]
                embeds = embed_prompts(model, processor, prompts.ids, features, self.batch_size)
                figures[name] = {"ours": _with_intervals(_ranks(similarities(embeds, gallery), queries, images))}
                cut[name] = prompts.num_cut
        candidates = sum(len(images.ids) - len(_earlier(query)) for query in queries) / len(queries)
        results = {
            "contexts": figures,
            "chance": {f"R@{k}": min(1.0, k / candidates) for k in (1, 5, 10)},
            "cut": {"max_tokens": self.max_tokens, **cut},
            "gallery": {"rule": "every readable image of the documents, copies once", "N": len(images.ids)},
            "masking": "a document's earlier images are no candidates",
            "denominator": {"rule": "images with a text before them", "N": len(queries)},
            "images": images.report(),
            "documents": {"read": len(documents.parts), "left_out": dict(documents.left_out)},
            "rets_in_context": self.rets_in_context,
        }
        manifest = {"gallery": images.ids, "queries": [query.target for query in queries], "not_usable": images.skipped}
        return Evaluation(results, manifest)

    def _prompts(
        self,
        model: FromageForConditionalGeneration,
        processor: FromageProcessor,
        queries: Sequence[Query],
        texts: int | None,
        with_images: bool,
    ) -> Prompts:
        limit = int(min(self.max_tokens, context_length(model.config.text_config)))
        contexts = [query.context(texts, with_images) for query in queries]
        return make_prompts(processor, contexts, limit, self.rets_in_context)


def _earlier(query: Query) -> set[str]:
    return {part["id"] for part in query.before if part["type"] == "image"} - {query.target}


def _ranks(scores: torch.Tensor, queries: Sequence[Query], images: EncodedImages) -> torch.Tensor:
    """Rank (queries,) of each target, by scores (queries, images)."""
    for row, query in enumerate(queries):
        scores[row, images.rows_of(sorted(_earlier(query)))] = -torch.inf
    return target_ranks(scores, torch.tensor(images.rows_of([query.target for query in queries])))


def _with_intervals(ranks: torch.Tensor) -> dict[str, Any]:
    found = rank_metrics(ranks)
    recall = {name: value for name, value in found.items() if name.startswith("R@")}
    return {**found, "95%": {name: list(wilson_interval(value, len(ranks))) for name, value in recall.items()}}


__all__ = ["Documents", "DocumentsEvaluator", "Prompts", "Query", "make_prompts", "queries_of",
           "read_documents"]  # fmt: skip
