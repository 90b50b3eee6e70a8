"""The quickstart's training: where the projector starts."""

import torch
from datasets import Dataset

from modeling_fromage import FromageDataCollator
from tests.helpers.backbones import make_model, make_processor
from training.quickstart_emoji.fitting import start_projector


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
