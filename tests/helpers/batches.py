"""Batches of token ids and pixels for the tiny models."""

import torch

from tests.helpers.backbones import VOCAB, make_model

IMAGE, RET, PAD = VOCAB, VOCAB + 1, 1


def interleaved(model):
    """Rows of different lengths with two, one and no image, [RET] inside and last."""
    k = model.config.num_image_tokens
    rows = [
        [IMAGE] * k + [2, 10, 11] + [IMAGE] * k + [12, RET],
        [2, 20, 21, RET, 22, 23] + [IMAGE] * k + [24, 25, RET],
        [2, 30, 31, RET],
    ]
    return rows, torch.rand(3, 3, 32, 32)


def pad(rows, side):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


CAPTIONS = [[2, 5, 6], [2, 7], [2, 8, 9, 10], [2, 11, 12, 13, 14, 15], [2, 16, 17], [2, 18, 19, 20, 21]]


def double_model(name: str, **config_kwargs):
    model = make_model(name, **config_kwargs)
    model.double().train()
    model.adapter.double()
    return model


def make_batch(model, pixels, indices, concatenated=False, side="right"):
    k = model.config.num_image_tokens
    rows = [[IMAGE] * k + CAPTIONS[i] for i in indices]
    if concatenated:
        rows = [sum(rows[i : i + 2], []) for i in range(0, len(rows), 2)]
    captioning, retrieval = pad(rows, side), pad([CAPTIONS[i] + [RET] for i in indices], side)
    is_no_target = (captioning["input_ids"] == IMAGE) | (captioning["attention_mask"] == 0)
    return {
        **captioning,
        "labels": captioning["input_ids"].masked_fill(is_no_target, -100),
        "pixel_values": pixels[indices],
        "retrieval_input_ids": retrieval["input_ids"],
        "retrieval_attention_mask": retrieval["attention_mask"],
    }
