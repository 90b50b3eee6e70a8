"""Image-caption pairs, with concatenated captions, and interleaved documents to training batches (section 3.3)."""

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
from .captions import check_caption, usable_captions
from .document_contexts import Prompt
from .document_sequences import DocumentLayout, sequences_of
from .documents import document_of
from .draws import drawn_number
from .image_batches import image_tensors, pooled_features
from .negative_images import check_negatives, draw_negatives, has_negatives


@dataclass
class FromageDataCollator:
    """Turn a list of `{"image" or "pooled_image_features", "caption"}`, and of documents, into a batch for the model's
    `forward`.

    An example may have several captions, a list of texts, and cached features of several views of its image, of shape
    `(num_views, vision_width)`. One of each is drawn in every batch, one that stands there twice twice as often; with
    `training=False` it is the first. Captions that cannot be used are left out while another remains. A
    `"retrieval_caption"`, one or several, is what the image is found by in place of its caption.

    An example may have hard negatives: `"negative_images"`, a list of images, as `fromage mine-negatives` writes it;
    beside cached features, `"negative_image_features"` of shape `(num_negatives, vision_width)`. In training,
    `hard_negatives` of them are drawn in every batch.

    [`CaptionIds`] describes the two sequences of a caption. Those for retrieval, or beside documents, stand alone.

    A document is `{"messages": ...}`, a chat, or `{"document": [...]}`, a list of texts and images in order; see
    [`document_of`] for other names. [`DocumentLayout`] lays it out as one sequence. Its images may be cached too:
    `"pooled_image_features"` of shape `(num_images, vision_width)`.

    Args:
        processor ([`FromageProcessor`]): Tokenizer, image processor, token ids and the layout of captions.
        max_length (`int`, *optional*): Tokens of a caption, including BOS, the suffix and `[RET]`, all its tokens;
            longer captions lose their last words.
        concat_captions_prob (`float`, defaults to 0.5): Probability, per batch, that captioning sequences 2i and 2i + 1
            are concatenated. Draws are functions of `seed` and a batch's captions, so that a resumed run repeats them.
        caption_prefix (`str`, *optional*): Text between the visual tokens and BOS, not a target.
        caption_suffix (`str`, *optional*): Text that ends a caption, a target of captioning.
        seed (`int`, defaults to 0): Seed of all draws.
        training (`bool`, defaults to `True`): With `False` nothing is drawn or concatenated.
        max_document_length (`int`, defaults to 512): Tokens of a document, images included; the rest is left out.
        document_ret_prob (`float`, defaults to 1.0): Probability that a document's image is to be found by a `[RET]`
            before it. The others are shown without one, as a user shows images.
        hard_negatives (`int`, defaults to 1): Negative images drawn of each example that has some; 0 for none.

    `max_length`, `caption_prefix` and `caption_suffix` default to the processor's. Values given here are set on the
    processor too, so that what is saved is what was trained.

    Raises:
        ValueError: A batch is empty; a caption is empty or contains a special token; a document is malformed or has no
            image; an image cannot be read; or the processor's caption format has changed since, by another collator for
            example.

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
    max_document_length: int = 512
    document_ret_prob: float = 1.0
    hard_negatives: int = 1

    def __post_init__(self) -> None:
        if self.hard_negatives < 0:
            raise ValueError(f"`hard_negatives` is a number of images, 0 or more; got {self.hard_negatives}.")
        if self.max_document_length < 2 or not 0 <= self.document_ret_prob <= 1:
            raise ValueError(
                "`max_document_length` must be at least 2 and `document_ret_prob` in [0, 1], got "
                f"{self.max_document_length} and {self.document_ret_prob}."
            )
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

            With documents among the examples there are as many images as all of them have, in order; retrieval texts
            of the pairs alone, with `retrieval_targets`, the number of the image of each; and `ret_targets` of the
            shape of `input_ids`, the number of the image that a `[RET]` is to find, -100 elsewhere.
            Hard negatives are `negative_pixel_values` or `negative_image_features`.
        """
        if not examples:
            raise ValueError("The batch is empty.")
        self.check_format(self.processor)
        prepared = [self._prepare_row(row, example) for row, example in enumerate(examples)]
        negatives: dict[str, torch.Tensor] = {}
        if self.training and self.hard_negatives and any(map(has_negatives, prepared)):
            seed = drawn_number(self.seed, "negatives", list(map(_text_of, prepared)))
            negatives = draw_negatives(self.processor, prepared, self.hard_negatives, seed)
        pixels = image_tensors(self.processor, prepared)  # as above: other examples come in where images are bad
        examples = self._draw(prepared)
        if any("document_ids" in example for example in examples):
            return {**self._with_documents(examples), **(pixels or pooled_features(examples)), **negatives}
        captions, retrieval = self._encoded(examples)
        rows = [(caption.input_ids, caption.labels) for caption in captions]
        if self._concatenates(captions):
            rows = [
                (sum((ids for ids, _ in pair), []), sum((labels for _, labels in pair), []))
                for pair in (rows[i : i + 2] for i in range(0, len(rows), 2))
            ]
        return {
            # First come tensors with a row for each example, then those with fewer rows, of concatenated captions:
            # accelerate cuts a streamed batch by the length of its first tensor, and the Trainer counts it.
            **self._retrieval_inputs(retrieval),
            **self._sequences(rows),
            **(pixels or pooled_features(examples)),
            **negatives,
        }

    def _encoded(self, pairs: Sequence[dict[str, Any]]) -> tuple[list[CaptionIds], list[list[int]]]:
        """The captions of pairs, and the sequences that their images are found by."""
        captions = [self._layout.encode(pair["caption"]) for pair in pairs]
        found_by = [
            self._layout.encode(pair["retrieval_caption"]) if "retrieval_caption" in pair else caption
            for pair, caption in zip(pairs, captions, strict=True)
        ]
        return captions, [caption.retrieval_input_ids for caption in found_by]

    def _sequences(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = _pad([ids for ids, _ in rows], self.processor.tokenizer.pad_token_id)
        labels, _ = _pad([labels for _, labels in rows], -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _with_documents(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of documents, and of pairs beside them: sequences in order, retrieval texts of the pairs."""
        captions, retrieval = self._encoded([example for example in examples if "document_ids" not in example])
        rows, of_pairs = sequences_of(examples, captions)
        batch = {**self._sequences([(row.input_ids, row.labels) for row in rows]),
                 "ret_targets": _pad([row.finds for row in rows], -100)[0]}  # fmt: skip
        if of_pairs:
            batch |= {**self._retrieval_inputs(retrieval), "retrieval_targets": torch.tensor(of_pairs)}
        return batch

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
        check_negatives(example, self.hard_negatives)
        if example.get("problem") and None in (example.get("caption"), example.get("image")):
            raise BadExampleError("malformed row", str(example["problem"]))
        prepared = PreparedExample(example)
        if (document := document_of(example)) is not None:
            return self._prepare_document(prepared, document)
        if example.get("retrieval_caption") is None:  # tables fill in absent keys
            prepared.pop("retrieval_caption", None)
        for name in ("caption", "retrieval_caption"):
            if name == "caption" or name in prepared:
                prepared[name] = usable_captions(example.get(name), self.processor)
        if example.get("pooled_image_features") is None:
            prepared.pop("pooled_image_features", None)
            prepared["image"] = load_rgb_image(example.get("image"))  # type: ignore[arg-type]  # says what None is
        return prepared

    def _prepare_document(self, prepared: PreparedExample, document: dict[str, Any]) -> PreparedExample:
        ids, images = DocumentLayout(self.processor, self.max_document_length).encode(document)
        prepared["document_ids"], prepared["num_images"] = ids, len(images)
        features = prepared.get("pooled_image_features")
        if features is None:
            prepared.pop("pooled_image_features", None)
            prepared["image"] = [load_rgb_image(image) for image in images]
        else:
            prepared["pooled_image_features"] = _first_rows(features, len(images))
        return prepared

    def _prepare_row(self, row: int, example: dict[str, Any]) -> PreparedExample:
        try:
            return self.prepare(example)
        except BadExampleError as error:
            raise BadExampleError(error.reason, error.detail, f"Example {row} of the batch") from None

    def _draw(self, examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Examples with one of their captions and one of their views each."""
        several = [_choices(example) for example in examples]
        leaves_out = self.training and self.document_ret_prob < 1
        if not any(several) and not leaves_out:
            return list(examples)
        generator = torch.Generator()
        if self.training:
            generator.manual_seed(drawn_number(self.seed, list(map(_text_of, examples))))
        drawn = [
            example
            | {
                name: values[int(torch.randint(len(values), (), generator=generator)) if self.training else 0]
                for name, values in choices.items()
            }
            for example, choices in zip(examples, several, strict=True)
        ]
        for example in drawn if leaves_out else ():
            if "document_ids" in example:
                chances = torch.rand(example["num_images"], generator=generator)
                shown = (chances >= self.document_ret_prob).nonzero().flatten().tolist()
                example["document_ids"] = example["document_ids"].without_rets(set(shown), len(self._layout.ret_ids))
        return drawn

    def retrieval_inputs(self, captions: Sequence[str | Prompt]) -> dict[str, torch.Tensor]:
        """`retrieval_input_ids` and `retrieval_attention_mask` of captions, as in a batch; or of prompts, token ids."""
        texts = [caption for caption in captions if not isinstance(caption, tuple)]
        for text in texts:
            check_caption(text, self.processor)
        encoded = iter(self._layout.retrieval_ids(texts) if texts else ())
        return self._retrieval_inputs([list(own) if isinstance(own, tuple) else next(encoded) for own in captions])

    def _retrieval_inputs(self, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        input_ids, mask = _pad(rows, self.processor.tokenizer.pad_token_id)
        return {"retrieval_input_ids": input_ids, "retrieval_attention_mask": mask}

    def _concatenates(self, captions: Sequence[CaptionIds]) -> bool:
        """Draw whether this batch's captions are concatenated."""
        tokens = [caption.caption_ids for caption in captions]
        return self.training and drawn_number(self.seed, tokens) / 2**56 < self.concat_captions_prob

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
        inputs = image_tensors(self.processor, prepared) or pooled_features(prepared)
        for row, (before, after) in enumerate(zip(given, prepared, strict=True)):
            if after is not before:
                examples[row] = after
        return inputs


def _text_of(example: dict[str, Any]) -> Any:
    """What draws for an example depend on."""
    if "document_ids" in example:
        return example["document_ids"].input_ids
    return example["caption"], retrieval_caption(example)


def _first_rows(features: Any, count: int) -> torch.Tensor:
    """Cached features (count, vision width) of a document's first images."""
    try:
        rows = torch.as_tensor(features)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadExampleError("cached features of a document are no numbers", str(error)) from error
    if rows.dim() != 2:
        told = f"expected (number of images, vision width), got {tuple(rows.shape)}"
        raise BadExampleError("cached features of a document are no row an image", told)
    if len(rows) < count:
        raise BadExampleError("cached features of fewer images than a document has", f"{len(rows)} of {count} images")
    return rows[:count]


def takes_common_examples(collator: Any) -> bool:
    """Whether a collator is a [`FromageDataCollator`] whose examples are those: a subclass with a `__call__` of its own
    may take others."""
    return isinstance(collator, FromageDataCollator) and type(collator).__call__ is FromageDataCollator.__call__


def retrieval_caption(example: dict[str, Any]) -> Any:
    """The text, or the texts, that an example's image is found by."""
    found = example.get("retrieval_caption")
    return example["caption"] if found is None else found


def _choices(example: dict[str, Any]) -> dict[str, Any]:
    """What an example has several of: captions, cached features."""
    several: dict[str, Any] = {}
    if "document_ids" in example:
        return several
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
