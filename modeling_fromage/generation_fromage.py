"""Generation with `[RET]`: its options as logits processors, and its embeddings beside the generated tokens."""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.utils import GenerateOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones_fromage import check_fits, check_length, initial_cache
from .configuration_fromage import FromageConfig
from .frozen_lm_fromage import FrozenLM
from .prefix_cache_fromage import goes_on, is_plain, selected
from .ret_runs_fromage import (
    RetRunLogitsProcessor,
    end_after_whole_rets,
    ends_of_rets,
    offsets_of_tokens,
    refuse_torn_rets,
)

RET_GENERATION_DEFAULTS = {
    "ret_scale_factor": 1.0,
    "ret_bias": 0.0,
    "min_tokens_before_ret": 0,
    "max_num_rets": None,
}


class RetLogitsProcessor(LogitsProcessor):
    """Scale, shift or forbid the `[RET]` column, and forbid the image placeholder. Of several `[RET]` tokens it is the
    first that is chosen: [`RetRunLogitsProcessor`] brings the others.

    Args:
        config: A `FromageConfig`, for the token ids.
        prompt_length (`int`): Number of columns of the prompt; what follows is generated.
        ret_scale_factor (`float`): Multiplies the logit, as the authors' code; lowers [RET] when the logit is negative.
        ret_bias (`float`): Added to the logit.
        min_tokens_before_ret (`int`): No [RET] before that many generated tokens.
        max_num_rets (`int`, *optional*): No more than that many generated [RET]; `None` is no limit.

    Each of these four may be a list with one for each prompt.
    """

    def __init__(
        self,
        config: FromageConfig,
        prompt_length: int,
        ret_scale_factor: float | Sequence[float],
        ret_bias: float | Sequence[float],
        min_tokens_before_ret: int | Sequence[int],
        max_num_rets: int | None | Sequence[int | None],
    ):
        self.ret = slice(config.ret_token_id, config.ret_token_id + 1)
        self.others = slice(config.ret_token_id + 1, config.logit_width)
        self.image_token_id = config.image_token_id
        self.prompt_length = prompt_length
        self.ret_scale_factor, self.ret_bias = ret_scale_factor, ret_bias
        self.min_tokens_before_ret, self.max_num_rets = min_tokens_before_ret, max_num_rets

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.image_token_id] = scores[:, self.others] = float("-inf")
        scale, bias = _by_row(self.ret_scale_factor, scores), _by_row(self.ret_bias, scores)
        ret = scores[:, self.ret] * scale + bias
        generated = input_ids[:, self.prompt_length :]
        count = (generated == self.ret.start).sum(-1, keepdim=True)
        too_early = generated.shape[1] < _by_row(self.min_tokens_before_ret, scores)
        scores[:, self.ret] = ret.masked_fill(too_early | (count >= _by_row(self.max_num_rets, scores)), -math.inf)
        return scores


