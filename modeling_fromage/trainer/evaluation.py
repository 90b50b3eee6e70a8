"""What an evaluation reports: the mean of each loss, recall among all pairs, and captions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils.logging import tqdm

from ..modeling_fromage import FromageForConditionalGeneration
from ..processing_fromage import FromageProcessor
from ..training_losses_fromage import LOSS_WEIGHTS
from .ranking import recall_in_both_directions

_OF_RETRIEVAL = ("ret_token_loss", "contrastive_loss")


@contextmanager
def evaluating(collator: Any) -> Iterator[None]:
    """Without what a `collator` does in training alone, if it is one of ours: captions are not concatenated."""
    was_training = getattr(collator, "training", None)
    if was_training is None:
        yield
        return
    collator.training = False
    try:
        yield
    finally:
        collator.training = was_training


def kept_of(outputs: Any) -> dict[str, torch.Tensor]:
    """What an evaluation keeps of a batch's outputs. The losses of retrieval are NaN where the batch has nothing to be
    found."""
    names = (*LOSS_WEIGHTS, "image_embeds", "text_embeds", "loss")
    kept = {name: outputs[name].detach() for name in names if outputs.get(name) is not None}
    if "text_embeds" in kept and not len(kept["text_embeds"]):
        kept |= {name: torch.full_like(kept[name], torch.nan) for name in _OF_RETRIEVAL}
    return kept


def mean_losses_and_recall(predictions: dict[str, Any]) -> dict[str, float]:
    """Metrics of the outputs of an evaluation.

    Args:
        predictions (`dict`): Of N pairs, by name: each loss, (N,), that of a batch once a pair; `image_embeds` and
            `text_embeds`, (N, projection_dim).
    """
    # The Trainer's own mean of the loss counts the last, smaller batch of a stream as a whole one.
    names = [name for name in ("loss", *LOSS_WEIGHTS) if name in predictions]
    means = {name: torch.nanmean if name in _OF_RETRIEVAL else torch.mean for name in names}
    metrics = {name: float(mean(torch.as_tensor(predictions[name]).float())) for name, mean in means.items()}
    if "image_embeds" in predictions:
        embeds = (torch.as_tensor(predictions[name]) for name in ("image_embeds", "text_embeds"))
        metrics |= recall_in_both_directions(*embeds)
    return metrics


@torch.no_grad()
def generate_captions(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    features: torch.Tensor,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[str]:
    """Greedy captions of images with pooled features (N, vision_width), up to a stop string or an end token.

    The prompt and the stop strings are the processor's, as in training.
    """
    prompt, stops = torch.tensor([processor.caption_prompt_ids()]), processor.caption_stop_strings
    texts = []
    for chunk in tqdm(features.split(batch_size), desc="Writing captions", disable=len(features) <= batch_size):
        ids = prompt.expand(len(chunk), -1).to(model.device)
        sequences = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pooled_image_features=chunk.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=stops,
            tokenizer=processor.tokenizer,
            pad_token_id=processor.tokenizer.pad_token_id,
            max_num_rets=0,
        )
        for text in processor.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True):
            texts.append(min((text.partition(stop)[0] for stop in stops), key=len).strip())
    return texts


__all__ = ["evaluating", "generate_captions", "kept_of", "mean_losses_and_recall"]
