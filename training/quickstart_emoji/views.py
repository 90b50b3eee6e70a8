"""What the quickstart trains on: of each emoji its drawings, and drawings as the other hand might have made them.

The difference between two drawings of one emoji is the difference of the hands, much the same whatever is drawn. Added
to the features of another emoji's drawing, it gives a likely one that nobody drew. That is how pictures can be
augmented whose features are cached, and the projections learn to look past the hand.
"""

from collections.abc import Sequence

import torch
from datasets import Dataset

from .data import Split
from .emoji import HANDS, Emoji
from .texts import texts_of

_SHIFTED = 3  # views of each drawing, beside as many copies of itself


def training_rows(emoji: Sequence[Emoji], train: Split, seed: int = 0) -> Dataset:
    """A row for each emoji with a drawing in `train`: its name, its texts for retrieval, and views `(V, width)`."""
    names: dict[str, Emoji] = {each.name: each for each in emoji}
    drawings: dict[str, dict[str, torch.Tensor]] = {}
    for name, file, features in zip(train.captions, train.images, train.features, strict=True):
        drawings.setdefault(name, {})[file.split(".")[-2]] = features
    differences = differences_of_hands(list(drawings.values()))
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "caption": name,
            "retrieval_caption": texts_of(names[name]),
            "pooled_image_features": views(of_hand, differences, generator).numpy(),
        }
        for name, of_hand in drawings.items()
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return Dataset.from_dict(columns).with_format("torch", columns=["pooled_image_features"], output_all_columns=True)


def differences_of_hands(drawings: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The second hand's features less the first's, of each emoji that both have drawn: `(number of these, width)`."""
    first, second = HANDS
    both = [of_hand[second] - of_hand[first] for of_hand in drawings if len(of_hand) == len(HANDS)]
    return torch.stack(both) if both else torch.zeros(1, next(iter(drawings[0].values())).shape[-1])


def views(of_hand: dict[str, torch.Tensor], differences: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An emoji's drawings, and each of them shifted to the other hand by the differences of emoji drawn at random."""
    found = []
    for hand, features in of_hand.items():
        shifts = differences[torch.randint(len(differences), (_SHIFTED,), generator=generator)]
        found += [features.expand(_SHIFTED, -1), features + (shifts if hand == HANDS[0] else -shifts)]
    return torch.cat(found)
