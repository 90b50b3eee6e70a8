"""The picture that each evaluation draws: captions and retrievals of a few held-out images."""

import re

import pytest
import torch
from PIL import Image, ImageChops

from modeling_fromage import FromageDataCollator, FromageTrainer
from modeling_fromage.trainer import samples
from modeling_fromage.trainer.evaluation import generate_captions
from modeling_fromage.trainer.samples import draw_samples
from tests.helpers.backbones import PARITY, make_model, make_processor
from tests.helpers.training_runs import arguments, examples

IMAGES = sorted((PARITY / "common" / "images").iterdir())


def pictures(count: int) -> list[dict]:
    return [{"image": str(IMAGES[i % len(IMAGES)]), "caption": f"picture {i}"} for i in range(count)]


def make_trainer(folder, data, callbacks=(), trainer_options=None, **options):
    collator = FromageDataCollator(make_processor(), max_length=16)
    return FromageTrainer(model=make_model("opt_clip"), args=arguments(folder, **options), train_dataset=data,
                          eval_dataset=data, data_collator=collator, callbacks=list(callbacks),
                          **(trainer_options or {}))  # fmt: skip


class Sheets:
    """The sheets that were drawn, as texts."""

    def __init__(self, monkeypatch):
        self.rows: list[list[list[str]]] = []
        draw = samples.draw_sheet

        def drawn(titles, rows, widths):
            self.rows.append([["".join(word.text for word in cell.words) for cell in row] for row in rows])
            self.pictures = [[cell.picture is not None for cell in row] for row in rows]
            return draw(titles, rows, widths)

        monkeypatch.setattr(samples, "draw_sheet", drawn)


def test_each_evaluation_writes_a_picture(tmp_path, monkeypatch):
    sheets = Sheets(monkeypatch)
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, pictures(6), trainer_options={"eval_samples": 3}, **options)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-1.png", "step-2.png"]
    with Image.open(tmp_path / "samples" / "step-2.png") as sheet:
        assert sheet.width > 800 and sheet.height > 3 * 160
    first, second = sheets.rows
    assert len(first) == 3 and [row[1].split("\n")[0] for row in first] == [row[1].split("\n")[0] for row in second]
    assert len({row[1].split("\n")[0] for row in first}) == 3  # other images each, and the same ones at each evaluation


def test_what_is_on_the_picture(tmp_path, monkeypatch):
    sheets = Sheets(monkeypatch)
    collator = FromageDataCollator(make_processor(), max_length=12, training=False)
    model, data = make_model("opt_clip"), pictures(6)
    model.eval()
    with torch.no_grad():
        output = model(**collator(data))
        features = model.get_pooled_image_features(collator(data)["pixel_values"])
    embeds = {name: output[name] for name in ("image_embeds", "text_embeds")}
    draw_samples(model, collator, data, [4, 1], embeds)
    written = generate_captions(model, collator.processor, features, max_new_tokens=12)
    nearest = (output.text_embeds @ output.image_embeds.t()).topk(3)
    for number, row in zip((4, 1), sheets.rows[0], strict=True):
        assert row[1].split() == f"caption: picture {number} model: {written[number]}".split()
        for place in range(3):
            i, score = nearest.indices[number, place], nearest.values[number, place]
            assert row[2 + place].split() == f"{score:.2f} picture {i}".split()
    assert sheets.pictures == [[True, False, True, True, True]] * 2
    shuffled = {name: value.flip(0) for name, value in embeds.items()}  # as of an evaluation grouped by length
    draw_samples(model, collator, data, [4, 1], shuffled)
    assert all(row[2:] == ["", "", ""] for row in sheets.rows[1])


def test_cached_features_are_shown_by_their_captions(tmp_path, monkeypatch):
    sheets = Sheets(monkeypatch)
    data = [{**example, "retrieval_caption": ["found by this", "or that"]} for example in examples(5)]
    make_trainer(tmp_path, data).evaluate()
    assert (tmp_path / "samples" / "step-0.png").is_file()
    assert not any(map(any, sheets.pictures)) and "found by: found by this" in sheets.rows[0][0][1]
    assert all("number" in row[2] for row in sheets.rows[0])


def test_what_cannot_be_read_is_left_out(monkeypatch):
    sheets = Sheets(monkeypatch)
    collator = FromageDataCollator(make_processor(), max_length=6, training=False)
    model, data = make_model("opt_clip").eval(), pictures(3)
    with torch.no_grad():
        output = model(**collator(data))
    embeds = {name: output[name] for name in ("image_embeds", "text_embeds")}
    data[0] = {"image": "missing.png", "caption": "not there"}
    draw_samples(model, collator, data, [0, 2], embeds)
    (row,) = sheets.rows[0]  # the score of the unreadable one stays, without a picture
    assert row[1].startswith("caption: picture 2") and any(re.fullmatch(r"-?\d\.\d\d ", text) for text in row[2:])
    draw_samples(model, collator, data, [0], embeds)
    assert sheets.rows[1] == []


def test_sampling_leaves_training_as_it_is(tmp_path):
    trained = []
    for count in (0, 4):
        options = {"eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(tmp_path / str(count), examples(9), trainer_options={"eval_samples": count}, **options)
        trainer.train()
        assert trainer.data_collator.training
        trained.append(trainer.model.adapter.state_dict())
    assert not (tmp_path / "0" / "samples").exists()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_several_evaluation_sets_have_a_picture_each(tmp_path):
    data = examples(4)
    trainer = make_trainer(tmp_path, data)
    trainer.evaluate({"birds": data, "cats": data[:3]})
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0-birds.png", "step-0-cats.png"]


def test_tensorboard_gets_the_picture(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "report_to": "tensorboard"}
    make_trainer(tmp_path, pictures(3), **options).train()
    (folder,) = (tmp_path / "runs").iterdir()
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == ["eval/samples"]


def test_long_words_and_many_lines_fit():
    from modeling_fromage.trainer.pictures import Cell, draw_sheet, words_of

    words = words_of("short " + "l" * 500 + " and " * 60)
    sheet = draw_sheet(["title"], [[Cell(words=words)]], [200])
    margin = sheet.crop((sheet.width - 4, 0, sheet.width, sheet.height))
    lines = ImageChops.difference(margin, Image.new("RGB", margin.size, "white")).convert("L").histogram()
    assert sheet.height > 20 * 12 and sum(lines[60:]) == 0  # nothing but light lines at the right edge


class OwnCollator(FromageDataCollator):
    """Takes examples of its own."""

    def __call__(self, rows):
        return super().__call__([{"image": row["img"], "caption": row["text"]} for row in rows])


def test_collators_and_data_that_samples_cannot_read_are_left_alone(tmp_path):
    rows = [{"img": row["image"], "text": row["caption"]} for row in pictures(4)]
    collator = OwnCollator(make_processor(), max_length=16)
    trainer = FromageTrainer(make_model("opt_clip"), arguments(tmp_path), collator, eval_dataset=rows)
    assert trainer.evaluate()["eval_num_pairs"] == 4 and not (tmp_path / "samples").exists()

    class Sized(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(pictures(4))

        def __len__(self):
            return 4

    assert make_trainer(tmp_path, Sized()).evaluate()["eval_num_pairs"] == 4 and not (tmp_path / "samples").exists()
