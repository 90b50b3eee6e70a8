"""Batches of documents, of token ids and pixels, for the tiny models."""

import torch

from tests.helpers.batches import CAPTIONS, IMAGE, RET, pad

# Tokens of documents; "image" with a [RET] before it, that is to find it, or without.
DOCUMENTS = [
    [2, 5, 6, "ret", "image", 7, 8, "ret", "image", 9],
    ["image", 2, 10, 11, "ret", "image"],
    [2, 12, "image", 13, 14, 15, "ret", "image", 16, 17, 18, 19],
]
ALL = (0, 1, 2)


def document_rows(k, numbers=ALL):
    """Ids, labels and the images to find of some documents, whose images are numbered through."""
    rows, image = [], 0
    for document in (DOCUMENTS[number] for number in numbers):
        ids, finds = [], []
        for part in document:
            ids += {"ret": [RET], "image": [IMAGE] * k}.get(part, [part])
            finds += [image] if part == "ret" else [-100] * (k if part == "image" else 1)
            image += part == "image"
        rows.append((ids, [-100 if token == IMAGE else token for token in ids], finds))
    return rows


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def make_batch(model, pixels, captions=(), documents=ALL):
    """Documents, and captioned images after them: `pixels` of 2 for each of all documents, then of all captions."""
    k = model.config.num_image_tokens
    rows = document_rows(k, documents)
    first = 2 * len(rows)
    for caption in captions:
        ids = [IMAGE] * k + CAPTIONS[caption]
        rows.append((ids, [-100] * k + CAPTIONS[caption], [-100] * len(ids)))
    images = [2 * number + image for number in documents for image in (0, 1)]
    images += [2 * len(DOCUMENTS) + caption for caption in captions]
    batch = {
        **pad([ids for ids, _, _ in rows], "right"),
        "labels": padded([labels for _, labels, _ in rows], -100),
        "ret_targets": padded([finds for _, _, finds in rows], -100),
        "pixel_values": pixels[images],
    }
    if not documents:  # a batch like any other
        del batch["ret_targets"]
    if captions:
        retrieval = pad([CAPTIONS[i] + [RET] for i in captions], "right")
        batch |= {f"retrieval_{name}": value for name, value in retrieval.items()}
        batch["retrieval_targets"] = torch.arange(len(captions)) + first
    return batch
