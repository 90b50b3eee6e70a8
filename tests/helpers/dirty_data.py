"""Captioned images of which some are bad, and runs on them."""

import io
import json
from pathlib import Path

from PIL import Image

from modeling_fromage import FromageDataCollator, FromageTrainer
from modeling_fromage.trainer.bad_example_list import BadExampleList
from modeling_fromage.trainer.bad_examples import ExampleReader, GoodExamples
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.training_runs import arguments

SKIP = {"on_bad_example": "skip", "max_bad_share": 1.0}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (number * 5 % 256, 90, 200))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def good(count: int) -> list[dict]:
    return [{"image": {"bytes": png(i), "path": f"{i}.png"}, "caption": f"number {i}"} for i in range(count)]


BAD = {
    "broken": {"image": {"bytes": png(1)[:60], "path": "cut.png"}},
    "no image": {"image": {"bytes": b"GIF89 of a kind", "path": "x.gif"}},
    "not found": {"image": "nowhere/x.png"},
    "empty caption": {"caption": "  "},
    "caption with a special token": {"caption": "a cat [RET]"},
    "malformed row": {"problem": "not JSON: ...", "image": None, "caption": None, "place": "t.jsonl, line 3"},
    "too thin": {"image": Image.new("RGB", (4000, 2))},
}


def dirty(count: int) -> list[dict]:
    """Examples, of which one of each kind is bad."""
    rows = good(count)
    for place, row in enumerate(BAD.values()):
        rows[3 * place + 2] |= row
    return rows


NUMBERS = [3 * place + 2 for place in range(len(BAD))]


def make_trainer(folder, data, collator=None, options=None, **kwargs):
    collator = collator or FromageDataCollator(make_processor(), concat_captions_prob=0.5)
    return FromageTrainer(model=make_model("opt_clip"), args=arguments(folder, **(options or {})), train_dataset=data,
                          data_collator=collator, **kwargs)  # fmt: skip


def listed(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "_bad_examples.jsonl").read_text().splitlines()]


def captions_of(rows):
    return [row["caption"] for row in rows]


def reading(collator, folder, data, share=1.0, **kwargs):
    return GoodExamples(data, ExampleReader(collator.prepare, BadExampleList(folder), "train", share), **kwargs)


class Refusing:
    """An image processor that raises for the picture of a number."""

    def __init__(self, inner, number):
        self.inner, self.number, self.passes = inner, number, 0

    def __call__(self, images, **kwargs):
        self.passes += 1
        if any(image.getpixel((0, 0)) == picture(self.number).getpixel((0, 0)) for image in images):
            raise RuntimeError("no size left")
        return self.inner(images, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)
