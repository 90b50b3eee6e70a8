"""Generation with a `[RET]` of several tokens: the others follow the first, whole or not at all."""

import pytest
import torch

from tests.helpers.batches import PAD, RET, interleaved, pad
from tests.helpers.stacked import AGGREGATIONS, expanded, stacked_model

RUN = [RET, RET + 1, RET + 2]
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "return_dict_in_generate": True}


def batch_of(model):
    rows, images = interleaved(model)
    return {**pad([expanded(row, 3) for row in rows], "left"), "pixel_values": images}


def alone(batch, row, images):
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
    own = batch["pixel_values"][images]
    return {"input_ids": ids, **({"pixel_values": own} if len(own) else {})}


SINGLES = [(0, slice(0, 2)), (1, slice(2, 3)), (2, slice(3, 3))]


def whole_runs(row):
    """Places of the last tokens of runs in a list of token ids, of which none is torn but a last one."""
    ends = [place for place, token in enumerate(row) if token == RUN[-1]]
    for place, token in enumerate(row):
        if token in RUN:
            first = place - RUN.index(token)
            assert row[first : first + 3] == RUN[: len(row) - first], row
    return ends


def biased(model, batch, share=0.5, **options):
    """A bias of [RET] at which some rows write it."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       pixel_values=batch["pixel_values"]).logits[:, -1]  # fmt: skip
    gap = logits[:, :500].amax(-1) - logits[:, RET]
    return {**OPTIONS, "max_new_tokens": 12, "ret_bias": float(gap.quantile(share)) + 0.05} | options


@torch.no_grad()
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ["opt_clip", "gpt2_resnet", "llama_clip"])
def test_a_batch_gives_what_its_rows_give_and_their_embeddings(name, aggregation):
    model = stacked_model(name, 3, aggregation)
    batch = batch_of(model)
    options = biased(model, batch, 1.0)
    output = model.generate(**batch, **options)
    width, found = batch["input_ids"].shape[1], 0
    for row, images in SINGLES:
        single = alone(batch, row, images)
        expected = model.generate(**single, **options)
        new = output.sequences[row, width:].tolist()
        assert new == expected.sequences[0, single["input_ids"].shape[1] :].tolist()
        ends = whole_runs(new)
        assert output.ret_positions[row].tolist() == [width + place for place in ends]
        shape = (len(ends), 3, 16) if aggregation == "max" else (len(ends), 16)
        assert output.ret_embeds[row].shape == shape
        for place, embed in zip(ends, output.ret_embeds[row], strict=True):
            whole = torch.cat([single["input_ids"][0], torch.tensor(new[: place + 1])])[None]
            torch.testing.assert_close(embed[None], model.get_text_embeds(**{**single, "input_ids": whole}))
        found += len(ends)
    assert found > 1


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 2.0, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 2.0},
        {"use_cache": False},
        {"suppress_tokens": [RET + 1]},
        {"renormalize_logits": True},
    ],
    ids=str,
)
def test_no_way_of_choosing_tears_a_run(options):
    model = stacked_model("opt_clip", 3, "concat")
    batch = batch_of(model)
    bias = biased(model, batch, 1.0)["ret_bias"] + (4.0 if "do_sample" in options else 0.5)
    output = model.generate(**batch, **biased(model, batch, **options, ret_bias=bias))
    width = batch["input_ids"].shape[1]
    found = [whole_runs(row) for row in output.sequences[:, width:].tolist()]
    assert sum(map(len, found)) > 2
    assert [len(embeds) for embeds in output.ret_embeds] == list(map(len, found))


@torch.no_grad()
def test_drafted_tokens():
    model = stacked_model("opt_clip", 3, "concat")
    single = alone(batch_of(model), 2, slice(3, 3))
    options = {**biased(model, batch_of(model), 1.0), "max_new_tokens": 20}
    expected = model.generate(**single, **options)
    found = model.generate(**single, **options, prompt_lookup_num_tokens=4)
    assert torch.equal(found.sequences, expected.sequences) and len(found.ret_embeds[0]) > 2
    torch.testing.assert_close(found.ret_embeds, expected.ret_embeds)


@torch.no_grad()
def test_options_act_on_the_first_token_and_count_runs():
    model = stacked_model("opt_clip", 3, "concat")
    batch = batch_of(model)
    width = batch["input_ids"].shape[1]
    always = {**OPTIONS, "ret_bias": 50.0}
    new = model.generate(**batch, **always, max_new_tokens=7).sequences[:, width:]
    assert new.tolist() == [RUN + RUN + RUN[:1]] * 3
    new = model.generate(**batch, **always, max_new_tokens=9, max_num_rets=2, min_tokens_before_ret=2).sequences
    assert new[:, width + 2 : width + 8].tolist() == [RUN + RUN] * 3
    assert (new[:, [width, width + 1, -1]] < 500).all()
    each = model.generate(**batch, **always, max_new_tokens=6, max_num_rets=[0, 1, None]).ret_positions
    assert [len(places) for places in each] == [0, 1, 2]
    never = model.generate(**batch, **OPTIONS, max_new_tokens=6, ret_bias=-50.0)
    assert not any(map(len, never.ret_positions)) and (never.sequences[:, width:] < 500).all()


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_a_ret_ends_a_text_after_its_last_token(beams):
    model = stacked_model("opt_clip", 3, "max")
    batch = batch_of(model)
    options = {**OPTIONS, "ret_bias": 50.0, "max_new_tokens": 9, "min_tokens_before_ret": 1, "num_beams": beams}
    for eos in (RET, [2, RET], torch.tensor([RET])):
        output = model.generate(**batch, **{**options, "eos_token_id": eos})
        new = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        assert [row[1:] for row in new] == [RUN] * 3
        assert [embeds.shape for embeds in output.ret_embeds] == [(1, 3, 16)] * 3
    with pytest.raises(ValueError, match="`min_new_tokens` acts on the token that ends a text.*min_tokens_before_ret"):
        model.generate(**batch, **{**options, "eos_token_id": RET, "min_new_tokens": 3})
    assert model.generate(**batch, **{**options, "eos_token_id": 2, "min_new_tokens": 3})


@torch.no_grad()
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_run_that_is_cut_has_no_embedding(aggregation):
    model = stacked_model("opt_clip", 3, aggregation)
    batch = batch_of(model)
    for length, count in ((2, 0), (3, 1), (5, 1)):
        output = model.generate(**batch, **OPTIONS, max_new_tokens=length, ret_bias=50.0)
        queries = (3,) if aggregation == "max" else ()
        assert [embeds.shape for embeds in output.ret_embeds] == [(count, *queries, 16)] * 3


def test_the_processor_changes_nothing_of_one_token():
    model = stacked_model("opt_clip", 1, "concat")
    names = [type(each).__name__ for each in model._get_logits_processor(model.generation_config)]
    assert names == ["RetLogitsProcessor"]
