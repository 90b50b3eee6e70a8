"""Answers in batches against answers alone: token for token, up to where two tokens are as good as equally likely."""

import random

import torch

from modeling_fromage.interleaved_generation_fromage import InterleavedGeneration
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.pipelines import COLOURS, picture

NUM_PROMPTS, BATCH, NEW_TOKENS = 320, 16, 8
TIE = 1e-4  # between the two best logits
WORDS = "a cat looks like the old train and more of what is here why hello far red".split()


def make_prompts():
    rng = random.Random(0)
    prompts = []
    for number in range(NUM_PROMPTS):
        images = [picture(rng.choice(COLOURS)) for _ in range(rng.choice((0, 0, 1, 2)))]
        text = "".join("<|image|>" for _ in images) + " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        prompts.append((f"{text} {number}", images))
    return prompts


def written(generation, prompts):
    """The prompts and answers in tokens."""
    texts, images = zip(*prompts, strict=True)
    options = [generation.options()] * len(prompts)
    rows = generation.contexts.rows(texts, images, [[]] * len(prompts), options)
    generation.run(rows)
    return rows


def likeliest(model, row, length):
    """The likeliest token after the first `length` of a row, alone, and by how much it is ahead of the next."""
    features = {"pooled_image_features": torch.stack(row.features)} if row.features else {}
    logits = model(input_ids=torch.tensor([row.ids[:length]]), **features).logits[0, -1].float()
    logits[[model.config.image_token_id, model.config.ret_token_id]] = -torch.inf
    best, second = logits.topk(2).values.tolist()
    return int(logits.argmax()), best - second


@torch.no_grad()
def test_answers_differ_from_those_alone_by_ties_alone():
    model = make_model("opt_clip")
    generation = InterleavedGeneration(
        model, make_processor(), max_new_tokens=NEW_TOKENS, max_num_rets=0, do_sample=False
    )
    prompts, differing = make_prompts(), 0
    alone = [written(generation, [prompt])[0] for prompt in prompts]
    for row in alone[:20]:  # what ties are judged by is what answers are made by
        assert likeliest(model, row, row.prompt_length)[0] == row.ids[row.prompt_length]
    for start in range(0, NUM_PROMPTS, BATCH):
        beside = written(generation, prompts[start : start + BATCH])
        for row, other in zip(alone[start : start + BATCH], beside, strict=True):
            if row.ids == other.ids:
                continue
            pairs = enumerate(zip(row.ids, other.ids, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(row.ids), len(other.ids)))
            assert likeliest(model, row, place)[1] < TIE
            differing += 1
    assert differing < NUM_PROMPTS / 100
    assert len({tuple(row.ids[row.prompt_length :]) for row in alone}) > NUM_PROMPTS / 20  # not all the same
