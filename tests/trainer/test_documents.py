"""Runs on documents, and on documents and pairs together."""

import pytest
import torch
from PIL import Image

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageTrainer
from modeling_fromage.trainer import pair_states
from modeling_fromage.trainer.bad_examples import BadExampleError
from modeling_fromage.trainer.document_contexts import last_tokens, text_contexts
from modeling_fromage.trainer.document_sequences import DocumentLayout
from modeling_fromage.trainer.pair_states import read_pairs
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.dirty_data import Refusing, picture
from tests.helpers.distributed import in_two_processes
from tests.helpers.training_runs import arguments
from training.first_batch import sheet_of_batch
from training.rehearsal import longest_batch

COLORS = ["red", "green", "blue", "yellow"]


def documents(count: int) -> list[dict]:
    """Documents that show one colour, and then what follows it."""
    rows = []
    for number in range(count):
        first, second = (Image.new("RGB", (32, 32), COLORS[(number + step) % 4]) for step in (0, 1))
        text = f"After {number} comes" + " and so on" * (number % 3)
        rows.append({"document": [text, {"type": "image", "image": first}, "the next", second, "."]})
    return rows


def make_trainer(folder, data, collator=None, **options):
    processor = make_processor()
    kwargs = {"train_dataset": data, "eval_dataset": options.pop("eval_dataset", None), "processing_class": processor}
    collator = collator or FromageDataCollator(processor, concat_captions_prob=1.0)
    return FromageTrainer(make_model("opt_clip"), arguments(folder, **options), collator, **kwargs)


def test_a_run_is_evaluated_saved_and_loaded(tmp_path):
    trainer = make_trainer(tmp_path, documents(8), eval_dataset=documents(8), max_steps=8, learning_rate=3e-2)
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_num_pairs"] == 16
    assert metrics["eval_loss"] < before["eval_loss"]
    assert all(metrics[f"eval_{name}"] > 0 for name in ("captioning_loss", "ret_token_loss", "contrastive_loss"))
    trainer.save_model()
    model = FromageForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = trainer.data_collator(documents(4))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, trainer.model.eval()(**batch).loss)


def test_embeddings_in_training_are_those_of_the_pipelines_prompts():
    """A `[RET]` of a document stands behind what a user's prompt has, with the image of an answer fed back."""
    model, processor, (row,) = make_model("opt_clip"), make_processor(), documents(1)
    text, image, more, following, _ = row["document"]
    parts = [text, {"type": "ret"}, image, more, {"type": "ret"}]
    prompt = processor.join_parts([{"type": "text", "text": p} if isinstance(p, str) else p for p in parts])
    with torch.no_grad():
        found = model(**FromageDataCollator(processor)([row])).text_embeds
        inputs = processor(images=[image["image"]], text=prompt, return_tensors="pt")
        expected = model.get_ret_embeds(**inputs)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("count", [1, 5, 6])
def test_the_last_smaller_batch_is_evaluated_whole(tmp_path, count):
    """It has more images than documents."""
    trainer = make_trainer(tmp_path, documents(4))
    metrics = trainer.evaluate(documents(count))
    assert metrics["eval_num_pairs"] == 2 * count
    batches = [trainer.data_collator(documents(count)[start : start + 4]) for start in range(0, count, 4)]
    with torch.no_grad():
        losses = [float(trainer.model(**batch).loss) for batch in batches]
    sizes = [len(batch["input_ids"]) for batch in batches]
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / count
    assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_batches_with_nothing_to_be_found_do_not_lower_the_losses_of_retrieval(tmp_path):
    trainer = make_trainer(tmp_path, documents(4))
    shown = [{"document": [picture(number), f"number {number}"]} for number in range(4)]
    alone, both = trainer.evaluate(documents(4)), trainer.evaluate(documents(4) + shown)
    for name in ("eval_ret_token_loss", "eval_contrastive_loss"):
        assert both[name] == pytest.approx(alone[name], rel=1e-5)
    assert both["eval_captioning_loss"] != pytest.approx(alone["eval_captioning_loss"], rel=1e-5)


