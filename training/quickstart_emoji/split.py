"""Which emoji the quickstart trains on, and which it is tested on.

Emoji are held out by families, so that nothing much like them is left in training: emoji whose names share a telling
word ("cat", "black cat", "grinning cat"), or of which drawings look alike to the vision encoder. A hash of a family's
first name decides on its side, once: `split.json` holds the outcome and is not drawn again. Sides:

- train: both drawings, the name and the keywords are trained on;
- redrawn: the name, the keywords and OpenMoji's drawing are, Twemoji's never;
- new: neither drawing, nor the name, nor the keywords.

The last two come in a part for validation, by which every choice was made, and a part for the test.
"""

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from .emoji import HANDS, Emoji

SPLIT = Path(__file__).with_name("split.json")
SIDES = {"test_redrawn": 0.18, "test_new": 0.15, "validation_redrawn": 0.13, "validation_new": 0.10}  # and train
_LARGEST_FAMILY = 6  # larger ones stay in training
_LOOK_ALIKE = 0.9  # cosine of two drawings' features
# Words that emoji share which have nothing else in common.
_COMMON = frozenset(
    """a an and at by for from in no not of on off over the to under up down with without
    back black blue brown bright closed dark double flat front full gray green grey half heavy high large left level
    light low medium new old open orange outlined pink purple raised red right round side small spiral tipped two three
    white yellow baby boy button child face facing figure girl hand hands man mark men people person pointing sign skin
    square symbol tone woman women eyes mouth""".split()
)


def read_split() -> dict[str, str]:
    """The side of each emoji that is held out, by its character; those that are not named are for training."""
    sides: dict[str, str] = json.loads(SPLIT.read_text(encoding="utf-8"))
    return {character: side for side, characters in sides.items() for character in characters.split()}


def families(emoji: Sequence[Emoji], features: Mapping[tuple[str, str], torch.Tensor]) -> list[list[int]]:
    """Rows of emoji that share a telling word of their names, or of which two drawings look alike.

    Args:
        features: The encoder's features `(width,)` of each drawing, by character and hand.
    """
    parent = list(range(len(emoji)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, each in enumerate(emoji):
        for word in telling_words(each.name):
            parent[root(row)] = root(first.setdefault(word, row))
    drawn = {hand: F.normalize(torch.stack([features[e.character, hand] for e in emoji]), dim=-1) for hand in HANDS}
    for hands in itertools.combinations_with_replacement(HANDS, 2):
        ours, theirs = (drawn[hand] for hand in hands)
        for row, column in (ours @ theirs.t() > _LOOK_ALIKE).nonzero().tolist():
            parent[root(row)] = root(column)
    members = defaultdict(list)
    for row in range(len(emoji)):
        members[root(row)].append(row)
    return list(members.values())


def telling_words(name: str) -> set[str]:
    """Words of a name that say what it is, in the singular."""
    words = set(re.findall("[a-z]{3,}", name.lower())) - _COMMON
    return {word.removesuffix("s") if len(word) > 4 else word for word in words}


def draw_split(emoji: Sequence[Emoji], features: Mapping[tuple[str, str], torch.Tensor]) -> dict[str, list[str]]:
    """The characters of each held-out side, by a hash of their families."""
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for rows in families(emoji, features):
        joined = any("\u200d" in emoji[row].character for row in rows)  # of a person, and drawn much like others
        if len(rows) > _LARGEST_FAMILY or joined:
            continue
        digest = hashlib.sha256(min(emoji[row].name for row in rows).encode()).digest()
        drawn = int.from_bytes(digest[:4], "big") / 2**32
        for side, share in SIDES.items():
            if drawn < share:
                sides[side] += [emoji[row].character for row in rows]
                break
            drawn -= share
    return sides