def _by_row(option: Any, scores: torch.Tensor) -> torch.Tensor:
    """An option as (rows or 1, 1) for `scores` (rows, V), of which a prompt may have several; `None` is infinite."""
    given = option if isinstance(option, (list, tuple)) else [option]
    values = scores.new_tensor([math.inf if value is None else value for value in given], dtype=torch.float)
    return values[:, None] if len(values) == 1 else values.repeat_interleave(len(scores) // len(values))[:, None]


def extend_generation_config(model: PreTrainedModel, language_model: PreTrainedModel) -> None:
    """Give `model` a copy of its LM's generation config with FROMAGe's options, which survives saving."""
    generation_config = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    for name, value in RET_GENERATION_DEFAULTS.items():
        setattr(generation_config, name, value)
    generation_config._from_model_config = False  # else the options are dropped on reload
    model.generation_config = generation_config


class FromageGenerationMixin(GenerationMixin):
    """transformers' `GenerationMixin` with `[RET]`: its options, and the embeddings of those that were generated."""

    config: FromageConfig

    def frozen_lm(self) -> FrozenLM:
        raise NotImplementedError

    def _visual_tokens(
        self, pixel_values: torch.Tensor | None, pooled_image_features: torch.Tensor | None
    ) -> torch.Tensor | None:
        raise NotImplementedError

    def generate(self, *args: Any, **kwargs: Any) -> GenerateOutput | torch.LongTensor:
        """transformers' `generate`, with four more options: `ret_scale_factor`, `ret_bias`, `min_tokens_before_ret`
        and `max_num_rets` (see [`RetLogitsProcessor`]). Images are given as `pixel_values` or
        `pooled_image_features`, in the order of their placeholders, and are encoded once. `past_key_values` may hold
        the first columns of the prompt.

        With `return_dict_in_generate=True` the output also has `ret_embeds`, a list with one (number of [RET], q)
        tensor a row: the unit-norm embeddings of the generated [RET] tokens in order, a last one included; and
        `ret_positions`, their columns in `sequences`.

        Where [RET] is several tokens, the options act on the first, the others follow it, and `ret_positions` are those
        of the last, after which `eos_token_id` ends a text; a [RET] that had no room for it has neither. `ret_embeds`
        are (number of [RET], num_ret_tokens, q) with `ret_aggregation="max"`.

        Raises:
            ValueError: Prompt and new tokens exceed the language model's context, images and placeholders differ in
                number, or an option does not go with images or with this language model.
        """
        parent: Any = super()
        prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if prompt is None:  # from inputs_embeds alone the prompt's tokens are not known
            self._choose_cache(kwargs.get("attention_mask"), kwargs)
            return parent.generate(*args, **kwargs)
        visual = self._encode_once(kwargs)
        if visual is not None and (kwargs.get("assistant_model") is not None or kwargs.get("assistant_early_exit")):
            raise ValueError(
                "An assistant model drafts without the images of a prompt. Use `prompt_lookup_num_tokens`, which "
                "drafts from the prompt's own tokens, or no assistance."
            )
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_of_prompt(prompt, kwargs)
        self._choose_cache(kwargs["attention_mask"], kwargs)
        if visual is not None:
            self._leave_out_cached_images(prompt, visual, kwargs)
        output: Any = parent.generate(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return cast(torch.LongTensor, output)
        copies = len(output.sequences) // len(prompt)
        mask = kwargs["attention_mask"].repeat_interleave(copies, dim=0)
        mask = torch.nn.functional.pad(mask, (0, output.sequences.shape[1] - prompt.shape[1]), value=1)
        is_ret = ends_of_rets(output.sequences, self.config)
        is_ret[:, : prompt.shape[1]] = False
        if visual is not None:
            visual = self._repeat_images(prompt, visual, copies)
        is_searched = "beam_indices" in output or kwargs.get("assistant_model") is not None
        cache = None if is_searched else output.get("past_key_values")
        output["ret_embeds"] = self.embed_positions(output.sequences, mask, visual, is_ret, cache)
        output["ret_positions"] = [row.nonzero().flatten() for row in is_ret]
        return output

    def _choose_cache(self, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Generate without a cache, by whole passes, where the LM does not continue from one as from a whole text.

        Raises:
            ValueError: A cache is asked for then, or there are no tokens to make whole passes of.
        """
        defaults = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("use_cache", defaults.use_cache) is False:
            return
        is_padded = mask is not None and bool((mask[:, 0] == 0).any())
        needed = "left padding" if is_padded else "a cache"
        lm = self.frozen_lm()
        if lm.takes(needed):
            return
        needs_cache = ("use_cache", "cache_implementation", "past_key_values", "inputs_embeds")
        asked = [name for name in needs_cache if kwargs.get(name) is not None]  # an empty cache is asked for, too
        if asked:
            padded, equal = (" where prompts are padded", " or give prompts of one length") if is_padded else ("", "")
            raise ValueError(
                f"{type(lm.language_model).__name__} does not continue from transformers' caches as from whole texts"
                f"{padded}, so `{asked[0]}` would give other tokens. Leave it out{equal}: generation then runs the "
                "whole text anew for each token."
            )
        kwargs["use_cache"] = False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        is_given = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        parent: Any = super()
        result = parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not is_given and initial_cache(self.frozen_lm().decoder) is None:
            model_kwargs.pop("past_key_values", None)
        return result

    def _mask_of_prompt(self, prompt: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The mask of a prompt that comes without one, by transformers' rule: pad tokens are padding, unless they end
        sequences too."""
        defaults = kwargs.get("generation_config") or self.generation_config
        pad, eos = (
            torch.tensor([] if value is None else value).flatten()
            for value in (kwargs.get(name, getattr(defaults, name)) for name in ("pad_token_id", "eos_token_id"))
        )
        is_pad = torch.isin(prompt.cpu(), pad) & ~torch.isin(prompt.cpu(), eos)
        return (~is_pad).long().to(prompt.device)

    @torch.no_grad()
    def _encode_once(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Put the visual tokens (N, k, D) of the images among `kwargs` in the place of the images."""
        visual = self._visual_tokens(kwargs.pop("pixel_values", None), kwargs.pop("pooled_image_features", None))
        if visual is not None:
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=visual)}
        return visual

    @torch.no_grad()
    def get_ret_embeds(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pooled_image_features: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Unit-norm embeddings, as `ret_embeds` of [`generate`], of every `[RET]` of each row of `input_ids` (B, L).
        Raises a `ValueError` where a row has some of several `[RET]` tokens without the others."""
        refuse_torn_rets(input_ids, self.config)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        visual = self._visual_tokens(pixel_values, pooled_image_features)
        return self.embed_positions(input_ids, mask, visual, ends_of_rets(input_ids, self.config))

    @torch.no_grad()
    def embed_positions(
        self,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor,
        visual: torch.Tensor | None,
        at: torch.Tensor,
        cache: Any = None,
    ) -> list[torch.Tensor]:
        """The unit-norm text embeddings at the places `at` (B, L), usually those of `[RET]` (of the last of its
        tokens): one (places, q) tensor a row, or (places, num_ret_tokens, q).

        A pass of its own over the rows that have any, up to the last one. It is exact for beams, samples and a `[RET]`
        that was never fed back, and no step of a generation has to keep its hidden states.

        Args:
            visual: (N, k, D), the visual tokens of all rows' images.
            cache (*optional*): Of the same rows. Where the LM goes on from it, the pass begins at the first place.
        """
        counts, lm = at.sum(-1).tolist(), self.frozen_lm()
        if not any(counts):
            queries = [self.config.num_ret_tokens] if self.config.ret_aggregation == "max" else []
            return list(lm.adapter.logit_scale.new_zeros(0, *queries, self.config.projection_dim).split(counts))
        rows = at.any(-1)
        if visual is not None:
            visual = visual[rows.repeat_interleave(self._image_counts(sequences)).to(visual.device)]
        sequences, mask, at = sequences[rows], attention_mask[rows], at[rows]
        check_length(sequences, self.config.text_config)
        is_image, columns = sequences == self.config.image_token_id, at.any(0).nonzero()
        start, first = 0, int(columns.min()) - self.config.num_ret_tokens + 1
        options: dict[str, Any] = {}
        if is_plain(cache) and not is_image[:, first:].any() and goes_on(lm, at.shape[1]):
            start, visual = min(first, cache.get_seq_length()), None
            options["past_key_values"] = selected(lm, cache, rows, start)
        length = int((at | is_image).any(0).nonzero().max()) + 1
        output = lm.decode(
            lm.embed(sequences[:, start:length], visual),
            mask[:, :length].to(sequences.device),
            output_hidden_states=lm.needs_all_layers,
            **options,
        )
        row, column = at[:, start:].nonzero().split(1, dim=1)  # (places, 1) each
        column = column + offsets_of_tokens(self.config, column.device)
        embeds = lm.adapter.text_embeds([hidden[row, column].flatten(1) for hidden in lm.text_layers(output)])
        return list(embeds.split(counts))

    def _leave_out_cached_images(self, prompt: torch.Tensor, visual: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Leave visual tokens (N, k, D) to `generate` only where they stand behind `past_key_values`."""
        cache = kwargs.get("past_key_values")
        columns = 0 if cache is None else cache.get_seq_length()
        if columns and kwargs["attention_mask"].shape[1] == prompt.shape[1]:  # else the prompt is what is new
            column = (prompt == self.config.image_token_id).nonzero()[:, 1]
            new = visual.flatten(0, 1)[(column >= columns).to(visual.device)]
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=new[None])}

    def _image_counts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B,) images of each row."""
        return (input_ids == self.config.image_token_id).sum(-1) // self.config.num_image_tokens

    def _repeat_images(self, input_ids: torch.Tensor, images: torch.Tensor, copies: int) -> torch.Tensor:
        """Repeat each row's images (N, ...) `copies` times, row by row, for rows with different numbers of images."""
        rows = images.split(self._image_counts(input_ids).tolist())
        return torch.cat([row for row in rows for _ in range(copies)])

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        parent: Any = super()
        processors = parent._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        options: dict[str, Any] = {
            name: getattr(generation_config, name, default) for name, default in RET_GENERATION_DEFAULTS.items()
        }
        scales = options["ret_scale_factor"]
        scales = scales if isinstance(scales, (list, tuple)) else [scales]
        if any(scale != 1.0 for scale in scales) and (generation_config.num_beams or 1) > 1:
            raise ValueError(
                "`ret_scale_factor` multiplies logits, but beams see log-probabilities. Use `ret_bias` with beams."
            )
        ours = RetLogitsProcessor(self.config, input_ids_seq_length or 0, **options)
        runs = [RetRunLogitsProcessor(self.config, input_ids_seq_length or 0)] if self.config.num_ret_tokens > 1 else []
        return LogitsProcessorList([ours, *processors, *runs])

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        parent: Any = super()
        prepared, model_kwargs = parent._prepare_generation_config(generation_config, **kwargs)
        end_after_whole_rets(prepared, self.config)
        return prepared, model_kwargs

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        parent: Any = super()
        parent._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        new_tokens = generation_config.max_length - input_ids_length
        check_fits(input_ids_length, new_tokens, self.config.text_config, bool(generation_config.use_cache))
