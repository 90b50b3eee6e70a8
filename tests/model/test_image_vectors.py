"""More than one vector an image: layers, patches, projectors, and what each refuses."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch.nn import functional as F

from hub_scripts.convert_original_checkpoint import convert_back
from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageImageIndex, FromageTrainer
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.checkpoints import assemble
from tests.helpers.training_runs import arguments

KINDS = {
    "mlp": {"projector_type": "mlp"},
    "linear of patches": {"vision_patch_tokens": 4},
    "mlp of patches": {"projector_type": "mlp", "vision_patch_tokens": 4},
    "resampler": {"projector_type": "resampler", "vision_patch_tokens": 4},
    "two layers": {"projector_type": "resampler", "vision_patch_tokens": 9, "resampler_num_layers": 2},
    "another layer": {"vision_patch_tokens": 4, "vision_feature_layer": -2},
    "another layer's mean": {"vision_pooling": "mean", "vision_feature_layer": 1},
}


def pixels_of(model, count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(model.vision_model.dtype)


def plain_patches(model, pixels):
    """The patches of a CLIP of 32 pixels, pooled by hand."""
    config = model.config
    output = model.vision_model(pixels, output_hidden_states=True)
    layer = config.vision_feature_layer
    hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    pooled = {"pooler": output.pooler_output, "mean": hidden.mean(1), "cls": hidden[:, 0]}[config.vision_pooling]
    side = 32 // model.vision_model.config.patch_size
    rows = [[[] for _ in range(round(config.vision_patch_tokens**0.5))]
            for _ in range(round(config.vision_patch_tokens**0.5))]  # fmt: skip
    if not rows:
        return pooled, None
    grid, cells = hidden[:, 1:].unflatten(1, (side, side)), len(rows)
    found = []
    for row in range(cells):
        for column in range(cells):
            ys = slice(row * side // cells, -(-(row + 1) * side // cells))
            xs = slice(column * side // cells, -(-(column + 1) * side // cells))
            found.append(grid[:, ys, xs].flatten(1, 2).mean(1))
    return pooled, torch.stack(found, 1)


def plain_tokens(model, pooled, patches):
    """Visual tokens (N, k, D), by the tensors of the projector."""
    state = dict(model.adapter.multi_modal_projector.named_parameters())
    k, kind = model.config.num_image_tokens, model.config.projector_type

    def linear(name, values):
        return values @ state[f"{name}weight"].t() + state[f"{name}bias"]

    def each(prefix, values):
        if kind == "linear":
            return linear(prefix, values)
        return linear(f"{prefix}2.", F.gelu(linear(f"{prefix}0.", values)))

    if patches is None:
        return each("", pooled).unflatten(-1, (k, -1))
    if kind != "resampler":
        return each("each.", F.adaptive_avg_pool1d(patches.transpose(1, 2), k).transpose(1, 2))

    def norm(name, values):
        return F.layer_norm(values, values.shape[-1:], state[f"{name}weight"], state[f"{name}bias"])

    vectors, queries = norm("norm.", torch.cat([pooled[:, None], patches], 1)), state["queries"].expand(3, -1, -1)
    for number in range(model.config.resampler_num_layers):
        name = f"layers.{number}."
        q, key, value = (linear(f"{name}attention.{part}.", x) for part, x in (
            ("query", norm(f"{name}query_norm.", queries)), ("key", vectors), ("value", vectors)))  # fmt: skip
        heads = model.adapter.multi_modal_projector.layers[number].attention.num_heads
        q, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, key, value))
        attended = ((q @ key.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ value).transpose(1, 2).flatten(2)
        queries = queries + linear(f"{name}attention.output.", attended)
        inner = F.gelu(linear(f"{name}mlp.0.", norm(f"{name}mlp_norm.", queries)))
        queries = queries + linear(f"{name}mlp.2.", inner)
    return linear("output.", norm("output_norm.", queries))


def test_lora_on_every_layer_of_a_resampler_is_trained():
    model = make_model("opt_clip", **KINDS["resampler"])
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    features = torch.rand(2, model.config.vision_feature_size, generator=torch.Generator().manual_seed(0))
    tokens = model.adapter.visual_tokens(features)
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1))
    (tokens * weights).sum().backward()
    named = {n: p for n, p in model.adapter.multi_modal_projector.named_parameters() if "lora_B" in n}
    assert len(named) == 7 and all(parameter.grad is not None for parameter in named.values())
    assert all(parameter.grad.any() for name, parameter in named.items() if ".key." not in name)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_gradients_are_those_of_a_plain_module(kind):
    model = make_model("opt_clip", **{"num_image_tokens": 3, **KINDS[kind]}).double()
    model.adapter.double()
    pixels = pixels_of(model)
    pooled, patches = plain_patches(model, pixels)
    features = model.get_pooled_image_features(pixels)
    whole = pooled if patches is None else torch.cat([pooled, patches.flatten(1)], 1)
    torch.testing.assert_close(features, whole.detach())
    assert model.config.vision_feature_size == features.shape[1]
    weights = torch.rand(3, 3, 16, dtype=torch.double)[..., : model.adapter.visual_tokens(features).shape[-1]]

    def gradients(tokens):
        (tokens[..., : weights.shape[-1]] * weights).sum().backward()
        found = {n: p.grad.clone() for n, p in model.adapter.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    found = gradients(model.adapter.visual_tokens(features))
    expected = gradients(plain_tokens(model, pooled.detach(), None if patches is None else patches.detach()))
    assert found.keys() == expected.keys() and all("multi_modal_projector" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    embeds = F.normalize(model.adapter.visual_projection(pooled), dim=-1)
    torch.testing.assert_close(model.get_image_embeds(pixels), embeds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_saved_loaded_searched_and_answers(kind, backbones, tmp_path):
    model, processor = assemble(backbones, num_image_tokens=2, **KINDS[kind])
    data = [{"image": Image.new("RGB", (32, 32), (40 * i, 0, 0)), "caption": f"number {i}"} for i in range(6)]
    before = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    trainer = FromageTrainer(model, arguments(tmp_path / "run", max_steps=2), train_dataset=data,
                             processing_class=processor)  # fmt: skip
    trainer.train()
    moved = {name for name, value in model.adapter.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) >= len(before) - 1  # all but a bias that softmax does not see
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = FromageForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    batch = FromageDataCollator(processor, training=False)(data)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).loss, model(**batch).loss)
        cached = {**batch, "pooled_image_features": again.get_pooled_image_features(batch.pop("pixel_values"))}
        cached.pop("pixel_values", None)
        torch.testing.assert_close(again(**cached).loss, model(**cached).loss)
        inputs = processor(images=data[0]["image"], text="<|image|>A picture of", return_tensors="pt")
        sequences = again.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(sequences, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    index = FromageImageIndex.build(again, processor, [row["image"] for row in data], ids=list("abcdef"))
    assert index.search(again.get_image_embeds(inputs["pixel_values"]), top_k=1)[0] == [["a"]]


def test_a_warm_start_reads_the_pooled_vector_alone(tmp_path):
    rows = [{"image": Image.new("RGB", (32, 32), (30 * i, 0, 9)), "caption": f"number {i}"} for i in range(8)]
    model, processor = make_model("opt_clip", tie_ret_embedding=False, **KINDS["resampler"]), make_processor()
    trainer = FromageTrainer(
        model, arguments(tmp_path, max_steps=1, learning_rate=0.0), train_dataset=rows, processing_class=processor,
        retrieval_warm_start_steps=40, retrieval_warm_start_batch_size=8, retrieval_warm_start_dropout=0.0,
    )  # fmt: skip
    trainer.train()
    model.eval()
    with torch.no_grad():
        output = model(**FromageDataCollator(processor, training=False)(rows))
    assert output.contrastive_loss < 1.5 < 2.0  # ln 8 is 2.08


def test_lora_beside_a_resampler(tmp_path):
    model, processor = make_model("opt_clip", **KINDS["resampler"]), make_processor()
    model.add_adapter(LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj", modules_to_save=["adapter"]))
    rows = [{"image": Image.new("RGB", (32, 32), (30 * i, 0, 9)), "caption": f"number {i}"} for i in range(4)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    FromageTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows, processing_class=processor).train()
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert any("queries" in name for name in changed) and any("lora_B" in name for name in changed)


def test_feature_maps_and_channels(monkeypatch):
    model = make_model("gpt2_resnet", vision_patch_tokens=1, num_image_tokens=1)
    pixels = pixels_of(model)
    features = model.get_pooled_image_features(pixels)
    hidden = model.vision_model(pixels).last_hidden_state
    width = hidden.shape[1]
    torch.testing.assert_close(features[:, width:], hidden.mean((2, 3)))
    assert features.shape == (3, 2 * width)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vision_patch_tokens": 5}, "square number"),
        ({"vision_patch_tokens": -1}, "square number"),
        ({"vision_feature_layer": -2}, "reads no hidden state"),
        ({"projector_type": "resampler"}, "attends to patch tokens"),
        ({"vision_patch_tokens": 1, "num_image_tokens": 2}, "1 patch tokens .* make no 2"),
        ({"projector_type": "resampler", "vision_patch_tokens": 4, "resampler_num_layers": 3}, "1 or 2, got 3"),
        ({"vision_patch_tokens": 10000}, "at most"),
        ({"vision_pooling": "cls", "vision_feature_layer": 7}, "has hidden states"),
        ({"vision_pooling": "cls", "vision_feature_layer": -9}, "has hidden states"),
        ({"projector_type": "conv"}, "projector_type"),
    ],
)
def test_what_cannot_be_is_refused(fields, words):
    with pytest.raises(Exception, match=words) as error:
        make_model("opt_clip", **{"num_image_tokens": 1, **fields})
    assert isinstance(error.value, ValueError) or "Strict" in type(error.value).__name__


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_format_does_not_hold_it(kind, tmp_path):
    model = make_model("opt_clip", num_image_tokens=2, **KINDS[kind])
    model.save_pretrained(tmp_path / "model", save_backbones=True)
    with pytest.raises(ValueError, match=r"The authors' (format holds|model reads an encoder's pooled output)"):
        convert_back(tmp_path / "model", tmp_path / "theirs")
