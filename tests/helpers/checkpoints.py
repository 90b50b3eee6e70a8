"""Models made from folders of backbones, what they compute, and what their checkpoints hold."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor

TRAINED_KEYS = {
    "adapter.logit_scale",
    *(f"adapter.{name}.{kind}" for name in ("multi_modal_projector", "visual_projection", "text_projection.0")
      for kind in ("weight", "bias")),
    "adapter.ret_embedding.weight",
}  # fmt: skip


def assemble(backbones: Path, **kwargs) -> tuple[FromageForConditionalGeneration, FromageProcessor]:
    vision, text = str(backbones / "vision_model"), str(backbones / "language_model")
    processor = FromageProcessor.from_vision_text_pretrained(vision, text, num_image_tokens=2)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        vision, text, processor=processor, projection_dim=16, **kwargs
    )
    torch.nn.init.normal_(model.adapter.ret_embedding.weight)
    return model, processor


def outputs(model, image_size: int = 32) -> dict[str, torch.Tensor]:
    """Logits and embeddings of an image-and-text batch, from weights copied to memory that torch aligned: matrix
    products differ in their last bits with the alignment of a mapped file's tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    pixels = torch.linspace(-1, 1, 2 * 3 * image_size**2).reshape(2, 3, image_size, image_size)
    ids = torch.tensor([[500, 500, 2, 5, 6, 501], [2, 7, 500, 500, 8, 501]])
    with torch.no_grad():
        return {
            "logits": model(input_ids=ids, pixel_values=pixels).logits,
            "text_embeds": model.get_text_embeds(ids, pixel_values=pixels),
            "image_embeds": model.get_image_embeds(pixels),
        }


def saved_both_ways(model, processor, folder: Path) -> Iterator[tuple[Path, FromageForConditionalGeneration]]:
    """A checkpoint in `folder` and the model that it loads as: of the trained parts alone, then with the backbones."""
    for save_backbones in (False, True):
        place = folder / f"model-{save_backbones}"
        model.save_pretrained(place, save_backbones=save_backbones)
        processor.save_pretrained(place)
        yield place, FromageForConditionalGeneration.from_pretrained(place)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def keys_of(folder: Path) -> set[str]:
    keys: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= set(file.keys())
    return keys


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]):
    """Rewrite a file of tensors after `change` was made to them."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
