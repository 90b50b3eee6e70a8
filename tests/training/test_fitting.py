"""The quickstart's training: where the projector and `[RET]`'s row of the head start."""

import pytest
import torch
from datasets import Dataset

from modeling_fromage import FromageDataCollator
from tests.helpers.backbones import make_model, make_processor
from training.quickstart_emoji.fitting import start_projector, start_ret_head


def test_the_projector_starts_at_the_words_of_the_captions():
    """With fewer images than features and no penalty to speak of, exactly there; a short caption is repeated, of a long
    one the end is taken."""
    model, processor = make_model("opt_clip"), make_processor()
    captions, width = ["cat", "a small dog that sleeps"], model.adapter.multi_modal_projector.in_features
    views = torch.randn(2, 3, width)
    columns = {"caption": captions, "pooled_image_features": views.numpy()}
    rows = Dataset.from_dict(columns).with_format("torch", columns=["pooled_image_features"], output_all_columns=True)
    start_projector(model, FromageDataCollator(processor), rows, ridge=1e-9)
    for caption, features in zip(captions, views, strict=True):
        ids = processor.tokenizer(f" {caption}", add_special_tokens=False).input_ids
        ids = (2 * ids)[:2] if len(ids) < 2 else ids[-2:]
        words = model.get_input_embeddings()(torch.tensor(ids))
        torch.testing.assert_close(model.adapter.visual_tokens(features), words.expand(3, -1, -1), atol=1e-4, rtol=1e-3)


def test_the_row_of_the_head_starts_where_texts_end():
    """Its loss is the model's own, with more weight on the ends: there it is far more likely than elsewhere."""
    model, collator = make_model("opt_clip", tie_ret_embedding=False), FromageDataCollator(make_processor())
    texts = ["a cat", "a small dog that sleeps", "two boats", "a cat on a mat"]
    inputs = collator.retrieval_inputs(texts)
    ids, mask = inputs["retrieval_input_ids"], inputs["retrieval_attention_mask"]

    def odds() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1, model.config.ret_token_id]
        is_end, is_text = ids[:, 1:] == model.config.ret_token_id, mask[:, 1:].bool()
        return logits[is_end], logits[is_text & ~is_end]

    before = odds()[0].mean()
    start_ret_head(model, collator, Dataset.from_dict({"caption": texts}), penalty=1e-4)
    ends, others = odds()
    assert ends.mean() > before + 1
    # "a cat" ends once and goes on once, and ends count four times; nothing else is in doubt.
    assert ends.exp().tolist() == pytest.approx([0.8, 1, 1, 1], abs=0.01)
    assert sorted(others.exp().tolist())[-2:] == pytest.approx([0, 0.8], abs=0.01)
    assert model.adapter.ret_lm_head.weight.grad is None
    model = make_model("opt_clip", tie_ret_embedding=True)
    start_ret_head(model, collator, Dataset.from_dict({"caption": texts}))  # there is no such row
