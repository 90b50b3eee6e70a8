"""The original's training step, generation and scoring, reimplemented as the baseline of the benchmarks.

It does the same computation as the original, and no more: two passes over captions padded to their limit, the vision
encoder in each, logits at every position, and a gradient (with AdamW state) for the whole tied vocabulary matrix, which
is then masked except for the row of `[RET]`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class PlainFromage(nn.Module):
    """Axes: N pairs, L positions of a padded caption, k visual tokens, D the LM's width, q that of the joint space.

    Args:
        language_model: A causal LM with tied embeddings whose last row is that of `[RET]`.
        vision_model: A vision encoder with pooled output.
        k: Visual tokens per image.
        q: Width of the joint embedding space.
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
        """The training loss of images (N, 3, h, w), right-padded tokens (N, L), and their lengths (N,)."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        in_text, is_ret = position < lengths[:, None], position == lengths[:, None] - 1
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
        """An interleaved prompt (1, L, D) of images (N, 3, h, w), encoded one at a time, each followed by its share of
        tokens (1, T)."""
        parts = []
        for image, piece in zip(pixel_values, tokens[0].tensor_split(len(pixel_values)), strict=True):
            pooled = self.vision_model(image[None]).pooler_output
            visual = self.visual_embeddings(pooled.to(self.logit_scale)).unflatten(-1, (self.k, -1))
            embeds = self.embeddings(piece[None])
            parts += [visual.to(embeds), embeds]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def generate(self, embeds: torch.Tensor, count: int) -> torch.Tensor:
        """Greedily continue `embeds` (1, L, D).

        Each new token takes a pass over the whole sequence, with the logits and the retrieval embedding of every
        position and the hidden states of every layer.
        """
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
        """Summed log-likelihoods (C,) of candidates after `embeds` (1, L, D), which is encoded with every candidate.

        A token is scored with the logits of the position before it or, with `shift=False` (the authors' VisDial
        script), with those of its own position.
        """
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
    def _cross_entropy(output: CausalLMOutputWithPast, labels: torch.Tensor) -> torch.Tensor:
        logits = output.logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    @torch.no_grad()
    def mask_gradient(self) -> None:
        """Zero the gradient of all rows but the last, that of `[RET]`."""
        self.embeddings.weight.grad[:-1] = 0

    @torch.no_grad()
    def normalize_ret(self) -> None:
        """Scale the row of `[RET]` to the mean norm of the others."""
        norms = self.embeddings.weight[:-1].norm(dim=-1)
        row = self.embeddings.weight[-1]
        row.mul_(norms.mean() / row.norm())
