"""The goldens of the original code, and our models with its weights; see fixtures/parity/README.md."""

import json

import torch
from PIL import Image
from safetensors.torch import load_file

from hub_scripts.convert_original_checkpoint import original_names
from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageImageIndex
from modeling_fromage.original.inference import original_generation
from tests.helpers.backbones import make_processor
from tests.helpers.paths import IMAGES, PARITY

CASES = {"case_a_opt_tied": {"num_image_tokens": 1, "text_embed_layers": [-1]},
         "case_c_layers_1_2": {"num_image_tokens": 2, "text_embed_layers": [1, 2]}}  # fmt: skip
LOGITS = 2e-4  # the goldens were computed by another version of torch


class Case:
    def __init__(self, name):
        self.folder, options = PARITY / name, CASES[name]
        self.processor = make_processor(name, options["num_image_tokens"])
        self.model = FromageForConditionalGeneration.from_vision_text_pretrained(
            str(self.folder / "vision_model"), str(self.folder / "language_model"),
            processor=self.processor, projection_dim=16, **options,
        ).train()  # fmt: skip
        initial = load_file(self.folder / "init_trainable.safetensors")
        torch.testing.assert_close(self.model.adapter.ret_embedding.weight.data, initial["ret_input_embeddings.weight"])
        initial.pop("input_embeddings_after_resize")
        parameters = original_names(self.model)
        assert initial.keys() == parameters.keys()
        for key, value in initial.items():
            parameters[key].data.copy_(value)
        self.captions = json.loads((PARITY / "common" / "captions.json").read_text(encoding="utf-8"))
        self.pixels = load_file(PARITY / "common" / "pixel_values.safetensors")["pixel_values"]
        self.forward, self.grads = (load_file(self.folder / f"{n}.safetensors") for n in ("forward", "grads"))
        self.inputs = json.loads((self.folder / "inputs.json").read_text(encoding="utf-8"))
        self.input_tensors = load_file(self.folder / "inputs.safetensors")

    def batch(self, name, concat, **options):
        collate = FromageDataCollator(self.processor, max_length=24, concat_captions_prob=float(concat), **options)
        info = self.inputs["batches"][name]
        batch = collate([{"pooled_image_features": torch.zeros(32), "caption": c} for c in info["captions"]])
        del batch["pooled_image_features"]
        return {**batch, "pixel_values": self.input_tensors[f"{name}.pixel_values"]}


class Inference:
    """A parity case with the weights after its five training steps, and the index of its pictures."""

    def __init__(self, name):
        case = Case(name)
        self.model, self.processor = case.model.eval(), case.processor
        trained = load_file(case.folder / "train.safetensors")
        for key, parameter in original_names(self.model).items():
            parameter.data.copy_(trained[f"final.{key}"])
        self.index = FromageImageIndex.build(self.model, self.processor, IMAGES, show_progress=False)
        self.golden, self.processed = (
            json.loads((case.folder / f"{kind}.json").read_text(encoding="utf-8")) for kind in ("infer", "postprocess")
        )
        self.tensors, self.processed_tensors = (
            load_file(case.folder / f"{kind}.safetensors") for kind in ("infer", "postprocess")
        )

    def prompt(self, parts):
        return [value if kind == "text" else Image.open(IMAGES / value) for kind, value in parts]

    def answer(self, prompt, **kwargs):
        segments = original_generation(self.model, self.processor, self.prompt(prompt), self.index, **kwargs)
        return as_golden(segments)


def as_golden(segments):
    """Our segments as the goldens write them: pictures by their numbers."""
    return [
        {"text": segment["text"]}
        if segment["type"] == "text"
        else {"images": [int(image_id[4:7]) for image_id in segment["ids"]]}
        for segment in segments
    ]
