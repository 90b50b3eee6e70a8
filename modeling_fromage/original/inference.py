"""What the authors' `generate_for_images_and_texts` and `get_log_lik_scores` return, for comparison.

These functions keep the rules of kohjingyu/fromage at b36a188 (`fromage/models.py`), which [`InterleavedGeneration`]
replaces:

- exactly `num_words` tokens are generated; no token ends an answer;
- the text after the first newline is dropped, unless the very first token is a newline: then nothing is dropped;
- each text is cut after its first newline, else after its first full stop, and " [RET]" is appended;
- only the first `max_num_rets` `[RET]`s count, and the text after the last of them is dropped;
- an image that was tried, readable or not, is not tried again;
- with `num_words=0` the prompt's own `[RET]`s count, at the positions that they would have without image tokens.

They differ where the authors' code fails: a `[RET]` that is the last token has an embedding, an index may be smaller
than `max_img_per_ret + 3`, and a prompt may have no text. Images keep their own size, and `<|image|>` is never
generated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..images_fromage import UnreadableImageError, load_rgb_image
from ..index.index import FromageImageIndex
from ..modeling_fromage import FromageForConditionalGeneration
from ..processing_fromage import FromageProcessor

_SPARE_IMAGES = 3


def original_generation(
    model: FromageForConditionalGeneration,
    processor: FromageProcessor,
    prompts: Sequence[str | Image.Image],
    index: FromageImageIndex,
    num_words: int = 0,
    ret_scale_factor: float = 1.0,
    min_word_tokens: int = 0,
    top_p: float = 1.0,
    temperature: float = 0.0,
    max_num_rets: int = 1,
    max_img_per_ret: int = 1,
) -> list[dict[str, Any]]:
    """Answer an interleaved prompt by the rules above. The arguments are the authors'.

    Returns:
        `{"type": "text", "text": ...}` and `{"type": "images", "ids": [...], "images": [...]}`, in order.

    Raises:
        ValueError: `[RET]` is several tokens, which the authors' code does not know.
    """
    if model.config.num_ret_tokens > 1:
        raise ValueError(
            f"The authors' code knows one [RET] token, and this model has {model.config.num_ret_tokens} in a row. Use "
            "FromagePipeline."
        )
    ids, pixels, is_text = original_prompt(model, processor, prompts)
    images = {} if pixels is None else {"pixel_values": pixels}
    if num_words == 0:
        tokens = ids[0, is_text].tolist()
        # Quirk: the position of `[RET]` among the text's tokens is used among all tokens.
        at = torch.zeros_like(ids, dtype=torch.bool)
        at[0, [i for i, token in enumerate(tokens) if token == processor.ret_token_id]] = True
        visual = None if pixels is None else model.get_image_features(pixels).pooler_output
        embed_positions: Any = model.embed_positions
        embeds = embed_positions(ids, torch.ones_like(ids), visual, at)[0]
    else:
        output: Any = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **images,
            max_new_tokens=num_words,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
            ret_scale_factor=ret_scale_factor,
            ret_bias=0.0,
            min_tokens_before_ret=min_word_tokens,
            max_num_rets=None,
            eos_token_id=model.config.image_token_id,  # never generated, so nothing ends the answer
            pad_token_id=processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        embeds = output.ret_embeds[0]
        newline = processor.tokenizer("\n", add_special_tokens=False).input_ids[0]
        end = tokens.index(newline) if newline in tokens else 0
        tokens = tokens[:end] if end > 0 else tokens
    return original_segments(tokens, embeds, processor, index, max_num_rets, max_img_per_ret)


def original_prompt(
    model: FromageForConditionalGeneration, processor: FromageProcessor, prompts: Sequence[str | Image.Image]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Lay a prompt out as the authors do: BOS before the first text, and every text tokenised by itself.

    Returns:
        Token ids (1, L), pixel values or `None`, and a mask (L,) that is True for the tokens of texts.
    """
    ids: list[int] = []
    is_text: list[bool] = []
    images, has_bos = [], False
    for prompt in prompts:
        if isinstance(prompt, str):
            text = prompt if has_bos else processor.bos_text + prompt
            tokens, has_bos = processor.tokenizer(text, add_special_tokens=False).input_ids, True
        else:
            tokens = [processor.image_token_id] * processor.num_image_tokens
            images.append(load_rgb_image(prompt))
        ids += tokens
        is_text += [isinstance(prompt, str)] * len(tokens)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device) if images else None
    return torch.tensor([ids], device=model.device), pixels, torch.tensor(is_text, device=model.device)


def original_segments(
    tokens: list[int],
    embeds: torch.Tensor,
    processor: FromageProcessor,
    index: FromageImageIndex,
    max_num_rets: int,
    max_img_per_ret: int,
) -> list[dict[str, Any]]:
    """Generated tokens, whose R `[RET]`s have `embeds` (R, q), as the authors' list of texts and images."""
    places = [i for i, token in enumerate(tokens) if token == processor.ret_token_id][:max_num_rets]
    if not places:
        return [{"type": "text", "text": truncate_caption(_decode(processor, tokens))}]
    segments: list[dict[str, Any]] = []
    tried: list[str] = []
    for place, start, embed in zip(places, [0, *(place + 1 for place in places)], embeds, strict=False):
        text = truncate_caption(_decode(processor, tokens[start:place]))
        segments.append({"type": "text", "text": f"{text} {processor.ret_token}"})
        ids, images = [], []
        left = len(index) - len(tried)
        wanted = min(max_img_per_ret + _SPARE_IMAGES, left)
        found = index.search(embed[None], wanted, tried)[0][0] if wanted else []
        for image_id in found:
            tried.append(image_id)
            try:
                images.append(index.load_image(image_id))
                ids.append(image_id)
            except UnreadableImageError:
                continue
            if len(images) == max_img_per_ret:
                break
        segments.append({"type": "images", "ids": ids, "images": images})
    return segments


def truncate_caption(caption: str) -> str:
    """Strip newlines at both ends, then cut the caption after its first newline, else after its first full stop."""
    caption = caption.strip("\n")
    for end in ("\n", "."):
        if end in caption:
            return caption[: caption.index(end) + 1]
    return caption


@torch.no_grad()
def original_log_likelihood(
    model: FromageForConditionalGeneration, processor: FromageProcessor, prompts: Sequence[str | Image.Image]
) -> float:
    """The mean log-likelihood of a prompt's text tokens, without its images; NaN where there is none to predict."""
    ids, pixels, is_text = original_prompt(model, processor, prompts)
    if not bool(is_text[1:].any()):
        return float("nan")
    labels = ids.masked_fill(~is_text, -100)
    images = {} if pixels is None else {"pixel_values": pixels}
    return -model(input_ids=ids, labels=labels, return_logits=False, **images).captioning_loss.item()


def _decode(processor: FromageProcessor, tokens: list[int]) -> str:
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


__all__ = ["original_generation", "original_log_likelihood", "original_segments", "truncate_caption"]
