"""Image-caption pairs to training batches (section 3.3), with concatenated captions."""

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..images_fromage import load_rgb_image
from ..processing_fromage import FromageProcessor
from ..prompts_fromage import CaptionFormat, CaptionIds
from .bad_examples import BadExampleError, PreparedExample
from .draws import number_of


@dataclass
class FromageDataCollator:
    """Turn a list of `{"image" or "pooled_image_features", "caption"}` into a batch for the model's `forward`.

    An example may have several captions, a list of texts, and cached features of several views of its image, of shape
    `(num_views, vision_width)`. One of each is drawn in every batch, one that stands there twice twice as often; with
    `training=False` it is the first. Captions that cannot be used are left out while another remains. A
    `"retrieval_caption"`, one or several, is what the image is found by in place of its caption.

    [`CaptionIds`] describes the two sequences of a caption. Those for retrieval are never concatenated.

    Args:
        processor ([`FromageProcessor`]): Tokenizer, image processor, token ids and the layout of captions.
        max_length (`int`, *optional*): Tokens of a caption, including BOS, the suffix and `[RET]`; longer captions lose
            their last words.
        concat_captions_prob (`float`, defaults to 0.5): Probability, per batch, that captioning sequences 2i and 2i + 1
            are concatenated. Draws are functions of `seed` and a batch's captions, so that a resumed run repeats them.
        caption_prefix (`str`, *optional*): Text between the visual tokens and BOS, not a target.
        caption_suffix (`str`, *optional*): Text that ends a caption, a target of captioning.
        seed (`int`, defaults to 0): Seed of all draws.
        training (`bool`, defaults to `True`): With `False` nothing is drawn or concatenated.

    `max_length`, `caption_prefix` and `caption_suffix` default to the processor's. Values given here are set on the
    processor too, so that what is saved is what was trained.

    Raises:
        ValueError: A batch is empty; a caption is empty or contains a special token; an image cannot be read; or the
            processor's caption format has changed since, by another collator for example.

    Example:

        collator = FromageDataCollator(processor, caption_suffix="\\n")
        batch = collator([{"image": "cat.jpg", "caption": "a cat"}, {"image": "dog.jpg", "caption": "a dog"}])
        loss = model(**batch).loss
    """

    processor: FromageProcessor
    max_length: int | None = None
    concat_captions_prob: float = 0.5
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    seed: int = 0
    training: bool = True

    def __post_init__(self) -> None:
        self.processor.set_caption_format(self.caption_prefix, self.caption_suffix, self.max_length)
        self._layout = self.processor.caption_layout
        for field in fields(CaptionFormat):
            setattr(self, field.name, getattr(self._layout.caption_format, field.name))

    def check_format(self, processor: FromageProcessor) -> None:
        """Raise a `ValueError` where `processor`, which is what is saved, lays captions out in another way."""
        for field in fields(CaptionFormat):
            ours, saved = (getattr(caption_format, field.name) for caption_format in (self, processor))
            if ours != saved:
                raise ValueError(
                    f"`{field.name}` is {ours!r} in the collator, and {saved!r} in the processor that is saved with "
                    "the model. Make a new collator, and give collators that differ processors of their own."
                )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(num_sequences, sequence_length)`,
            `retrieval_input_ids` and `retrieval_attention_mask` of shape `(batch_size, retrieval_length)`, and either
            `pixel_values` of shape `(batch_size, num_channels, height, width)` or `pooled_image_features` of shape
            `(batch_size, vision_width)`. `num_sequences` is smaller than `batch_size` where captions are concatenated.
        """
        if not examples:
            raise ValueError("The batch is empty.")
        self.check_format(self.processor)
        prepared = [self._prepare_row(row, example) for row, example in enumerate(examples)]
        pixels = self._pixels(prepared)  # first: where the image processor raises, other examples come in
        examples = self._draw(prepared)
        captions = [self._layout.encode(example["caption"]) for example in examples]
        retrieval = [
            self._layout.encode(example["retrieval_caption"]) if "retrieval_caption" in example else caption
            for row, (example, caption) in enumerate(zip(examples, captions, strict=True))
        ]
        rows = [(caption.input_ids, caption.labels) for caption in captions]
        if self._concatenates(captions):
            rows = [
                (sum((ids for ids, _ in pair), []), sum((labels for _, labels in pair), []))
                for pair in (rows[i : i + 2] for i in range(0, len(rows), 2))
            ]
        pad_id = self.processor.tokenizer.pad_token_id
        input_ids, attention_mask = _pad([ids for ids, _ in rows], pad_id)
        labels, _ = _pad([labels for _, labels in rows], -100)
        return {
            # First come tensors with a row for each example, then those with fewer rows, of concatenated captions:
            # accelerate cuts a streamed batch by the length of its first tensor, and the Trainer counts it.
            **self._retrieval_inputs([caption.retrieval_input_ids for caption in retrieval]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            **(pixels or _pooled(examples)),
        }

    def prepare(self, example: dict[str, Any]) -> PreparedExample:
        """Decode the image of an example, to RGB, and check its captions. Of several captions, those that cannot be
        used are left out.

        Raises:
            BadExampleError: A `ValueError`. There is no caption that can be used, or the example says itself that it
                has a `"problem"`.
            UnreadableImageError: A `ValueError`. The image cannot be read.
        """
        if isinstance(example, PreparedExample):
            return example
        if example.get("problem") and None in (example.get("caption"), example.get("image")):
            raise BadExampleError("malformed row", str(example["problem"]))
        prepared = PreparedExample(example)
        for name in ("caption", "retrieval_caption"):
            if name == "caption" or name in example:
                prepared[name] = self._usable(example.get(name))
        if example.get("pooled_image_features") is None:
            prepared.pop("pooled_image_features", None)
            prepared["image"] = load_rgb_image(example.get("image"))  # type: ignore[arg-type]  # says what None is
        return prepared

    def _prepare_row(self, row: int, example: dict[str, Any]) -> PreparedExample:
        try:
            return self.prepare(example)
        except BadExampleError as error:
            raise BadExampleError(error.reason, error.detail, f"Example {row} of the batch") from None

    def _draw(self, examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Examples with one of their captions and one of their views each."""
        several = [_choices(example) for example in examples]
        if not any(several):
            return list(examples)
        generator = torch.Generator()
        if self.training:
            texts = [(example["caption"], retrieval_caption(example)) for example in examples]
            generator.manual_seed(number_of(repr((self.seed, texts)).encode()))
        return [
            example
            | {
                name: values[int(torch.randint(len(values), (), generator=generator)) if self.training else 0]
                for name, values in choices.items()
            }
            for example, choices in zip(examples, several, strict=True)
        ]

    def retrieval_inputs(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """`retrieval_input_ids` and `retrieval_attention_mask` of captions alone, as in a batch."""
        for caption in captions:
            self._check(caption)
        return self._retrieval_inputs(self._layout.retrieval_ids(captions))

    def _retrieval_inputs(self, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        input_ids, mask = _pad(rows, self.processor.tokenizer.pad_token_id)
        return {"retrieval_input_ids": input_ids, "retrieval_attention_mask": mask}

    def _usable(self, caption: Any) -> Any:
        """A caption, or those of several that can be used."""
        if not isinstance(caption, (list, tuple)) or not caption:
            self._check(caption)
            return caption
        usable, last = [], None
        for text in caption:
            try:
                self._check(text)
                usable.append(text)
            except BadExampleError as error:
                last = error
        if not usable and last is not None:
            raise last
        return usable

    def _check(self, caption: Any) -> None:
        if not isinstance(caption, str) or not caption.strip():
            raise BadExampleError("empty caption", repr(caption)[:100])
        try:
            caption.encode()
        except UnicodeEncodeError as error:  # half of an emoji, as JSON may have it; tokenizers refuse it
            raise BadExampleError("caption is not Unicode", ascii(caption)[:100]) from error
        for token in (self.processor.image_token, self.processor.ret_token):
            if token in caption:
                raise BadExampleError("caption with a special token", f"{token} in {caption!r}")

    def _concatenates(self, captions: Sequence[CaptionIds]) -> bool:
        """Draw whether this batch's captions are concatenated."""
        if not self.training:
            return False
        tokens = [caption.caption_ids for caption in captions]
        return number_of(repr((self.seed, tokens)).encode()) / 2**56 < self.concat_captions_prob

    def image_inputs(self, examples: MutableSequence[Any]) -> dict[str, torch.Tensor]:
        """`pixel_values` or `pooled_image_features` of examples, as in a batch. One whose image the processor refuses
        makes way in `examples` for its substitute, if it has one."""
        prepared = [
            example
            if isinstance(example, PreparedExample) or "pooled_image_features" in example
            else PreparedExample(example, image=load_rgb_image(example["image"]))
            for example in examples
        ]
        given = list(prepared)
        inputs = self._pixels(prepared) or _pooled(prepared)
        for row, (before, after) in enumerate(zip(given, prepared, strict=True)):
            if after is not before:
                examples[row] = after
        return inputs

    def _pixels(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        """`pixel_values`; nothing of cached features. An example with an image that the processor refuses makes way for
        its substitute in the list."""
        if "pooled_image_features" in examples[0]:
            return {}
        try:
            return self._process(examples)
        except Exception:  # whatever it raises for a picture says nothing about others
            if not any([self._replaces(examples, row) for row in range(len(examples))]):
                raise
            return self._process(examples)

    def _process(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        images = [example["image"] for example in examples]
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}

    def _replaces(self, examples: list[Any], row: int) -> bool:
        """Whether the image of an example had to be replaced: the processor raises for it alone."""
        is_replaced = False
        while True:
            try:
                self._process([examples[row]])
                return is_replaced
            except Exception as error:
                refused = BadExampleError("image processor raises", f"{type(error).__name__}: {error}")
                examples[row] = examples[row].replaced(refused)
                is_replaced = True


def _pooled(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"pooled_image_features": torch.stack([torch.as_tensor(e["pooled_image_features"]) for e in examples])}


def takes_common_examples(collator: Any) -> bool:
    """Whether a collator is a [`FromageDataCollator`] whose examples are those: a subclass with a `__call__` of its own
    may take others."""
    return isinstance(collator, FromageDataCollator) and type(collator).__call__ is FromageDataCollator.__call__


def retrieval_caption(example: dict[str, Any]) -> Any:
    """The text, or the texts, that an example's image is found by."""
    return example.get("retrieval_caption", example["caption"])


def _choices(example: dict[str, Any]) -> dict[str, Any]:
    """What an example has several of: captions, cached features."""
    several: dict[str, Any] = {}
    for name in ("caption", "retrieval_caption"):
        if isinstance(texts := example.get(name), (list, tuple)) and texts:
            several[name] = texts
    features = example.get("pooled_image_features")
    if features is not None and np.ndim(features[0]) == 1:
        several["pooled_image_features"] = features
    return several


def _pad(rows: Sequence[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a tensor of shape `(num_rows, length)`, padded on the right as in the authors' code, and its mask."""
    tensors = [torch.tensor(row) for row in rows]
    masks = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return pad_sequence(tensors, batch_first=True, padding_value=value), masks


__all__ = ["FromageDataCollator"]
