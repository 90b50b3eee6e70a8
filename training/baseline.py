"""The original's training step in our own words, to be measured against: what it computes, and no more than it does.

Two passes over captions padded to their limit, the vision encoder in each, logits of every place, and a gradient (and
AdamW state) for the whole tied vocabulary matrix, of which all rows but `[RET]`'s are then masked.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class PlainFromage(nn.Module):
    """Axes: N pairs, L places of a padded caption, k visual tokens, D the LM's width, q the shared space's.

    Args:
        language_model: A causal LM with tied embeddings whose last row is `[RET]`'s.
        vision_model: A vision encoder with pooled output.
    """

    def __init__(self, language_model: PreTrainedModel, vision_model: PreTrainedModel, k: int = 1, q: int = 256):
        super().__init__()
        self.language_model, self.vision_model = language_model.eval(), vision_model.eval()
        self.requires_grad_(False)
        self.embeddings = language_model.get_input_embeddings()
        self.embeddings.weight.requires_grad_(True)
        width, features, self.k = self.embeddings.weight.shape[1], vision_model.config.hidden_size, k
        self.visual_embeddings = nn.Linear(features, k * width)
        self.visual_fc, self.text_fc = nn.Linear(features, q), nn.Linear(width, q)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def loss(self, pixel_values: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Of images (N, 3, h, w), tokens (N, L) that are padded on the right, and their lengths (N,)."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        in_text, is_ret = place < lengths[:, None], place == lengths[:, None] - 1
        embeds = self.embeddings(tokens)

        with torch.no_grad():
            pooled = self.vision_model(pixel_values).pooler_output
        visual = self.visual_embeddings(pooled.to(self.logit_scale)).unflatten(-1, (self.k, -1)).to(embeds)
        labels = tokens.masked_fill(~in_text | is_ret, -100)
        labels = torch.cat([labels.new_full((len(labels), self.k), -100), labels], dim=1)
        captioning = self._cross_entropy(self.language_model(inputs_embeds=torch.cat([visual, embeds], 1)), labels)

        with torch.no_grad():
            pooled = self.vision_model(pixel_values).pooler_output
        output = self.language_model(inputs_embeds=embeds, output_hidden_states=True)
        ret_token = self._cross_entropy(output, tokens.masked_fill(~in_text, -100))
        images = F.normalize(self.visual_fc(pooled.to(self.logit_scale)), dim=-1)
        texts = F.normalize(self.text_fc(output.hidden_states[-1][is_ret].to(self.logit_scale)), dim=-1)
        similarity = self.logit_scale.exp() * images @ texts.t()
        targets = torch.arange(len(images), device=images.device)
        contrastive = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2
        return captioning + ret_token + contrastive

    @staticmethod
    def _cross_entropy(output, labels: torch.Tensor) -> torch.Tensor:
        logits = output.logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    @torch.no_grad()
    def mask_gradient(self):
        """Keep the gradient of the last row, `[RET]`'s, alone."""
        self.embeddings.weight.grad[:-1] = 0

    @torch.no_grad()
    def normalize_ret(self):
        norms = self.embeddings.weight[:-1].norm(dim=-1)
        row = self.embeddings.weight[-1]
        row.mul_(norms.mean() / row.norm())
