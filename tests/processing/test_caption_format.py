"""How captions are laid out: kept with the processor, and the same in training, evaluation, pipelines and cards."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments, pipeline

from hub_scripts import push_to_hub
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import (
    FromageDataCollator,
    FromageForConditionalGeneration,
    FromagePipeline,
    FromageProcessor,
    FromageTrainer,
)
from tests.helpers.backbones import PARITY, make_model, make_processor
from training.evaluation import captioning
from training.evaluation.captioning import generate_captions

PREFIX, SUFFIX, LENGTH = "A picture of", "\n", 9
FORMAT = {"caption_prefix": PREFIX, "caption_suffix": SUFFIX, "max_length": LENGTH}
DEFAULTS = {"caption_prefix": "", "caption_suffix": "", "max_length": 24}
IMAGES = sorted((PARITY / "common" / "images").glob("*.png"))[:4]


def format_of(thing) -> dict:
    return {name: getattr(thing, name) for name in DEFAULTS}


def formatted(**changes) -> FromageProcessor:
    processor = make_processor()
    processor.set_caption_format(**{**FORMAT, **changes})
    return processor


def features_of(model, processor, images=IMAGES) -> torch.Tensor:
    pixels = processor(images=[str(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.get_pooled_image_features(pixels)


def examples(count=4) -> list[dict]:
    texts = ["a red cat", "the old train waiting at the station in the rain for hours", "a bird", "two dogs"]
    return [{"pooled_image_features": torch.rand(24), "caption": text} for text in texts[:count]]


# ---- the processor has it ----


def test_saved_with_the_processor(tmp_path):
    assert format_of(make_processor()) == DEFAULTS
    processor = formatted()
    processor.save_pretrained(tmp_path)
    again = FromageProcessor.from_pretrained(tmp_path)
    assert format_of(again) == FORMAT
    assert len(again(text="word " * 40).input_ids[0]) > 40  # the length is of captions in training
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    assert FORMAT.items() <= saved.items()
    # What was saved before these fields were.
    path.write_text(json.dumps({name: value for name, value in saved.items() if name not in FORMAT}))
    assert format_of(FromageProcessor.from_pretrained(tmp_path)) == DEFAULTS
    changed = FromageProcessor.from_pretrained(tmp_path, **FORMAT)
    assert format_of(changed) == FORMAT and len(changed(text="word " * 40).input_ids[0]) > 40
    case = PARITY / "case_a_opt_tied"
    names = str(case / "vision_model"), str(case / "language_model")
    assert format_of(FromageProcessor.from_vision_text_pretrained(*names, **FORMAT)) == FORMAT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_prefix": "an <|image|>"}, "`caption_prefix` must be a text without"),
        ({"caption_suffix": 3}, "`caption_suffix` must be a text"),
        ({"max_length": "24"}, "`max_length` must be a number of tokens, got '24'"),
        ({"max_length": 2}, "leaves no room"),
        ({"caption_suffix": "and so on and so on", "max_length": 6}, "leaves no room"),
    ],
)
def test_impossible_formats(wrong, message):
    processor = make_processor()
    with pytest.raises(ValueError, match=message):
        FromageDataCollator(processor, **wrong)
    assert format_of(processor) == DEFAULTS  # nothing of it was taken


# ---- training ----


def test_collator_takes_and_gives(caplog):
    processor = formatted()
    with caplog.at_level(logging.WARNING):
        collate = FromageDataCollator(processor)
        assert format_of(collate) == format_of(processor) == FORMAT
        explicit = FromageDataCollator(make_processor(), **FORMAT)
        assert format_of(explicit.processor) == format_of(explicit) == FORMAT
    assert not caplog.records
    for name, tensor in collate(examples()).items():
        if name != "pooled_image_features":
            assert torch.equal(tensor, explicit(examples())[name]), name
    with caplog.at_level(logging.WARNING):
        plain = FromageDataCollator(processor, caption_prefix="")  # an empty text is a value
    assert format_of(processor) == format_of(plain) == {**FORMAT, "caption_prefix": ""}
    assert "`caption_prefix` was 'A picture of' and is now ''" in caplog.text
    with pytest.raises(ValueError, match="`caption_prefix` is 'A picture of' in the collator, and ''"):
        collate(examples())  # what is saved would not be what was trained


def test_a_second_collator_does_not_change_what_is_saved_unnoticed():
    processor = make_processor()
    collate = FromageDataCollator(processor)
    FromageDataCollator(processor, max_length=12)
    with pytest.raises(ValueError, match="`max_length` is 24 in the collator, and 12 in the processor"):
        collate(examples())


def test_trainer_saves_the_collators_processor(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    collator = FromageDataCollator(make_processor(), **FORMAT)
    with pytest.raises(ValueError, match="`caption_prefix` is 'A picture of' in the collator, and ''"):
        FromageTrainer(make_model("opt_clip"), args, collator, processing_class=make_processor())
    FromageTrainer(make_model("opt_clip"), args, collator, processing_class=collator.processor)
    FromageTrainer(make_model("opt_clip"), args, collator, processing_class=formatted())


@pytest.mark.parametrize("has_bos", [True, False])
def test_one_prompt_for_all(has_bos, tmp_path):
    """What training puts before a caption is what the processor makes of the prompt, BOS once."""
    if has_bos:
        processor = formatted(max_length=24)
    else:
        checkpoint = make_tiny_checkpoint(tmp_path, num_image_tokens=2)
        processor = FromageProcessor.from_pretrained(checkpoint, caption_prefix=PREFIX)
    assert bool(processor.bos_text) == has_bos
    batch = FromageDataCollator(processor, concat_captions_prob=0)(examples(1))
    image = Image.open(IMAGES[0])
    prompt = processor(text=processor.caption_prompt, images=image).input_ids[0]
    assert prompt == processor.caption_prompt_ids()
    row = batch["input_ids"][0].tolist()
    assert row[: len(prompt)] == prompt
    bos = [processor.tokenizer.bos_token_id] if processor.bos_text else []
    prefix = processor.tokenizer(PREFIX, add_special_tokens=False).input_ids
    assert prompt == [processor.image_token_id] * 2 + prefix + bos
    targets = batch["labels"][0].tolist()
    assert targets[: len(prompt)] == [-100] * (len(prompt) - len(bos)) + bos
    assert targets[len(prompt) :] == row[len(prompt) :]


# ---- afterwards ----


@pytest.mark.parametrize("suffix", ["\n", " and", ""])
def test_pipeline_captions_an_image_as_evaluation_does(suffix):
    model, processor = make_model("opt_clip"), formatted(caption_suffix=suffix)
    pipe = FromagePipeline(model=model, processor=processor)
    written = generate_captions(model, processor, features_of(model, processor), max_new_tokens=12)
    assert any(written)
    for path, caption in zip(IMAGES, written, strict=True):
        answer = pipe(path, max_new_tokens=12, max_num_rets=0)
        assert "".join(segment["text"] for segment in answer) == caption
    # The prefix given by hand, as one could before, is another text for a model that has BOS between the two.
    ids = [processor.caption_prompt_ids()]
    output = model.generate(
        torch.tensor(ids), pooled_image_features=features_of(model, processor)[:1], max_new_tokens=12, max_num_rets=0
    )
    text = processor.decode(output[0, len(ids[0]) :], skip_special_tokens=True)
    assert text.split("\n")[0].split(suffix or "\n")[0].strip() == written[0]


def test_pipeline_without_a_format_is_as_before():
    model, processor = make_model("opt_clip"), make_processor()
    pipe = FromagePipeline(model=model, processor=processor)
    inputs = pipe.preprocess(IMAGES[0])
    assert inputs["text"] == processor.image_token and inputs["stops"] == ["\n"]
    processor.set_caption_format(**FORMAT)
    assert pipe.preprocess(IMAGES[0])["text"] == processor.image_token + PREFIX + processor.bos_text
    assert pipe.preprocess([IMAGES[0], "and"])["text"] == processor.image_token + "and"
    assert pipe.preprocess(["and"])["text"] == "and"


def test_evaluation_reads_captions_as_they_were_trained(tmp_path):
    table = tmp_path / "data.tsv"
    table.write_text("caption\timage\n" + "".join(f"a cat number {i}\t{path}\n" for i, path in enumerate(IMAGES)))
    model = make_model("opt_clip")

    def perplexity(processor, **options):
        evaluator = captioning.CaptioningEvaluator(data=str(table), tasks=["perplexity"], **options)
        results = evaluator.run(model, processor).results
        return results["perplexity"], results["caption_format"]

    trained = perplexity(formatted())
    assert trained[1] == FORMAT
    assert perplexity(make_processor(), **FORMAT) == trained
    assert perplexity(make_processor())[0] != trained[0]
    assert perplexity(formatted(), caption_prefix="")[1] == {**FORMAT, "caption_prefix": ""}


def test_card_of_a_model_with_a_format(tmp_path, capsys):
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    processor = FromageProcessor.from_pretrained(checkpoint, **FORMAT)
    processor.save_pretrained(checkpoint)
    staged = tmp_path / "staged"
    push_to_hub.main([str(checkpoint), "org/name", "--dry-run", "--save-backbones", "--staging-dir", str(staged)])
    *printed, similarity, _ = capsys.readouterr().out.splitlines()
    (snippet,) = re.findall(r"```python\n(.*?)```", Path(staged, "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert f"{processor.image_token}{PREFIX}" in snippet
    model, processor = FromageForConditionalGeneration.from_pretrained(staged), FromageProcessor.from_pretrained(staged)
    pixels = processor(images=Image.new("RGB", (224, 224), "red"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_pooled_image_features(pixels)
    (caption,) = generate_captions(model, processor, features, max_new_tokens=16)
    assert caption and "\n".join(printed).removeprefix(PREFIX).strip() == caption
    assert "\n".join(printed).startswith(PREFIX) and -1 <= float(similarity) <= 1


def test_card_shows_what_training_measured(tmp_path, monkeypatch):
    """What `training.train` leaves in a checkpoint, without a flag; how fast it was is not of the model."""
    monkeypatch.setattr(push_to_hub, "load_as_a_stranger", lambda folder, repo_id: "")
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    metrics = {"eval_text_to_image_R@1": 0.25, "eval_loss": 5.5, "eval_runtime": 1.5, "train_samples_per_second": 7.0,
               "total_flos": 1e9}  # fmt: skip
    (checkpoint / "all_results.json").write_text(json.dumps(metrics))
    push = [str(checkpoint), "org/name", "--dry-run", "--save-backbones", "--staging-dir"]
    push_to_hub.main([*push, str(tmp_path / "default")])
    card = (tmp_path / "default" / "README.md").read_text(encoding="utf-8")
    assert "| eval_text_to_image_R@1 | 0.25 |" in card and "| eval_loss | 5.5 |" in card
    assert not re.search("runtime|per_second|total_flos", card)
    (tmp_path / "other.json").write_text('{"accuracy": 0.5}')
    push_to_hub.main([*push, str(tmp_path / "given"), "--results", str(tmp_path / "other.json")])
    card = (tmp_path / "given" / "README.md").read_text(encoding="utf-8")
    assert "| accuracy | 0.5 |" in card and "eval_loss" not in card


def test_transformers_own_pipeline_takes_the_prompt():
    """As the model card's snippet: the prompt is text, and BOS stays where training has it."""
    model, processor = make_model("opt_clip"), formatted(caption_suffix="")
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answer = pipe(
        images=str(IMAGES[0]),
        text=processor.caption_prompt,
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 6, "max_num_rets": 0},
    )
    (caption,) = generate_captions(model, processor, features_of(model, processor, IMAGES[:1]), max_new_tokens=6)
    assert caption and answer[0]["generated_text"].split("\n")[0].strip() == caption
