"""What tests of the pipeline share: pictures, a model that generates given tokens, and answers that compare well."""

from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

COLOURS = ["red", "green", "blue", "white", "black", "orange"]
NEWLINE, RET = 202, 501  # token ids


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


class Script(LogitsProcessor):
    """Makes a model generate these tokens whatever it would, one list for each call of `generate`."""

    def __init__(self, *scripts: list[int]):
        self.scripts, self.widths = [list(script) for script in scripts], []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = input_ids.shape[1]
        if not self.widths or width != self.widths[-1] + len(self.written):
            self.widths.append(width)
            self.written, self.script = [], self.scripts.pop(0)
        token = self.script[len(self.written)]
        self.written.append(token)
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def scripted(*scripts: list[int]) -> dict[str, Any]:
    """Options of the pipeline with which the model generates `scripts`."""
    return {"logits_processor": LogitsProcessorList([Script(*scripts)]), "max_new_tokens": sum(map(len, scripts))}


def kinds(segments: list[dict[str, Any]]) -> list[str]:
    return [segment["type"] for segment in segments]


def plain(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments without scores and images."""
    return [{name: value for name, value in s.items() if name not in ("score", "image")} for s in segments]
