"""Every vision encoder of transformers, and the vision half of every image-text model, with OPT and with Llama: right
in every stage, or refused at assembly by name.

The truth is the encoder itself, one image at a time, and the LM itself, one text at a time.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_fromage import FromageConfig, FromageForConditionalGeneration
from modeling_fromage.backbones_fromage import decoder_and_head
from modeling_fromage.configuration_fromage import vision_half
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.vision_fromage import (
    _refuse_further_inputs,
    check_vision_model,
    dummy_images,
    vision_part,
)
from tests.helpers.backbone_table import check_complete, check_row
from tests.helpers.backbones import TEXT_CONFIGS, VOCAB
from tests.helpers.batches import pad
from tests.helpers.vision_families import make_vision_model, model_types

IMAGE, RET = VOCAB, VOCAB + 1
FIELDS = {"image_token_id": IMAGE, "ret_token_id": RET, "num_image_tokens": 2, "projection_dim": 16}
POOLINGS = ("pooler", "cls", "mean")
CAPTIONS = [[2, 5, 6, 7, 20], [2, 8], [2, 9, 10, 11]]


@pytest.mark.parametrize("model_type", model_types())
def test_vision_model(model_type, tmp_path):
    try:
        vision = make_vision_model(model_type)
    except ValueError:
        check_row("vision_models", model_type, row_without_weights(model_type))
        return
    except ImportError as error:
        package = re.search(r"(?:requires the|No module named) '?(\w+)", str(error))[1]
        if package == "timm":
            pytest.skip("needs timm, which `make test-vision` has")
        check_row("vision_models", model_type, {"result": "refused", "why": f"needs {package}", "shown": "ImportError"})
        return
    check_row("vision_models", model_type, row_of(vision, tmp_path))


def test_the_table_is_complete():
    check_complete("vision_models", model_types())


def row_of(vision, folder):
    exact, refused = {}, {}
    for pooling in POOLINGS:
        try:
            encoder = vision_part(vision)
            width = check_vision_model(encoder, ImageVector(pooling))
        except ValueError as error:
            refused[pooling] = without_numbers(str(error))
        else:
            pixels = dummy_images(encoder.config, len(CAPTIONS)).flip(0)
            exact[pooling] = check_features(encoder, pooling, width, pixels)
    reasons = " ".join(dict.fromkeys(refused.values()))
    if not exact:
        with pytest.raises(ValueError) as raised:
            assemble(vision, "opt", "mean")
        assert without_numbers(str(raised.value)) == refused["mean"]
        return {"result": "refused", "why": reasons, "shown": demonstrate(vision)}
    for text in ("opt", "llama"):
        model = assemble(vision, text, next(iter(exact)))
        check_step(model, pixels)
        check_only_the_adapter_moves(model, pixels)
    check_folders(model, vision, pixels, folder)
    return {
        "result": "exact",
        "class": type(encoder).__name__,
        "poolings": ", ".join(exact),
        "refused": reasons,
        "within": next(bound for bound in (1e-6, 1e-5, 1e-4) if max(exact.values()) <= bound),
    }


def row_without_weights(model_type):
    """Of a type of which there is no tiny model: what is said of its configuration."""
    half = vision_half(CONFIG_MAPPING[model_type]())
    config = FromageConfig.from_vision_text_configs(half, TEXT_CONFIGS["opt"](), **FIELDS)
    with pytest.raises(ValueError) as raised, torch.device("meta"):
        _refuse_further_inputs(FromageForConditionalGeneration(config).vision_model)
    return {"result": "refused", "why": without_numbers(str(raised.value)), "shown": "by its configuration alone"}


def assemble(vision, text, pooling):
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text]()).eval()
    config = FromageConfig.from_vision_text_configs(vision.config, lm.config, vision_pooling=pooling, **FIELDS)
    model = FromageForConditionalGeneration(config, lm, vision).eval()
    # Features of a random EfficientNet vanish, and to make unit vectors of what is left would magnify rounding.
    model.adapter.visual_projection.bias.data.normal_()
    return model


def without_numbers(message):
    """Without what the machine or the tiny sizes decide."""
    message = re.sub(r"\(\d[\d, ]*\)", "(...)", message.split(" It says:")[0])
    return re.sub(r"similarity -?[\d.]+", "similarity ...", message)


@torch.no_grad()
def check_features(encoder, pooling, width, pixels):
    """Of a batch against one by one, by the definition of the pooling; the largest difference."""
    features = ImageVector(pooling).encode(encoder, pixels)[1]
    assert features.shape == (len(pixels), width) and features.isfinite().all()
    differences = []
    for found, image in zip(features, pixels, strict=True):
        output = encoder(image[None], return_dict=True)
        if pooling == "pooler":
            expected = output.pooler_output.reshape(-1)
        else:
            hidden = output.get("last_hidden_state")
            hidden = (output["feature_maps"][-1] if hidden is None else hidden)[0]
            if hidden.dim() == 3:  # a map, with its channels first or last
                hidden = hidden.flatten(1).t() if hidden.shape[0] == width else hidden.flatten(0, 1)
            expected = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
        differences.append(((found - expected).norm() / expected.norm().clamp_min(1e-30)).item())
    return max(differences)


def check_step(model, pixels):
    """The loss and its gradients against the backbones themselves, one image and one text at a time."""
    captions, retrieval = (pad(rows, "right") for rows in (
        [[IMAGE] * 2 + caption for caption in CAPTIONS], [[*caption, RET] for caption in CAPTIONS]
    ))  # fmt: skip
    is_target = (captions["input_ids"] != IMAGE) & captions["attention_mask"].bool()
    loss = model.train()(
        **captions,
        labels=captions["input_ids"].masked_fill(~is_target, -100),
        pixel_values=pixels,
        retrieval_input_ids=retrieval["input_ids"],
        retrieval_attention_mask=retrieval["attention_mask"],
    ).loss
    expected = plain_loss(model, pixels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parameters = list(model.adapter.parameters())
    for found, truth in zip(*(torch.autograd.grad(each, parameters) for each in (loss, expected)), strict=True):
        assert (found - truth).norm() <= 2e-4 * truth.norm() + 1e-7


def plain_loss(model, pixels):
    adapter, embedding = model.adapter, model.get_input_embeddings()
    decoder, head = decoder_and_head(model.language_model)
    row = adapter.ret_embedding.weight[0]
    row_out = row if adapter.ret_lm_head is None else adapter.ret_lm_head.weight[0]

    def run(embeds):
        hidden = decoder(inputs_embeds=embeds[None], use_cache=False)[0][0]
        frozen = head(hidden)[:, :RET]  # Llama has no row of the image token's id
        frozen = F.pad(frozen, (0, RET - frozen.shape[1]), value=torch.finfo(frozen.dtype).min)
        logits = torch.cat([frozen, hidden @ row_out[:, None]], dim=1)
        return logits.log_softmax(-1), hidden

    features = torch.cat([model.get_pooled_image_features(image[None]) for image in pixels])
    captioning, ret, texts = [], [], []
    for feature, caption in zip(features, CAPTIONS, strict=True):
        rows = embedding(torch.tensor(caption))
        log_probs, _ = run(torch.cat([adapter.multi_modal_projector(feature).view(2, -1), rows]))
        captioning += [-log_probs[t + 1, token] for t, token in enumerate(caption)]
        log_probs, hidden = run(torch.cat([rows, row[None]]))
        ret += [-log_probs[t, token] for t, token in enumerate([*caption[1:], RET])]
        texts.append(adapter.text_projection[0](hidden[-1]))
    images, texts = (F.normalize(each, dim=-1) for each in (adapter.visual_projection(features), torch.stack(texts)))
    similarity, targets = images @ texts.t() * adapter.logit_scale.exp(), torch.arange(len(CAPTIONS))
    contrastive = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2
    return torch.stack(captioning).mean() + torch.stack(ret).mean() + contrastive


def check_only_the_adapter_moves(model, pixels):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in model.adapter.parameters()}
    retrieval = pad([[*caption, RET] for caption in CAPTIONS], "right")
    model.train()(
        pixel_values=pixels,
        retrieval_input_ids=retrieval["input_ids"],
        retrieval_attention_mask=retrieval["attention_mask"],
    ).loss.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    model.eval()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("adapter.") for name in moved)


@torch.no_grad()
def check_folders(model, vision, pixels, folder):
    """Assembled from folders, saved in both ways, and loaded: to the bit."""
    vision.save_pretrained(folder / "vision")
    model.language_model.save_pretrained(folder / "text")
    processor = SimpleNamespace(image_token_id=IMAGE, ret_token_id=RET, num_image_tokens=2, num_ret_tokens=1)
    fields = {"vision_pooling": model.config.vision_pooling, "projection_dim": 16}
    from_folders = FromageForConditionalGeneration.from_vision_text_pretrained(
        str(folder / "vision"), str(folder / "text"), processor, **fields
    )
    assert_same_tensors(from_folders.vision_model, model.vision_model, model.config.vision_pooling)
    from_folders.adapter.load_state_dict(model.adapter.state_dict())
    for name, save_backbones in (("adapter", False), ("whole", True)):
        from_folders.save_pretrained(folder / name, save_backbones=save_backbones)
        again = FromageForConditionalGeneration.from_pretrained(folder / name)
        assert_same_tensors(again, from_folders, model.config.vision_pooling)
        assert (again.get_image_embeds(pixels) - model.get_image_embeds(pixels)).abs().max() <= 1e-6


def assert_same_tensors(found, expected, pooling):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    in_use = [name for name in expected if pooling == "pooler" or "pooler" not in name]
    assert [name for name in in_use if not torch.equal(found[name], expected[name])] == []


@torch.no_grad()
def demonstrate(vision):
    """In a line, what the encoder makes of two images, without FROMAGe."""
    try:
        encoder = vision_part(vision)
    except ValueError:
        encoder = vision
    name, pixels = type(encoder).__name__, dummy_images(encoder.config, 2)
    try:
        output = encoder(pixels, return_dict=True)
    except Exception as error:
        return f"{name}(pixel_values) raises {type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    if "last_hidden_state" not in output and "pooler_output" not in output:
        return f"{name}(pixel_values) returns {', '.join(list(output)[:4])}"
    key = "pooler_output" if output.get("pooler_output") is not None else "last_hidden_state"
    first, again = output[key], encoder(pixels, return_dict=True)[key]
    same = torch.equal(first, again)
    return f"its {key} of two images is {tuple(first.shape)}" + (
        "" if same else ", and another when it is called again"
    )
