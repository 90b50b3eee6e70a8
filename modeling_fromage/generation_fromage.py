"""Generation with `[RET]`: its options as logits processors, and its embeddings beside the generated tokens."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.utils import GenerateOutput

RET_GENERATION_DEFAULTS = {
    "ret_scale_factor": 1.0,
    "ret_bias": 0.0,
    "min_tokens_before_ret": 0,
    "max_num_rets": None,
}


class RetLogitsProcessor(LogitsProcessor):
    """Scale, shift or forbid the `[RET]` columns, and forbid the image placeholder.

    Args:
        config: A `FromageConfig`, for the token ids.
        prompt_length (`int`): Number of columns of the prompt; what follows is generated.
        ret_scale_factor (`float`): Multiplies the logit, as the authors' code; lowers [RET] when the logit is negative.
        ret_bias (`float`): Added to the logit.
        min_tokens_before_ret (`int`): No [RET] before that many generated tokens.
        max_num_rets (`int`, *optional*): No more than that many generated [RET]; `None` is no limit.
    """

    def __init__(self, config, prompt_length, ret_scale_factor, ret_bias, min_tokens_before_ret, max_num_rets):
        self.rets = slice(config.ret_token_id, config.ret_token_id + config.num_ret_tokens)
        self.image_token_id = config.image_token_id
        self.prompt_length = prompt_length
        self.ret_scale_factor, self.ret_bias = ret_scale_factor, ret_bias
        self.min_tokens_before_ret, self.max_num_rets = min_tokens_before_ret, max_num_rets

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.image_token_id] = float("-inf")
        scores[:, self.rets] = scores[:, self.rets] * self.ret_scale_factor + self.ret_bias
        generated = input_ids[:, self.prompt_length :]
        if generated.shape[1] < self.min_tokens_before_ret:
            scores[:, self.rets] = float("-inf")
        if self.max_num_rets is not None:
            count = ((generated >= self.rets.start) & (generated < self.rets.stop)).sum(-1)
            full = (count >= self.max_num_rets)[:, None]
            scores[:, self.rets] = scores[:, self.rets].masked_fill(full, float("-inf"))
        return scores


def extend_generation_config(model: PreTrainedModel, language_model: PreTrainedModel):
    """Give `model` a copy of its LM's generation config with FROMAGe's options, which survives saving."""
    generation_config = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    for name, value in RET_GENERATION_DEFAULTS.items():
        setattr(generation_config, name, value)
    generation_config._from_model_config = False  # else the options are dropped on reload
    model.generation_config = generation_config


class FromageGenerationMixin:
    """What [`FromageForConditionalGeneration`] adds to transformers' `GenerationMixin`."""

    def generate(self, *args: Any, **kwargs: Any) -> GenerateOutput | torch.LongTensor:
        """transformers' `generate`, with four more options: `ret_scale_factor`, `ret_bias`, `min_tokens_before_ret`
        and `max_num_rets` (see [`RetLogitsProcessor`]).

        With `return_dict_in_generate=True` the output also has `ret_embeds`, a list with one (number of [RET], q)
        tensor a row: the unit-norm embeddings of the generated [RET] tokens in order, a last one included; and
        `ret_positions`, their columns in `sequences`.
        """
        output = super().generate(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output
        prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if prompt is not None:  # from inputs_embeds alone the prompt's tokens are not known
            output["ret_embeds"], output["ret_positions"] = self._embed_generated_rets(output.sequences, prompt, kwargs)
        return output

    @torch.no_grad()
    def _embed_generated_rets(self, sequences, prompt, kwargs):
        copies, length = len(sequences) // len(prompt), prompt.shape[1]
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(prompt) if mask is None else mask
        images = {key: kwargs[key] for key in ("pixel_values", "pooled_image_features") if kwargs.get(key) is not None}
        images = self._expand_images(prompt, images, copies)
        mask = mask.repeat_interleave(copies, dim=0)
        mask = torch.cat([mask, mask.new_ones(len(sequences), sequences.shape[1] - length)], dim=1)
        is_ret = self._is_ret(sequences)
        is_ret[:, :length] = False
        positions = [row.nonzero().flatten() for row in is_ret]
        pooled = self._pooled_or_none(images.get("pixel_values"), images.get("pooled_image_features"))
        output = self._decode(
            self._embed(sequences, pooled), mask.to(sequences.device), output_hidden_states=self._needs_all_layers
        )
        rows, columns = is_ret.nonzero(as_tuple=True)
        embeds = self._project_text([hidden[rows, columns] for hidden in self._text_layers(output)])
        return list(embeds.split([len(p) for p in positions])), positions

    def _expand_images(self, input_ids: torch.LongTensor, images: dict[str, torch.Tensor], copies: int):
        """Repeat each row's images `copies` times, row by row, for rows with different numbers of images."""
        if copies == 1 or not images:
            return images
        counts = (input_ids == self.config.image_token_id).sum(-1) // self.config.num_image_tokens
        rows = torch.arange(int(counts.sum()), device=input_ids.device).split(counts.tolist())
        order = torch.cat([row.repeat(copies) for row in rows])
        return {key: value[order.to(value.device)] for key, value in images.items()}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        keys = [k for k in ("pixel_values", "pooled_image_features") if model_kwargs.get(k) is not None]
        images = {key: model_kwargs.pop(key) for key in keys}
        if images and input_ids is not None:
            images = self._expand_images(input_ids, images, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False, **kwargs: Any
    ):  # `inputs_embeds` is named for transformers, which looks whether it is
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pooled_image_features", None)
        return inputs

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, *args: Any, **kwargs: Any):
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        options = {name: getattr(generation_config, name, default) for name, default in RET_GENERATION_DEFAULTS.items()}
        if options["ret_scale_factor"] != 1.0 and (generation_config.num_beams or 1) > 1:
            raise ValueError(
                "`ret_scale_factor` multiplies logits, but beams see log-probabilities. Use `ret_bias` with beams."
            )
        ours = RetLogitsProcessor(self.config, input_ids_seq_length or 0, **options)
        return LogitsProcessorList([ours, *processors])
