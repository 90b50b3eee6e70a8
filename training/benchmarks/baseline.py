"""The original's training step, generation and scoring in our own words, to be measured against: what it computes, and
no more than it does.

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

    @torch.no_grad()
    def prompt(self, pixel_values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """An interleaved prompt (1, L, D) of images (N, 3, h, w), each encoded by itself, and tokens (1, T), a share of
        which stands behind each image."""
        parts = []
        for image, piece in zip(pixel_values, tokens[0].tensor_split(len(pixel_values)), strict=True):
            pooled = self.vision_model(image[None]).pooler_output
            visual = self.visual_embeddings(pooled.to(self.logit_scale)).unflatten(-1, (self.k, -1))
            embeds = self.embeddings(piece[None])
            parts += [visual.to(embeds), embeds]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def generate(self, embeds: torch.Tensor, count: int) -> torch.Tensor:
        """Greedily continue `embeds` (1, L, D): the whole sequence anew for each token, every place's logits, every
        layer's hidden states, and the retrieval embedding of every place."""
        ids = []
        for _ in range(count):
            output = self.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
            F.normalize(self.text_fc(output.hidden_states[-1].to(self.logit_scale)), dim=-1)
            ids.append(output.logits[:, -1].argmax(-1))
            embeds = torch.cat([embeds, self.embeddings(ids[-1])[:, None]], dim=1)
        return torch.stack(ids, dim=1)

    @torch.no_grad()
    def score(
        self, embeds: torch.Tensor, candidates: list[torch.Tensor], batch_size: int, shift: bool = True
    ) -> torch.Tensor:
        """Summed log-likelihoods (C,) of candidates' tokens after `embeds` (1, L, D), which is encoded with each; from
        the place before each token, or (`shift=False`, the authors' VisDial) from its own."""
        scores = []
        for start in range(0, len(candidates), batch_size):
            some = candidates[start : start + batch_size]
            tokens = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
            answers = self.embeddings(tokens.clamp(min=0))
            whole = torch.cat([embeds.expand(len(some), -1, -1), answers], dim=1)
            logits = self.language_model(inputs_embeds=whole, use_cache=False).logits
            logits = logits[:, embeds.shape[1] - 1 : -1] if shift else logits[:, embeds.shape[1] :]
            losses = F.cross_entropy(logits.float().transpose(1, 2), tokens, ignore_index=-100, reduction="none")
            scores.append(-losses.sum(-1))
        return torch.cat(scores)

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
