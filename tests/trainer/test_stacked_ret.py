"""Runs of a model whose `[RET]` is several tokens: evaluation, the warm start, checkpoints, two processes."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageProcessor, FromageTrainer
from modeling_fromage.trainer.pair_states import PairStates
from modeling_fromage.trainer.ranking import gallery_ranks
from modeling_fromage.trainer.ret_states import RetStates, cache_ret_states
from modeling_fromage.trainer.samples import draw_samples
from modeling_fromage.trainer.warm_start import CachedRetrieval
from modeling_fromage.training_losses_fromage import ret_hidden_states
from tests.helpers.backbones import make_processor
from tests.helpers.checkpoints import TRAINED_KEYS, assemble, keys_of
from tests.helpers.distributed import save_averages
from tests.helpers.processes import run_ranks
from tests.helpers.stacked import AGGREGATIONS, pairs, stacked_double_model, stacked_model
from tests.helpers.strangers import ask_stranger
from tests.helpers.training_runs import arguments, examples
from training.evaluation.prompts import embed_prompts
from training.first_batch import sheet_of_batch

LAYERS = {"text_embed_layers": [1, -1]}
CAPTIONS = [row["caption"] for row in examples(20)]


def make_trainer(folder, aggregation, data, processor=None, trainer_options=None, **options):
    processor = processor or make_processor(num_ret_tokens=3)
    collator = FromageDataCollator(processor)
    model = stacked_model("opt_clip", 3, aggregation)
    return FromageTrainer(
        model, arguments(folder, **options), collator, train_dataset=data, eval_dataset=data,
        processing_class=processor, **(trainer_options or {})
    )  # fmt: skip


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_run_is_evaluated_saved_and_loaded(tmp_path, aggregation):
    data = examples(12)
    trainer = make_trainer(tmp_path, aggregation, data, max_steps=8, learning_rate=3e-2)
    before, state = trainer.evaluate(), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < before["eval_loss"] and metrics["eval_num_pairs"] == 12
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, state[name]) != parameter.requires_grad, name
    rows = trainer.model.adapter.ret_embedding.weight
    norms = rows.norm(dim=-1)
    torch.testing.assert_close(norms, norms.mean().expand(3))
    trainer.save_model()
    model = FromageForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (model.config.num_ret_tokens, model.config.ret_aggregation) == (3, aggregation)
    assert FromageProcessor.from_pretrained(tmp_path).num_ret_tokens == 3
    batch = trainer.data_collator(data)
    with torch.no_grad():
        found, expected = model(**batch), trainer.model.eval()(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    ranks = gallery_ranks(found.text_embeds, found.image_embeds)
    scores = torch.stack([(found.image_embeds @ queries.reshape(-1, 16).t()).amax(1) for queries in found.text_embeds])
    assert ranks.tolist() == [int((row >= row[i] - 1e-6).sum()) for i, row in enumerate(scores)]
    assert metrics["eval_text_to_image_R@5"] == pytest.approx((ranks <= 5).float().mean().item())
    reverse = gallery_ranks(found.image_embeds, found.text_embeds)
    assert reverse.tolist() == [int((row >= row[i] - 1e-6).sum()) for i, row in enumerate(scores.t())]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_evaluations_embed_prompts_as_the_model_does(aggregation):
    model, processor = stacked_model("opt_clip", 3, aggregation, **LAYERS), make_processor(num_ret_tokens=3)
    texts = ["a cat", "two dogs on a mat"]
    found = embed_prompts(model, processor, [processor.retrieval_text(text) for text in texts])
    with torch.no_grad():
        inputs = processor(text=[text + "[RET]" for text in texts], padding=True, return_tensors="pt")
        torch.testing.assert_close(found, model.get_text_embeds(**inputs))
    with pytest.raises(ValueError, match="takes the hidden state of one .RET. token.*corrected protocol"):
        embed_prompts(model, processor, texts, first_projection_only=True)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_pictures_of_a_run(aggregation):
    model, processor = stacked_model("opt_clip", 3, aggregation).eval(), make_processor(num_ret_tokens=3)
    collator = FromageDataCollator(processor, training=False)
    data = [{"image": Image.new("RGB", (32, 32), (40 * i, 0, 99)), "caption": f"picture {i}"} for i in range(4)]
    with torch.no_grad():
        output = model(**collator(data))
    embeds = {name: output[name] for name in ("image_embeds", "text_embeds")}
    assert draw_samples(model, collator, data, [2, 1], embeds).height > 2 * 160
    assert sheet_of_batch(collator(data), processor).height > 0


# ---- the warm start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_warm_start_trains_the_models_own_loss(tmp_path, aggregation):
    model = stacked_model("opt_clip", 3, aggregation, **LAYERS)
    collator = FromageDataCollator(make_processor(num_ret_tokens=3))
    rows = examples(20)
    inputs = collator.image_inputs(rows) | collator.retrieval_inputs(CAPTIONS)
    states = ret_hidden_states(model.frozen_lm(), inputs["retrieval_input_ids"], inputs["retrieval_attention_mask"])
    cached = {"pooled_image_features": inputs["pooled_image_features"], "ret_states": states}
    loss, module = model.train()(**inputs).contrastive_loss, CachedRetrieval(model, None, dropout=0.0)
    torch.testing.assert_close(module(**cached)["loss"], loss, rtol=1e-5, atol=0)

    cache_ret_states(model, collator, CAPTIONS, tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["num_ret_tokens"] == 3
    kept = PairStates(inputs["pooled_image_features"], RetStates(tmp_path, 20))
    widths = [linear.in_features for linear in CachedRetrieval.projections(model.adapter)]
    assert widths == [24, *[32 if aggregation == "max" else 96] * 2]
    statistics = kept.statistics(widths)
    module = CachedRetrieval(model, statistics, dropout=0.0).eval()
    for number, (layer, width) in enumerate(zip(states, widths[1:], strict=True), start=1):
        vectors = module._standardized(layer, number).reshape(-1, width)
        assert vectors.mean(0).abs().max() < 2e-2
    module.fold_into(model.eval())
    expected = module(**cached)
    with torch.no_grad():
        found = model(**inputs)
    torch.testing.assert_close(found.contrastive_loss, expected["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, expected["text_embeds"], rtol=1e-4, atol=1e-5)
    other = stacked_model("opt_clip", 2, aggregation, **LAYERS)
    with pytest.raises(ValueError, match="num_ret_tokens 3, not 2"):
        cache_ret_states(other, FromageDataCollator(make_processor(num_ret_tokens=2)), CAPTIONS, tmp_path)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_run_with_the_warm_start(tmp_path, aggregation):
    options = {"retrieval_warm_start_steps": 30, "retrieval_warm_start_dropout": 0.0}
    trainer = make_trainer(tmp_path, aggregation, examples(12), max_steps=1, learning_rate=0.0, trainer_options=options)
    before = trainer.evaluate()["eval_contrastive_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_contrastive_loss"] < before


# ---- two processes --------------------------------------------------------------------------------------------------

SHARES = [[0, 1, 2], [3, 4]]  # the captions of a rank's batch


def gradients(aggregation, captions):
    model = stacked_double_model("opt_clip", 2, aggregation)
    pixels = torch.rand(11, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    loss = model(**pairs(model, pixels, captions)).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def worker(rank: int, folder: str):
    save_averages(rank, folder, ((aggregation, gradients(aggregation, SHARES[rank])) for aggregation in AGGREGATIONS))


def test_two_processes_equal_one(tmp_path):
    run_ranks(worker, str(tmp_path))
    for aggregation, (loss, grads) in torch.load(tmp_path / "result.pt", weights_only=True).items():
        expected_loss, expected = gradients(aggregation, sum(SHARES, []))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_checkpoints_load_here_and_where_the_package_is_not(backbones, tmp_path, aggregation):
    vision, text = str(backbones / "vision_model"), str(backbones / "language_model")
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        vision, text, num_ret_tokens=3, ret_aggregation=aggregation, num_image_tokens=2, projection_dim=16
    )
    processor = FromageProcessor.from_vision_text_pretrained(vision, text, num_image_tokens=2, num_ret_tokens=3)
    processor.check_config(model.config)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert keys_of(folder) == TRAINED_KEYS
    again = AutoModel.from_pretrained(folder)
    assert again.retrieval_fingerprint() == model.retrieval_fingerprint()
    for tensor in (*again.parameters(), *again.buffers()):
        tensor.data = tensor.data.clone()
    image = Image.new("RGB", (40, 30), "red")
    inputs = AutoProcessor.from_pretrained(folder)(text="<|image|>a cat[RET]", images=image, return_tensors="pt")
    with torch.no_grad():
        expected = again(**inputs).logits, again.get_text_embeds(**inputs)
    for logits, embeds in ask_stranger(folder, tmp_path):
        assert torch.equal(logits, expected[0]) and torch.equal(embeds, expected[1])
    with torch.no_grad():
        model.adapter.ret_embedding.weight[2] += 1
    assert again.retrieval_fingerprint() != model.retrieval_fingerprint()


def test_a_processor_of_another_number_is_refused(backbones):
    _, processor = assemble(backbones)
    with pytest.raises(ValueError, match="`num_ret_tokens` is 2, but the processor's is 1"):
        FromageForConditionalGeneration.from_vision_text_pretrained(
            str(backbones / "vision_model"), str(backbones / "language_model"), processor=processor, num_ret_tokens=2
        )
