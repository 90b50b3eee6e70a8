"""The training and the evaluation data of a training file: sources, weights, cached features, what is held out."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from modeling_fromage.io.columns import document_columns
from modeling_fromage.io.command_line import did_you_mean

from .captioned_images import load_captioned_images
from .examples import Mixture, Selected, hold_out

# Of a dataset and the folder of its features: a dataset that has these in the place of images.
WithFeatures = Callable[[Any, str], Any]
INDEXES = "_shard_indexes"  # the folder of the indexes of shards that are read in place; nothing with "_" is pushed


@dataclass(kw_only=True)
class Source:
    """One source of data: see [`load_captioned_images`]. `weight` is how often an epoch sees each of its examples."""

    source: str
    split: str
    image_column: str | None
    caption_column: str | None
    weight: float = 1.0


def read_sources(data: Any, split: str, image_column: str | None, caption_column: str | None) -> list[Source]:
    """The sources that `train_data` or `eval_data` names: a text, or a list of texts and of mappings with `source`, and
    possibly `split`, `image_column`, `caption_column` and `weight`.

    Raises:
        ValueError: It has another form.
    """
    defaults: Any = {"split": split, "image_column": image_column, "caption_column": caption_column}
    known = [field.name for field in fields(Source)]
    sources = []
    for entry in data if isinstance(data, list) else [data]:
        entry = {"source": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ValueError(f"A source of data is a text, or a mapping with `source: ...`, got {entry!r}.")
        if unknown := [str(key) for key in entry if key not in known]:
            hint = did_you_mean(unknown[0], known) or f"There are {', '.join(known)}."
            raise ValueError(f"The source {entry['source']} has no key {unknown[0]!r}. {hint}")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(
                f"`weight` is how often an epoch sees each example of {entry['source']}: more than 0, got {weight!r}."
            )
        sources.append(Source(**{**defaults, **entry}))
    if not sources:
        raise ValueError("The list of data is empty. Name a source.")
    return sources


@dataclass
class DataLoading:
    """How the data of a training file are loaded.

    Args:
        data_args: `DataArguments`.
        seed: Seed of what is held out.
        keep_problems: Whether rows that cannot be read are examples: see [`load_captioned_images`].
        index_dir: Where the indexes of shards are kept.
    """

    data_args: Any
    seed: int = 0
    keep_problems: bool = False
    index_dir: str | Path | None = None

    def parts(self, data: Any, split: str) -> tuple[list[Any], list[float]]:
        """The dataset and the weight of every source."""
        args = self.data_args
        sources = read_sources(data, split, args.image_column, args.caption_column)
        parts = [
            load_captioned_images(
                source.source,
                source.split,
                source.image_column,
                source.caption_column,
                args.streaming,
                keep_problems=self.keep_problems,
                index_dir=self.index_dir,
                shuffle_window=args.shuffle_window,
            )
            for source in sources
        ]
        return parts, [source.weight for source in sources]

    def all_examples(self, for_evaluation: bool = False) -> Any:
        """All of `train_data`, or of `eval_data`: each example once, the sources one after the other."""
        args = self.data_args
        if for_evaluation:
            return _joined(self.parts(args.eval_data, args.eval_split)[0])
        return _joined(self.parts(args.train_data, args.train_split)[0])

    def train_and_eval(self, with_features: WithFeatures) -> tuple[Any, Any]:
        """The training data, and those for evaluation: `eval_data`, or what `eval_fraction` holds out, or `None`.

        Raises:
            ValueError: Both or neither of them can be had, or the data cannot be loaded.
        """
        args = self.data_args
        parts, weights = self.parts(args.train_data, args.train_split)
        parts = _with_features(parts, args.feature_cache, with_features)
        evaluation = None
        if args.eval_data is not None:
            if args.eval_fraction:
                raise ValueError("`eval_fraction` holds out a share of train_data, and `eval_data` is named. Drop one.")
            found = self.parts(args.eval_data, args.eval_split)[0]
            evaluation = _joined(_with_features(found, args.eval_feature_cache, with_features))
        elif args.eval_fraction:
            split = [hold_out(part, args.eval_fraction, self.seed + number) for number, part in enumerate(parts)]
            parts, held = map(list, zip(*split, strict=True))
            held = [part for part in held if len(part)]
            if not held or not all(map(len, parts)):
                count = sum(map(len, parts)) + sum(map(len, held))
                raise ValueError(
                    f"`eval_fraction={args.eval_fraction}` of {count} examples leaves none to evaluate or to train on. "
                    "Give another, or name `eval_data`."
                )
            evaluation = _joined(held)
        is_plain = len(parts) == 1 and weights == [1]
        return parts[0] if is_plain else Mixture(parts, weights), evaluation


def refuse_documents(dataset: Any) -> None:
    """Raise a `ValueError` where there are documents among the examples, whose features no cache holds."""
    if document_columns(getattr(dataset, "column_names", ())):
        raise ValueError(
            "A feature cache holds a vector for each captioned image, and there are documents in the data. Train on "
            "these without `feature_cache`; the encoder then runs in every step."
        )


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else Mixture(parts)


def _with_features(parts: list[Any], directory: str | None, with_features: WithFeatures) -> list[Any]:
    """The same examples with the features that were cached of all of them together."""
    if directory is None:
        return parts
    refuse_documents(_joined(parts))
    features = with_features(_joined(parts), directory)
    if len(parts) == 1:
        return [features]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return [Selected(features, range(end - len(part), end)) for part, end in zip(parts, ends, strict=True)]


__all__ = ["INDEXES", "DataLoading", "Source", "read_sources", "refuse_documents"]
