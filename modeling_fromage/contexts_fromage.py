"""What the language model reads for an answer: prompts and what they have grown to, as batches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .answer_rows_fromage import AnswerOptions, Row
from .image_ids_fromage import as_ids
from .prefix_cache_fromage import PrefixCache, digest_of, identities

if TYPE_CHECKING:
    from .modeling_fromage import FromageForConditionalGeneration
    from .processing_fromage import FromageProcessor


class Contexts:
    """Makes batches of prompts, and leaves out what is known of their beginnings.

    Args:
        model ([`FromageForConditionalGeneration`]), processor ([`FromageProcessor`]): From one checkpoint.
        prefix_cache ([`PrefixCache`], *optional*): What is known of texts that prompts may begin with.
    """

    def __init__(
        self,
        model: "FromageForConditionalGeneration",
        processor: "FromageProcessor",
        prefix_cache: PrefixCache | None = None,
    ):
        self.model, self.processor = model, processor
        self.prefix_cache = prefix_cache if prefix_cache is not None and prefix_cache.max_bytes else None
        self._version = 0  # of the model, see [`PrefixCache.check_model`]

    def begin(self) -> None:
        """To be called before prompts are answered: whether the model is still what it was takes a while to see."""
        if self.prefix_cache is not None:
            self._version = self.prefix_cache.check_model(self.model)

    def rows(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        exclude_ids: Sequence[Sequence[str]],
        options: Sequence[AnswerOptions],
    ) -> list[Row]:
        """Prompts and their images, which are encoded together.

        Raises:
            ValueError: A prompt is empty, or its images and placeholders differ in number.
        """
        rows, pixels = [], []
        for number, (text, own, excluded) in enumerate(zip(texts, images, exclude_ids, strict=True)):
            if not text:
                raise ValueError(f"Prompt {number} is empty. Give it a text or an image.")
            inputs = self.processor(text=[text], images=list(own) or None, return_tensors="pt")
            count = text.count(self.processor.image_token)
            if count != len(own):
                raise ValueError(f"Prompt {number} has {count} image placeholders and {len(own)} images.")
            pixels += list(inputs["pixel_values"]) if own else []
            rows.append(Row(inputs["input_ids"][0].tolist(), [], [], as_ids(excluded), options[number]))
        encoded = iter(self._encode(pixels))
        for row, own in zip(rows, images, strict=True):
            row.see([next(encoded) for _ in own])
        return rows

    def append_images(self, row: Row, images: Sequence[Image.Image]) -> None:
        """Add images to a row's context."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        row.see(self._encode(list(pixels)))
        row.ids += [self.processor.image_token_id] * (self.processor.num_image_tokens * len(images))

    @torch.no_grad()
    def _encode(self, pixels: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, bytes]]:
        """Pooled features (vision width,) and, where prefixes are kept, the digest of each image (C, height, width)."""
        cache = self.prefix_cache
        digests = [b"" if cache is None else digest_of(each) for each in pixels]
        known = {} if cache is None else {digest: cache.find_features(self._version, digest) for digest in digests}
        found = [known.get(digest) for digest in digests]
        new = [number for number, features in enumerate(found) if features is None]
        if new:
            batch = torch.stack([pixels[number] for number in new])
            encoded = self.model.get_pooled_image_features(batch.to(self.model.device, self.model.vision_model.dtype))
            for number, features in zip(new, encoded, strict=True):
                found[number] = features
                if cache is not None:
                    cache.keep_features(self._version, digests[number], features)
        return [(features, digest) for features, digest in zip(found, digests, strict=True) if features is not None]

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of the rows' contexts, padded on the left."""
        padded = self.processor.tokenizer.pad(
            {"input_ids": [row.ids for row in rows]}, padding_side="left", return_tensors="pt"
        )
        inputs = {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        features = [feature for row in rows for feature in row.features]
        return {**inputs, "pooled_image_features": torch.stack(features)} if features else inputs

    def known(self, rows: Sequence[Row], new_tokens: int) -> dict[str, Any]:
        """For `generate`: what is known of the first columns of [`batch`]."""
        if self.prefix_cache is None:
            return {}
        own = [self._identities(row) for row in rows]
        cache = self.prefix_cache.prefix_of(self._version, self.model.frozen_lm(), own, new_tokens)
        return {} if cache is None else {"past_key_values": cache}

    def keep(self, rows: Sequence[Row], starts: Sequence[int], width: int, cache: Any) -> None:
        """Keep what `generate` has computed for rows whose prompts were the columns from `starts` to `width`."""
        if self.prefix_cache is not None:
            own = [self._identities(row) if row.is_kept else None for row in rows]
            self.prefix_cache.keep(self._version, self.model.frozen_lm(), own, starts, width, cache)

    def _identities(self, row: Row) -> torch.Tensor:
        config = self.model.config
        return identities(row.ids, config.image_token_id, row.digests, config.num_image_tokens)


__all__ = ["Contexts"]
