"""Batches whose `[RET]` is several tokens, and a plain pass: the LM as it is, one sequence at a time."""

import torch
from torch.nn import functional as F

from tests.helpers.backbones import VOCAB, make_model
from tests.helpers.batches import CAPTIONS, IMAGE, RET, pad
from tests.helpers.documents import document_rows, padded

AGGREGATIONS = ["concat", "max"]


def stacked_model(name, count, aggregation, **config_kwargs):
    return make_model(name, num_ret_tokens=count, ret_aggregation=aggregation, **config_kwargs)


def stacked_double_model(name, count, aggregation, **config_kwargs):
    model = stacked_model(name, count, aggregation, **config_kwargs)
    model.double().train()
    model.adapter.double()
    return model


def expanded(ids, count, of_ret=None):
    """Each `[RET]` of `ids` as `count` tokens; or, of other values at these places, `of_ret(value)` for each."""
    of_ret = of_ret or (lambda _: range(RET, RET + count))
    return [each for token in ids for each in (of_ret(token) if token == RET else [token])]


def text_rows(count, indices):
    return [expanded([*CAPTIONS[i], RET], count) for i in indices]


def pairs(model, pixels, indices, side="right"):
    """A batch of captioned images."""
    k, count = model.config.num_image_tokens, model.config.num_ret_tokens
    captioning = pad([[IMAGE] * k + CAPTIONS[i] for i in indices], side)
    is_no_target = (captioning["input_ids"] == IMAGE) | (captioning["attention_mask"] == 0)
    retrieval = pad(text_rows(count, indices), side)
    return {
        **captioning,
        "labels": captioning["input_ids"].masked_fill(is_no_target, -100),
        "pixel_values": pixels[indices],
        **{f"retrieval_{name}": value for name, value in retrieval.items()},
    }


def stacked_documents(k, count):
    """Ids, labels and the images to find of three documents: at the last token of each `[RET]`."""
    rows = []
    for ids, labels, finds in document_rows(k):
        of_rets = [[-100] * (count - 1) + [found] if token == RET else [found]
                   for token, found in zip(ids, finds, strict=True)]  # fmt: skip
        rows.append((expanded(ids, count), expanded(labels, count), sum(of_rets, [])))
    return rows


def documents(model, pixels, captions=()):
    """A batch of documents with two images each, and of captioned images behind them."""
    k, count = model.config.num_image_tokens, model.config.num_ret_tokens
    rows = stacked_documents(k, count)
    first = 2 * len(rows)
    rows += [([IMAGE] * k + CAPTIONS[i], [-100] * k + CAPTIONS[i], [-100] * (k + len(CAPTIONS[i]))) for i in captions]
    batch = {
        **pad([ids for ids, _, _ in rows], "right"),
        "labels": padded([labels for _, labels, _ in rows], -100),
        "ret_targets": padded([finds for _, _, finds in rows], -100),
        "pixel_values": pixels[: first + len(captions)],
    }
    if captions:
        retrieval = pad(text_rows(count, captions), "right")
        batch |= {f"retrieval_{name}": value for name, value in retrieval.items()}
        batch["retrieval_targets"] = torch.arange(len(captions)) + first
    return batch


class PlainPass:
    """One sequence, by the LM as it is, over all its vocabulary.

    Args:
        images: (number of images, k, D), its visual tokens.
    """

    def __init__(self, model, ids, images=()):
        self.model, self.ids, adapter, lm = model, ids, model.adapter, model.language_model
        ret_out, rows, images = (adapter.ret_lm_head or adapter.ret_embedding).weight, [], iter(images)
        ret_in = adapter.ret_embedding.weight * model.config.ret_embedding_scale
        for place, token in enumerate(ids):
            if token == IMAGE:
                rows += list(next(images)) if ids[max(place - 1, 0) : place] != [IMAGE] else []
            else:
                rows.append(ret_in[token - RET] if token >= RET else lm.get_input_embeddings()(torch.tensor(token)))
        self.out = lm(inputs_embeds=torch.stack(rows)[None], output_hidden_states=True, use_cache=False)
        hidden, frozen = self.out.hidden_states[-1][0], self.out.logits[0][:, :RET]
        ret = model.frozen_lm().transform(hidden @ ret_out.t())
        filler = frozen.new_full((len(frozen), RET - frozen.shape[1]), torch.finfo(frozen.dtype).min)
        self.log_probs = torch.cat([frozen, filler, ret], 1).log_softmax(-1)

    def losses(self, labels):
        """Of each token but the first, -100 for none: those of words, and those of `[RET]`'s tokens."""
        found = [(token, -self.log_probs[place, token]) for place, token in enumerate(labels[1:]) if token >= 0]
        return [loss for token, loss in found if token < RET], [loss for token, loss in found if token >= RET]

    def queries(self, last):
        """(r, q), or (1, q) of states side by side, of the `[RET]` that ends at `last`."""
        count, several = self.model.config.num_ret_tokens, self.model.config.ret_aggregation == "max"
        total = 0
        for layer, projection in zip(
            self.model.config.text_embed_layers, self.model.adapter.text_projection, strict=True
        ):
            states = self.out.hidden_states[layer][0, last - count + 1 : last + 1]
            total = total + projection(states if several else states.flatten()[None])
        return F.normalize(total, dim=-1)


def scores(images, queries):
    """(N, M): of each image (q,) and each text's queries (r, q), the largest product."""
    return torch.stack([torch.stack([(own @ image).max() for own in queries]) for image in images])


def plain_losses(model, pixels, captions=(), with_documents=True, captioning=True):
    """The three losses of [`documents`], or of [`pairs`]."""
    adapter, k, count = model.adapter, model.config.num_image_tokens, model.config.num_ret_tokens
    rows = stacked_documents(k, count) if with_documents else []
    first = 2 * len(rows)
    shown = list(range(first + len(captions))) if with_documents else list(captions)
    pooled = model.get_pooled_image_features(pixels[shown])
    visual = adapter.multi_modal_projector(pooled).unflatten(-1, (k, -1))
    words, rets, queries, targets = [], [], [], []
    for number, (ids, labels, finds) in enumerate(rows):
        one = PlainPass(model, ids, visual[2 * number : 2 * number + 2])
        own_words, own_rets = one.losses(labels)
        words, rets = words + own_words, rets + own_rets
        for place, found in enumerate(finds):
            if found >= 0:
                queries.append(one.queries(place))
                targets.append(found)
    for number, caption in enumerate(captions, start=first):
        words += PlainPass(model, [IMAGE] * k + CAPTIONS[caption], visual[number][None]).losses(
            [-100] * k + CAPTIONS[caption])[0]  # fmt: skip
        (text,) = text_rows(count, [caption])
        one = PlainPass(model, text)
        rets += sum(one.losses(text), [])
        queries.append(one.queries(len(text) - 1))
        targets.append(number)
    logits = scores(F.normalize(adapter.visual_projection(pooled), dim=-1), queries) * adapter.logit_scale.exp()
    targets = torch.tensor(targets)
    to_images = F.cross_entropy(logits.t(), targets)
    to_texts = F.cross_entropy(logits[targets], torch.arange(len(targets)))
    return {
        "captioning_loss": torch.stack(words).mean(),
        "ret_token_loss": torch.stack(rets).mean(),
        "contrastive_loss": (to_images + to_texts) / 2,
    }


__all__ = ["AGGREGATIONS", "VOCAB", "PlainPass", "documents", "expanded", "pairs", "plain_losses", "scores",
           "stacked_documents", "stacked_double_model", "stacked_model", "text_rows"]  # fmt: skip
