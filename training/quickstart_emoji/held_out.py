"""What the trained model does on images that it never saw: recall, captions, names, and the prompts of a person."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from modeling_fromage.late_interaction_fromage import search_by_queries, similarities
from modeling_fromage.trainer.evaluation import generate_captions
from modeling_fromage.trainer.ranking import gallery_ranks, recall_at_k

from ..evaluation.captioning import score_captions
from ..evaluation.metrics import wilson_interval
from ..evaluation.prompts import embed_prompts, image_embeds
from .data import Split
from .emoji import HANDS, Emoji
from .prompts import PROMPTS
from .split import telling_words
from .texts import HELD_OUT, with_article

KS = (1, 5, 10)


class HeldOutTest:
    """A trained model and what it is asked about.

    Args:
        model ([`FromageForConditionalGeneration`]): The model, in eval mode.
        processor ([`FromageProcessor`]): Its processor.
        collator ([`FromageDataCollator`]): Lays out the captions whose loss is taken.
        emoji (`Sequence[Emoji]`): All emoji; none where the images are the user's own.
    """

    def __init__(
        self,
        model: FromageForConditionalGeneration,
        processor: FromageProcessor,
        collator: FromageDataCollator,
        emoji: Sequence[Emoji],
    ):
        self.model, self.processor, self.collator = model, processor, collator
        self.emoji = {each.name: each for each in emoji}
        self._names: torch.Tensor | None = None  # their embeddings, (number of emoji, q)

    def evaluate(self, split: Split, ceiling: Split | None) -> dict[str, Any]:
        """Recall with its 95 % intervals, chance and ceiling, the loss of captions, and captions.

        Args:
            ceiling ([`Split`], *optional*): Other images of the same, in the same order: what finds `split`'s images by
                the encoder's features alone is as good as a text could be expected to be.
        """
        n = len(split.captions)
        images = image_embeds(self.model, split.features)
        texts = self.text_embeds(split.captions)
        result: dict[str, Any] = {
            "num_pairs": n,
            "text_to_image": rates(gallery_ranks(texts, images)),
            "image_to_text": rates(gallery_ranks(images, texts)),
            "chance": {f"R@{k}": min(1.0, k / n) for k in KS},
            "captions": generate_captions(self.model, self.processor, split.features, max_new_tokens=16),
        }
        if ceiling is not None:
            gallery, queries = (F.normalize(each.features, dim=-1) for each in (split, ceiling))
            result["ceiling"] = rates(gallery_ranks(queries, gallery))
        if self.emoji:
            asked = [[template.format(with_article(name)) for name in split.captions] for template in HELD_OUT]
            found = [gallery_ranks(self.text_embeds(texts), images) for texts in asked]
            result["sentences"] = rates(torch.stack(found), n)
            result |= self._words(split, images, result["captions"])
        self.collator.training = False
        rows = list(range(n))
        orders = {"caption_loss": rows, "caption_loss_shuffled_images": rows[n // 2 :] + rows[: n // 2]}
        for name, order in orders.items():
            result[name], _, _ = score_captions(self.model, self.collator, split.features, order, split.captions)
        return result

    def _words(self, split: Split, images: torch.Tensor, captions: list[str]) -> dict[str, Any]:
        """The share of captions with a word of the name or a keyword, and the same where they are dealt to others; and
        what a picture is called if the nearest of all names is taken."""
        n, everyone = len(captions), list(self.emoji)
        if self._names is None:
            self._names = self.text_embeds(everyone)
        true = [self._told(name) for name in split.captions]
        written = [telling_words(caption) for caption in captions]
        dealt = written[n // 2 :] + written[: n // 2]
        nearest = similarities(images, self._names).topk(min(5, len(everyone)), dim=1).indices.tolist()
        return {
            "caption_words": sum(bool(a & b) for a, b in zip(written, true, strict=True)) / n,
            "caption_words_dealt_to_others": sum(bool(a & b) for a, b in zip(dealt, true, strict=True)) / n,
            "nearest_names": [[everyone[i] for i in row] for row in nearest],
        }

    def _told(self, name: str) -> set[str]:
        return telling_words(" ".join((name, *self.emoji[name].keywords)))

    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings `(N, q)` of texts in the shared space, or `(N, r, q)`."""
        prompts = [self.processor.retrieval_text(text) for text in texts]
        return embed_prompts(self.model, self.processor, prompts, batch_size=64)

    def search(self, texts: Sequence[str], index: FromageImageIndex, top_k: int) -> list[list[str]]:
        """Ids of the `top_k` images that are most similar to each text."""
        return search_by_queries(index.search, self.text_embeds(texts), min(top_k, len(index)), [[]] * len(texts))[0]

    def answer_prompts(self, prompts: Sequence[str], index: FromageImageIndex) -> list[dict[str, Any]]:
        """The three nearest pictures of different things for each prompt; of those of [`PROMPTS`], which are right."""
        answers = []
        for prompt, ids in zip(prompts, self.search(prompts, index, 20), strict=True):
            first = {index.get(each)["caption"]: each for each in reversed(ids)}
            names = sorted(first, key=lambda name: ids.index(first[name]))[:3]
            answer: dict[str, Any] = {"prompt": prompt, "images": [first[name] for name in names], "names": names}
            if self.emoji and prompt in PROMPTS:
                wanted = set(PROMPTS[prompt])
                answer["right"] = [bool(wanted & words(self.emoji[name])) for name in names]
            answers.append(answer)
        return answers

    def says_ret(self, names: Sequence[str]) -> dict[str, Any]:
        """How many of 100 prompts, names and sentences in turn, the model itself goes on from with `[RET]`."""
        chosen = [names[i % len(names)] for i in range(0, 3 * 100, 3)]
        prompts = [
            name if i % 2 else HELD_OUT[i // 2 % len(HELD_OUT)].format(with_article(name))
            for i, name in enumerate(chosen)
        ]
        said = 0
        for start in range(0, len(prompts), 25):
            texts = [self.processor.add_bos(prompt) for prompt in prompts[start : start + 25]]
            inputs = self.processor(text=texts, return_tensors="pt", padding=True, padding_side="left")
            ids = self.model.generate(
                **inputs, max_new_tokens=8, do_sample=False, max_num_rets=1, eos_token_id=self.processor.ret_token_id,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )  # fmt: skip
            new = ids[:, inputs["input_ids"].shape[1] :]
            said += int((new == self.processor.ret_token_id).any(1).sum())
        return {"num_prompts": len(prompts), "num_with_ret": said}


def words(emoji: Emoji) -> set[str]:
    """The words of an emoji's name and keywords."""
    return set(" ".join((emoji.name, *emoji.keywords)).lower().replace("-", " ").split())


def drawings_of_the_other_hand(split: Split) -> Dataset:
    """The first hand's drawings of what a held-out side has the second hand's of."""
    files = [str(Path(file).with_name(Path(file).name.replace(HANDS[1], HANDS[0]))) for file in split.images]
    return Dataset.from_dict({"image": files, "caption": split.captions})


def rates(ranks: torch.Tensor, n: int | None = None) -> dict[str, Any]:
    """Recall of ranks, with the 95 % interval of each among `n`."""
    found = recall_at_k(ranks.flatten(), KS)
    return {**found, "95%": {name: wilson_interval(rate, n or ranks.numel()) for name, rate in found.items()}}