def test_pairs_and_documents_train_together(tmp_path):
    pairs = [
        {"image": Image.new("RGB", (32, 32), color), "caption": f"a {color} square"}
        for color in COLORS
        for _ in range(2)
    ]
    rows = [row for both in zip(pairs, documents(8), strict=True) for row in both]
    trainer = make_trainer(tmp_path, rows, eval_dataset=rows, max_steps=3, eval_strategy="steps", eval_steps=3)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_num_pairs"] == 8 + 16
    assert (tmp_path / "samples" / "step-3.png").is_file()  # of the pairs
    batch = trainer.data_collator(rows[:4])
    assert batch["input_ids"].shape[0] == 4  # nothing is concatenated beside documents
    assert sheet_of_batch(batch, trainer.processing_class).height > 6 * 100
    assert all("document" in rows[i] for i in longest_batch(trainer, rows, 4).indices)


def test_a_warm_start_finds_a_documents_images_from_the_texts_before_them(tmp_path):
    """By states that are those of prompts of the same texts; and joint training goes on with the documents."""
    processor, model, rows = make_processor(), make_model("opt_clip"), documents(4)
    collator = FromageDataCollator(processor)
    pairs = read_pairs(
        model, collator, rows + [{"image": rows[0]["document"][3], "caption": "a pair"}], tmp_path, seed=0
    )
    assert len(pairs) == 2 * 4 + 1
    seen = {}
    for _ in range(20):
        batch = pairs.__getitems__(torch.randperm(len(pairs)).tolist())
        for number, state in zip(batch["labels"].tolist(), batch["ret_states"][0], strict=True):
            seen.setdefault(number, {})[tuple(state.tolist())] = state
    text, _, more, *_ = rows[1]["document"]
    for number, contexts in {2: [[text]], 3: [[text, more], [more]], 8: [["a pair"]]}.items():
        prompts = ["".join([processor.bos_text, *context, "[RET]"]) for context in contexts]
        ids = [processor(text=prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
        expected = [model.get_text_embeds(each) for each in ids]
        found = [model.adapter.text_embeds([state[None]]) for state in seen[number].values()]
        assert len(found) == len(expected)
        for embeds in expected:
            assert min((embeds - each).abs().max() for each in found) < 1e-3

    trainer = FromageTrainer(
        model, arguments(tmp_path / "run", max_steps=2), train_dataset=rows, processing_class=processor,
        retrieval_warm_start_steps=2, retrieval_warm_start_batch_size=4,
    )  # fmt: skip
    assert trainer.train().global_step == 2


def test_contexts_of_a_chat_and_of_a_document():
    """Of a chat's images those of the assistant, after all that was said; long contexts keep BOS and their end."""
    processor, image = make_processor(), Image.new("RGB", (32, 32))
    parts = ["one", image, "two", "three", image, image]
    ids, _ = DocumentLayout(processor, 64).encode({"document": parts})
    found = text_contexts(processor, {"document": parts}, ids, 64)
    told = {number: [processor.tokenizer.decode(prompt) for prompt in own] for number, own in found.items()}
    bos = processor.bos_text
    assert told[0] == [f"{bos}one[RET]"]
    assert told[1] == told[2] == [f"{bos}onetwothree[RET]", f"{bos}twothree[RET]", f"{bos}three[RET]"]
    short = text_contexts(processor, {"document": parts}, ids, 4)[1][0]
    assert len(short) == 4 and processor.tokenizer.decode(short).startswith(bos)
    assert short[1:] == found[1][0][-3:]
    shown = {"type": "image", "image": image}
    said = [
        {"role": "user", "content": [shown, {"type": "text", "text": "more"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "here"}, shown]},
    ]
    ids, images = DocumentLayout(processor, 64).encode({"messages": said})
    contexts = text_contexts(processor, {"messages": said}, ids, 64)
    assert len(images) == 2 and list(contexts) == [1]
    text = processor.tokenizer.decode(contexts[1][0])
    assert "more" in text and text.endswith("here[RET]") and "image" not in text


def as_parts(*content):
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


def test_a_chat_is_tokenised_as_the_pipelines_prompt_of_its_texts():
    """An image that is left out parts no tokens."""
    processor, shown = make_processor(), {"type": "image", "image": Image.new("RGB", (32, 32))}
    said = [
        {"role": "user", "content": as_parts(shown, "more of the cats")},
        {"role": "assistant", "content": as_parts("here it is", shown, " and", shown)},
    ]
    ids, _ = DocumentLayout(processor, 512).encode({"messages": said})
    contexts = text_contexts(processor, {"messages": said}, ids, 512)
    for image, words in {1: "here it is", 2: "here it is and"}.items():
        prompt = processor(text=f"Q: more of the cats\nA: {words}[RET]")["input_ids"][0]
        assert contexts[image] == [tuple(prompt)]


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_cut_begins_with_bos_and_a_whole_ret(count):
    """Also where the token that begins texts ends some, too; and behind images that a prompt begins with."""
    processor = make_processor(num_ret_tokens=count)
    bos = processor.token_ids("a")[0]
    ids = processor.token_ids("one two [RET]<|image|> three</s> four <|image|> five[RET]")
    for length in range(count + 2, len(ids)):
        kept = last_tokens(processor, ids, length)
        rest = [token for token in kept if token != processor.image_token_id]
        shown = kept.count(processor.image_token_id)
        assert len(kept) <= length and shown % 2 == 0 and rest[0] == bos
        assert bos in (kept[0], kept[2])
        assert sum(token in processor.ret_token_ids for token in kept) % count == 0


def test_an_image_with_no_words_before_it_is_not_to_be_found_by_words():
    processor, shown = make_processor(), {"type": "image", "image": Image.new("RGB", (32, 32))}
    for document, found, told in [
        ({"document": ["", shown, "one"]}, [], []),
        ({"document": [" \n", shown, "one", shown]}, [1], [1]),
        ({"document": [shown, " ", shown, "one", " ", shown]}, [1, 2], [2]),
        ({"messages": [{"role": "user", "content": [shown]}, {"role": "assistant", "content": [shown]}]}, [1], []),
    ]:
        ids, _ = DocumentLayout(processor, 64).encode(document)
        assert [image for image in ids.finds if image != -100] == found
        assert list(text_contexts(processor, document, ids, 64)) == told


def test_a_warm_start_needs_texts_before_images(tmp_path):
    rows = [{"document": [Image.new("RGB", (32, 32)), "text"]}] * 4
    with pytest.raises(ValueError, match="two images or more with a text before them, got 0"):
        read_pairs(make_model("opt_clip"), FromageDataCollator(make_processor()), rows, tmp_path)


def test_a_bad_document_is_passed_over(tmp_path):
    rows = documents(8)
    rows[3] = {"document": ["no image here"]}
    rows[5] = {"document": ["broken", {"type": "image", "image": {"bytes": b"no picture", "path": None}}]}
    processor = make_processor()
    trainer = FromageTrainer(
        make_model("opt_clip"), arguments(tmp_path, max_steps=4), train_dataset=rows, processing_class=processor,
        on_bad_example="skip", max_bad_share=0.5,
    )  # fmt: skip
    metrics = trainer.train().metrics
    assert metrics["bad_examples"] == 2


@pytest.mark.parametrize("place", [2, 8])
def test_a_warm_start_takes_another_example_for_a_picture_that_is_refused(tmp_path, place):
    """Of a document, and of a pair for which a document comes in."""
    rows = documents(12)
    bad = {2: {"document": ["bad", picture(1), "next", picture(2)]}, 8: {"image": picture(1), "caption": "bad"}}
    rows[place] = bad[place]
    processor = make_processor()
    processor.image_processor = Refusing(processor.image_processor, 1)
    trainer = FromageTrainer(
        make_model("opt_clip"), arguments(tmp_path, max_steps=2), train_dataset=rows, processing_class=processor,
        retrieval_warm_start_steps=2, retrieval_warm_start_batch_size=4, on_bad_example="skip", max_bad_share=0.5,
    )  # fmt: skip
    assert trainer.train().metrics["bad_examples_image_processor_raises"] == 1


def test_pictures_of_documents_are_encoded_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_states, "_IMAGES", 6)
    model, processor, rows = make_model("opt_clip"), make_processor(), documents(5)
    encode, sizes = model.get_pooled_image_features, []

    def counted(pixel_values):
        sizes.append(len(pixel_values))
        return encode(pixel_values)

    monkeypatch.setattr(model, "get_pooled_image_features", counted)
    rows[1]["document"].insert(0, picture(3))  # which is not to be found
    pairs = read_pairs(model, FromageDataCollator(processor), rows, tmp_path)
    assert sizes == [6, 4] and len(pairs) == 10
    shown = [part for row in rows for part in row["document"] if not isinstance(part, str)]
    shown = [part["image"] if isinstance(part, dict) else part for part in shown if part is not rows[1]["document"][0]]
    expected = encode(processor.image_processor(shown, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(pairs.features.float(), expected, rtol=1e-2, atol=1e-2)


def test_cached_features_that_are_no_row_an_image_are_told_of():
    (row,) = documents(1)
    collator = FromageDataCollator(make_processor())
    for features, words in [
        (torch.rand(24), "no row an image: expected .*got .24"),
        ([[0.0] * 24, None], "no numbers"),
        (torch.rand(1, 24), "1 of 2 images"),
    ]:
        with pytest.raises(BadExampleError, match=words):
            collator([{**row, "pooled_image_features": features}])


@pytest.mark.parametrize("is_first", [True, False])
def test_cached_features_beside_pictures_are_refused(tmp_path, is_first):
    """Rather than skipped as bad examples."""
    rows = [*documents(2), {"pooled_image_features": torch.rand(24), "caption": "a pair"}]
    rows = rows[::-1] if is_first else rows
    processor = make_processor()
    trainer = FromageTrainer(
        make_model("opt_clip"), arguments(tmp_path, train_sampling_strategy="sequential"), train_dataset=rows,
        processing_class=processor, on_bad_example="skip", max_bad_share=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="to all examples, or to none"):
        trainer.train()


def test_an_absent_retrieval_caption_is_none():
    """Tables fill in absent keys."""
    collator = FromageDataCollator(make_processor(), concat_captions_prob=0)
    rows = [{"image": picture(number), "caption": f"number {number}"} for number in range(2)]
    expected = collator(rows)
    found = collator([{**row, "retrieval_caption": None} for row in rows])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("steps", [0, 2], ids=["joint training", "warm start"])
def test_documents_longer_than_the_context_are_refused(tmp_path, steps):
    """Rather than a look-up that fails, on a GPU without words."""
    rows = [{"document": [f"one two three four {number} " * 20, picture(number)]} for number in range(4)]
    trainer = FromageTrainer(
        make_model("opt_clip"), arguments(tmp_path, max_steps=1), train_dataset=rows, processing_class=make_processor(),
        retrieval_warm_start_steps=steps, retrieval_warm_start_batch_size=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="context has 128. Shorten them; in training, by .*max_document_length"):
        trainer.train()


def evaluate_in_two(rank: int, folder: str):
    trainer = make_trainer(folder, documents(4), ddp_backend="gloo")
    with pytest.raises(ValueError, match="evaluate on them in one process"):
        trainer.evaluate(documents(4))


def test_several_processes_do_not_evaluate_on_documents(tmp_path):
    in_two_processes(evaluate_in_two, str(tmp_path))


def test_cached_features_give_the_batch_that_pixels_give(tmp_path):
    model, processor, rows = make_model("opt_clip"), make_processor(), documents(4)
    collator = FromageDataCollator(processor)
    live = collator(rows)
    features = model.get_pooled_image_features(live["pixel_values"]).split(2)
    cached = collator([{**row, "pooled_image_features": own} for row, own in zip(rows, features, strict=True)])
    assert cached.keys() - {"pooled_image_features"} == live.keys() - {"pixel_values"}
    torch.testing.assert_close(model(**cached).loss, model(**live).loss)
