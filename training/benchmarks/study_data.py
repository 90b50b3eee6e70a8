"""What the study of options trains on and tests with."""

from dataclasses import dataclass, field
from typing import Any

from modeling_fromage.messages_fromage import as_parts

from ..data.captioned_images import load_captioned_images
from .warm_start import read_rows

Rows = list[dict[str, Any]]


@dataclass
class StudyData:
    """One set: pairs to train on and held out, with `image` and `caption`; and documents where it has them."""

    name: str
    train: Rows
    held_out: Rows
    documents: Rows = field(default_factory=list)
    test_documents: str | None = None


def read_pairs(name: str, source: str) -> StudyData:
    train, held_out = read_rows(source)
    return StudyData(name, train, held_out)


def read_document_sets(name: str, source: str) -> StudyData:
    """Of `TRAIN,TEST`, tables of documents. A pair is an image and the text before it."""
    train, _, test = source.partition(",")
    if not test:
        raise ValueError(f"--documents takes NAME=TRAIN,TEST, got {source!r}.")
    documents = [{"document": row["document"]} for row in load_captioned_images(train)]
    held_out = [row for row in load_captioned_images(test)]
    return StudyData(name, _pairs_of(documents), _pairs_of(held_out), documents, test)


def _pairs_of(documents: Rows) -> Rows:
    pairs, seen = [], set()
    for row in documents:
        before = None
        for part in as_parts(row["document"]):
            if part["type"] == "text":
                before = part["text"]
            elif before is not None and (before, part["image"]) not in seen:
                seen.add((before, part["image"]))
                pairs.append({"image": part["image"], "caption": before})
    return pairs


__all__ = ["Rows", "StudyData", "read_document_sets", "read_pairs"]
