"""Image-caption pairs to training batches (section 3.3), concatenated captions included."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..images_fromage import load_rgb_image
from ..processing_fromage import CAPTION_FORMAT, FromageProcessor


@dataclass
class FromageDataCollator:
    """Turn a list of `{"image" or "pooled_image_features", "caption"}` into a batch for the model's `forward`.

    The captioning rows are images, `caption_prefix`, BOS, caption, `caption_suffix`; the retrieval rows BOS, caption,
    `[RET]`, and never concatenated.

    Args:
        processor ([`FromageProcessor`]): Tokenizer, image processor and token ids.
        max_length (`int`, *optional*): Tokens of a caption, BOS, suffix and `[RET]` included; longer ones lose their
            last words.
        concat_captions_prob (`float`): Chance, per batch, that captioning rows 2i and 2i + 1 become one sequence.
            Whether they do is a function of `seed` and the batch's tokens, so that a resumed run repeats it.
        caption_prefix (`str`, *optional*): Text between the visual tokens and BOS, not a target.
        caption_suffix (`str`, *optional*): Text that ends a caption, a target of captioning.
        seed (`int`): Seed of that draw.
        training (`bool`): With False nothing is concatenated.

    `max_length`, `caption_prefix` and `caption_suffix` default to the processor's. Given here, they become the
    processor's too, so that what is saved is what was trained.

    Raises:
        ValueError: An empty batch, an empty caption, a caption that holds a special token, or an unreadable image. Or
            the processor lays captions out in another way since, for another collator say.
    """

    processor: FromageProcessor
    max_length: int | None = None
    concat_captions_prob: float = 0.5
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    seed: int = 0
    training: bool = True

    def __post_init__(self):
        processor = self.processor
        processor.set_caption_format(self.caption_prefix, self.caption_suffix, self.max_length)
        self.caption_prefix, self.caption_suffix = processor.caption_prefix, processor.caption_suffix
        self.max_length = processor.max_length
        self._bos = [processor.tokenizer.bos_token_id] if processor.bos_text else []
        prompt = processor.caption_prompt_ids()
        self._head = prompt[: len(prompt) - len(self._bos)]
        self._suffix = self._tokenize(self.caption_suffix)

    def check_format(self, processor: FromageProcessor):
        """Raise a `ValueError` where a processor, which is what is saved, lays captions out in another way."""
        for name in CAPTION_FORMAT:
            ours, saved = getattr(self, name), getattr(processor, name)
            if ours != saved:
                raise ValueError(
                    f"`{name}` is {ours!r} in the collator, and {saved!r} in the processor that is saved with the "
                    "model. Make a new collator, and give collators that differ processors of their own."
                )

    def _tokenize(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False).input_ids

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not examples:
            raise ValueError("The batch is empty.")
        self.check_format(self.processor)
        texts = [self._checked(row, example["caption"]) for row, example in enumerate(examples)]
        captions = [self._caption_ids(text) for text in texts]
        ret = [self.processor.ret_token_id]
        retrieval = _pad([self._bos + ids + ret for ids in captions], self._pad_id)
        # After a prefix that no BOS parts from it, a caption goes on with the sentence.
        space = " " if self.caption_prefix and not self._bos else ""
        rows = [self._captioning_row(self._caption_ids(space + text) if space else ids)
                for text, ids in zip(texts, captions, strict=True)]  # fmt: skip
        if self._concatenate(captions):
            pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
            rows = [tuple(sum(parts, []) for parts in zip(*pair, strict=True)) for pair in pairs]
        input_ids, attention_mask = _pad([ids for ids, _ in rows], self._pad_id)
        labels, _ = _pad([targets for _, targets in rows], -100)
        return {
            # A row an example, before the fewer ones of concatenated captions: the first tensor's length is what
            # accelerate cuts a streamed batch to, and what the Trainer counts as its size.
            "retrieval_input_ids": retrieval[0],
            "retrieval_attention_mask": retrieval[1],
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            **self._images(examples),
        }

    @property
    def _pad_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _checked(self, row: int, caption: str) -> str:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"Example {row} of the batch has an empty caption: {caption!r}.")
        for token in (self.processor.image_token, self.processor.ret_token):
            if token in caption:
                raise ValueError(f"The caption of example {row} of the batch contains {token} literally: {caption!r}.")
        return caption

    def _caption_ids(self, caption: str) -> list[int]:
        return self._tokenize(caption)[: self.max_length - len(self._bos) - len(self._suffix) - 1]

    def _captioning_row(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Tokens and targets; BOS is a target, predicted from the last visual token, as in the authors' code."""
        body = self._bos + ids + self._suffix
        return self._head + body, [-100] * len(self._head) + body

    def _concatenate(self, captions: list[list[int]]) -> bool:
        if not self.training:
            return False
        digest = hashlib.sha256(repr((self.seed, captions)).encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56 < self.concat_captions_prob

    def _images(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "pooled_image_features" in examples[0]:
            features = [torch.as_tensor(example["pooled_image_features"]) for example in examples]
            return {"pooled_image_features": torch.stack(features)}
        images = [load_rgb_image(example["image"]) for example in examples]
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}


def _pad(rows: list[list[int]], value: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows to a (B, L) tensor, padded on the right as the authors', and its mask."""
    tensors = [torch.tensor(row) for row in rows]
    masks = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return pad_sequence(tensors, batch_first=True, padding_value=value), masks


__all__ = ["FromageDataCollator"]
