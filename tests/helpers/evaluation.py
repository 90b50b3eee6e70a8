"""Data in the real formats of the evaluations, and the models that they are run on."""

import json
import shutil

import torch
from safetensors.torch import load_file

from tests.helpers.backbones import PARITY
from tests.helpers.parity import Inference
from tests.helpers.paths import IMAGES
from training import evaluate

LOSSES = 5e-4  # a sum of up to ten tokens' losses, each within the logits' tolerance


class Scripts(Inference):
    """A parity case with what the original's evaluation scripts were run on, in files."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.evals = json.loads((PARITY / name / "evals.json").read_text(encoding="utf-8"))
        self.eval_tensors = load_file(PARITY / name / "evals.safetensors")
        self.images = folder / "images"
        self.images.mkdir()
        self.folder = folder

    def write(self, name, content):
        path = self.folder / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return path


def dialogue_images(scripts):
    for number, name in enumerate(scripts.evals["visdial_t2i"]["images"], start=1):
        shutil.copy(IMAGES / name, scripts.images / f"VisualDialog_val2018_{number:012d}.png")


def run(*arguments):
    evaluate.main([str(argument) for argument in arguments])


def png(number):
    return (IMAGES / f"img_{number:03d}.png").read_bytes()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sis_file(stories, urls):
    """As VIST's: every annotation in a list of its own, photos with their URLs."""
    annotations = [
        [{"story_id": story, "photo_flickr_id": photo, "text": text, "worker_arranged_photo_order": order,
          "album_id": "1", "tier": "story-in-sequence"}]
        for story, rows in stories.items() for order, photo, text in rows
    ]  # fmt: skip
    photos = {photo for rows in stories.values() for _, photo, _ in rows}
    images = [
        {"id": photo, **urls.get(photo, {"url_o": f"http://127.0.0.1:9/{photo}.jpg"})} for photo in sorted(photos)
    ]
    return {"images": images, "annotations": annotations, "albums": [], "info": {}, "type": "story-in-sequence"}


def visdial_file(count, images):
    """As VisDial 1.0's: texts by number, ten rounds, candidates by number."""
    questions = ["is it day", "how many", "what is it", "any dogs"]
    texts = ["yes", "no", "two", "a cat", "", "in the park", "i can't tell", "a small bird", "green", "3"]
    dialogs = []
    for number in range(count):
        rounds = []
        for i in range(10):
            options = [(number + i + j) % len(texts) for j in range(len(texts))]
            target = (3 * i + number) % len(texts)
            rounds.append({"question": (i + number) % 4, "answer": options[target], "answer_options": options,
                           "gt_index": target})  # fmt: skip
        dialogs.append({"image_id": images[number], "caption": "a picture", "dialog": rounds})
    return {"version": "1.0", "split": "val2018", "data": {"questions": questions, "answers": texts,
                                                          "dialogs": dialogs}}  # fmt: skip


def spy(function, calls):
    def wrapped(*args):
        calls.append(args)
        return function(*args)

    return wrapped


class FakeDualEncoder:
    """Texts to vectors that are known."""

    def __init__(self, **vectors):
        self.vectors = vectors

    def text_embeds(self, texts, **kwargs):
        return torch.stack([self.vectors[text] for text in texts])
