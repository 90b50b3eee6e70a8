"""A training batch as the model gets it, on a picture: what is left of an image, and each token."""

import torch
from PIL import Image

from modeling_fromage import FromageProcessor
from modeling_fromage.trainer.pictures import Cell, Word, draw_sheet, words_of

_SHOWN = 24  # images on the picture


def sheet_of_batch(batch: dict[str, torch.Tensor], processor: FromageProcessor) -> Image.Image:
    """A row for each of the first images of a batch: the image, the sequence that it stands in, and what it is to be
    found by."""
    is_image = batch["input_ids"] == processor.image_token_id
    counts = is_image.sum(1) // processor.num_image_tokens
    sequences = torch.arange(len(counts)).repeat_interleave(counts).tolist()
    found_by = _texts_of_images(batch, processor, len(sequences))
    cells = []
    for number, sequence in list(enumerate(sequences))[:_SHOWN]:
        shown = words_of("(in the text above)")
        if not number or sequences[number - 1] != sequence:
            shown = tokens_as_words(
                *(batch[name][sequence] for name in ("input_ids", "attention_mask")), processor,
                batch["labels"][sequence],
            )  # fmt: skip
        picture = picture_of(batch["pixel_values"][number], processor) if "pixel_values" in batch else None
        cells.append([Cell(picture), Cell(words=shown), Cell(words=found_by[number])])
    images = "image" if "pixel_values" in batch else "image (cached features)"
    titles = [images, "captioning: targets on green", f"retrieval: {processor.ret_token} on orange"]
    return draw_sheet(titles, cells, [200, 460, 320])


def _texts_of_images(batch: dict[str, torch.Tensor], processor: FromageProcessor, count: int) -> list[list[Word]]:
    """What each image is to be found by: a text of its own, or what stands before it in a document."""
    found = [words_of("(by nothing)")] * count
    for image in batch.get("ret_targets", torch.tensor([-100])).unique().tolist():
        if image >= 0:
            found[image] = words_of(f"(by all that stands before its {processor.ret_token})")
    texts, masks = batch.get("retrieval_input_ids", ()), batch.get("retrieval_attention_mask", ())
    images = batch.get("retrieval_targets", torch.arange(len(texts))).tolist()
    for image, text, mask in zip(images, texts, masks, strict=True):
        found[image] = tokens_as_words(text, mask, processor)
    return found


def tokens_as_words(
    ids: torch.Tensor, mask: torch.Tensor, processor: FromageProcessor, labels: torch.Tensor | None = None
) -> list[Word]:
    """Tokens (L,) as they are read, with their spaces; placeholders of an image as one."""
    words: list[Word] = []
    for place, number in enumerate(ids.tolist()):
        if not mask[place]:
            continue
        text = processor.tokenizer.decode([number])
        if number == processor.image_token_id:
            if not (words and words[-1].text == text):
                words.append(Word(text, "lightblue"))
            continue
        ground = "palegreen" if labels is not None and labels[place] != -100 else "whitesmoke"
        if number in processor.ret_token_ids:
            ground = "orange"
        words.append(Word(text.replace(" ", "\u00b7").replace("\n", "\\n"), ground))
    return words


def picture_of(pixels: torch.Tensor, processor: FromageProcessor) -> Image.Image | None:
    """The image that the encoder gets, (3, height, width); `None` where it gets patches."""
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        return None
    pixels = pixels.float()
    mean, std = (getattr(processor.image_processor, f"image_{name}", None) for name in ("mean", "std"))
    if getattr(processor.image_processor, "do_normalize", True) and mean is not None and std is not None:
        pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        pixels = (pixels - pixels.amin()) / (pixels.amax() - pixels.amin()).clamp_min(1e-6)
    return Image.fromarray((255 * pixels.clamp(0, 1)).byte().permute(1, 2, 0).numpy())


__all__ = ["picture_of", "sheet_of_batch", "tokens_as_words"]
