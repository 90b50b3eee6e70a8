"""FROMAGe: a frozen causal LM and a frozen vision encoder joined by linear maps and a `[RET]` token.

Axes: B rows of text, L tokens, N images, k visual tokens per image, D the LM's input width, H its head's width,
V columns of logits, q the width of the shared image-text space.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .adapter_fromage import FromageAdapter
from .backbone_checks_fromage import check_decoder, measure_embedding_scale
from .backbone_loading_fromage import assemble_from_vision_text
from .backbones_fromage import check_length, weight_of
from .captioning_losses_fromage import sequence_losses
from .checkpoint_origin_fromage import weights_digest
from .configuration_fromage import FromageConfig
from .frozen_lm_fromage import FrozenLM
from .generation_fromage import FromageGenerationMixin, extend_generation_config
from .image_vectors_fromage import ImageVector
from .packing_fromage import next_tokens
from .peft_layers_fromage import unwrapped
from .pretrained_fromage import FromagePreTrainedModel
from .processing_fromage import FromageProcessor
from .ret_runs_fromage import last_rets, refuse_torn_rets
from .scoring_fromage import score_candidates
from .text_part_fromage import build_language_model, text_part
from .training_losses_fromage import DISPATCH_HINT, retrieval_losses, weighted_sum
from .vision_fromage import build_vision_model, check_vision_model, vision_feature_size, vision_part


@dataclass
class FromageOutput(ModelOutput):
    """Output of [`FromageForConditionalGeneration`]. A part without inputs is `None`.

    Attributes:
        loss (`torch.FloatTensor` of shape `()`): Weighted sum of the three losses below.
        captioning_loss (`torch.FloatTensor` of shape `()`):
            Next-token cross-entropy of the captions given their images, unweighted.
        ret_token_loss (`torch.FloatTensor` of shape `()`):
            Next-token cross-entropy of the texts that end in `[RET]`, unweighted.
        contrastive_loss (`torch.FloatTensor` of shape `()`):
            Mean of the two InfoNCE losses between `[RET]` and image embeddings, or SigLIP's loss, unweighted.
        logits (`torch.FloatTensor` of shape `(B, L, V)`):
            Next-token logits; `None` in training with labels unless `return_logits=True`.
        image_embeds, text_embeds (`torch.FloatTensor` of shape `(N, q)`):
            Unit-norm embeddings of images and of `[RET]`; the latter `(N, r, q)` with `ret_aggregation="max"`.
        logits_per_image, logits_per_text (`torch.FloatTensor` of shape `(N, M)` and `(M, N)`):
            Scaled similarities, over all ranks' pairs in training; with SigLIP's loss, `logit_bias` is in them.
        past_key_values, hidden_states, attentions: As the language model returns them.
    """

    loss: torch.Tensor | None = None
    captioning_loss: torch.Tensor | None = None
    ret_token_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class FromageForConditionalGeneration(FromagePreTrainedModel, FromageGenerationMixin):
    """FROMAGe with its frozen backbones; see [`FromageConfig`] for the sizes and section 3 of the paper for the model.

    Args:
        config ([`FromageConfig`]): The configuration.
        language_model, vision_model (`PreTrainedModel`, *optional*):
            Live backbones to join (of a multimodal model, its LM). Built with random weights where absent.
        new_adapter (`bool`, defaults to `True`):
            Whether live backbones are joined for the first time: they are then tried, `[RET]` starts from the LM's
            rows, and `ret_embedding_scale` is measured. `False` where trained parts are to be loaded.

    Raises:
        ValueError: FROMAGe cannot give what a backbone gives by itself; the message names it and tells why.
    """

    def __init__(
        self,
        config: FromageConfig,
        language_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
        new_adapter: bool = True,
    ):
        super().__init__(config)
        language_model, vision_model = unwrapped(language_model), unwrapped(vision_model)
        self.language_model = text_part(language_model) if language_model else build_language_model(config.text_config)
        self.vision_model = vision_part(vision_model) if vision_model else build_vision_model(config.vision_config)
        self.language_model.eval()  # as it is tried, and stays
        self.vision_model.eval()
        config.text_config, config.vision_config = self.language_model.config, self.vision_model.config
        ends = self.get_input_embeddings(), self.get_output_embeddings()
        input_width, head_width = (weight_of(module).shape[-1] for module in ends)
        if vision_model is not None and new_adapter:
            config.vision_feature_size = check_vision_model(self.vision_model, ImageVector.of(config))
        vision_feature_size(config, self.vision_model)
        self.adapter = FromageAdapter(config, input_width, head_width)
        if hasattr(language_model, "hf_quantizer"):  # cannot be compared with files, which are not quantised
            self.origins["text"].digest = weights_digest(self.language_model.state_dict())
        for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):  # by which PEFT puts in its layers for bitsandbytes
            setattr(self, flag, getattr(self.language_model, flag, False))
        self._is_stateful = self.language_model._is_stateful
        extend_generation_config(self, self.language_model)
        self.post_init()
        if language_model is not None and new_adapter:
            self.adapter.init_ret(self.get_input_embeddings(), self.get_output_embeddings(), config.ret_token_id)
            config.text_embedding_scale = check_decoder(self.language_model)
            config.ret_embedding_scale = config.text_embedding_scale * measure_embedding_scale(self.language_model)
        self.traits.measure_logit_transform(self.language_model)
        self._ignore_backbones_on_save()
        self.freeze_backbones()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        processor: FromageProcessor | None = None,
        **kwargs: Any,
    ) -> "FromageForConditionalGeneration":
        """Assemble a new model from two pretrained backbones; only the adapter is new.

        Args:
            vision_model_name_or_path, text_model_name_or_path (`str`):
                Hub ids or folders; a vision model of open_clip as "open_clip:hf-hub:org/name" (see [`split_library`]).
            processor ([`FromageProcessor`], *optional*):
                Gives the token ids and how many there are. Built from the text model's tokenizer where absent.
            kwargs:
                Fields of [`FromageConfig`]; `text_*` and `vision_*` for one backbone's `from_pretrained`
                (`text_gguf_file`, `text_quantization_config`, ...); `dtype`, `token`, `cache_dir` ... for both.

        Raises:
            ValueError: A backbone misses weights that are in use, or an id disagrees with the processor's.

        Example:

            model = FromageForConditionalGeneration.from_vision_text_pretrained(
                "openai/clip-vit-large-patch14", "facebook/opt-6.7b", dtype="bfloat16"
            )
        """
        return assemble_from_vision_text(cls, vision_model_name_or_path, text_model_name_or_path, processor, kwargs)

    # ---- images and text ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_pooled_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The frozen encoder's pooled output: (N, channels, height, width) -> (N, vision width)."""
        return self._encode(pixel_values)[1]

    @torch.no_grad()
    def _encode(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[ModelOutput, torch.Tensor]:
        """The frozen encoder's output, and its pooled features (N, vision width)."""
        pixels = pixel_values.to(self.vision_model.dtype)
        return ImageVector.of(self.config).encode(self.vision_model, pixels, **kwargs)

    def _pooled_features(
        self, pixel_values: torch.Tensor | None, pooled_image_features: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The pooled features (N, vision width) of images that come in one of two ways, or not at all."""
        if pixel_values is not None and pooled_image_features is not None:
            raise ValueError("Give `pixel_values` or `pooled_image_features`, not both.")
        return pooled_image_features if pixel_values is None else self.get_pooled_image_features(pixel_values)

    def _visual_tokens(
        self, pixel_values: torch.Tensor | None, pooled_image_features: torch.Tensor | None
    ) -> torch.Tensor | None:
        pooled = self._pooled_features(pixel_values, pooled_image_features)
        return None if pooled is None else self.adapter.visual_tokens(pooled)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images (N, channels, height, width) for the LM: `pooler_output` holds the visual tokens (N, k, D)."""
        output, pooled = self._encode(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.get("last_hidden_state"),
            pooler_output=self.adapter.visual_tokens(pooled),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def get_image_embeds(
        self, pixel_values: torch.Tensor | None = None, pooled_image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Unit-norm embeddings (N, q) of images, from pixels (N, channels, height, width) or from pooled features (N,
        vision width)."""
        pooled = self._pooled_features(pixel_values, pooled_image_features)
        if pooled is None:
            raise ValueError("Give exactly one of `pixel_values` and `pooled_image_features`.")
        return self.adapter.image_embeds(pooled)

    def get_text_embeds(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pooled_image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Unit-norm embeddings (B, q) at the last `[RET]` of each row of `input_ids` (B, L); with
        `ret_aggregation="max"` one a token, (B, num_ret_tokens, q).

        Raises:
            ValueError: A row has no `[RET]` or only some of its tokens, or is longer than the LM's context.
        """
        check_length(input_ids, self.config.text_config)
        lm = self.frozen_lm()
        embeds = lm.embed(input_ids, self._visual_tokens(pixel_values, pooled_image_features))
        output = lm.decode(embeds, attention_mask, output_hidden_states=lm.needs_all_layers)
        rows, columns = last_rets(input_ids, self.config)
        return self.adapter.text_embeds([hidden[rows, columns].flatten(1) for hidden in lm.text_layers(output)])

    @torch.no_grad()
    def score_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        candidate_ids: torch.LongTensor,
        candidate_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pooled_image_features: torch.Tensor | None = None,
        shift: bool = True,
    ) -> torch.Tensor:
        """Summed log-likelihood of each candidate's tokens given its context, which is encoded once.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): The contexts, padded on either side.
            candidate_ids, candidate_attention_mask (`torch.Tensor` of shape `(B, C, M)` or `(C, M)`):
                Texts without images, for each context or for all of them, padded on either side, without BOS unless it
                is to be scored.
            pixel_values or pooled_image_features: Images of the contexts, as in [`forward`].
            shift (`bool`, defaults to `True`):
                Whether a token is predicted from the one before it. `False` scores each token with the logits of its
                own position, as the authors' VisDial script does (the paper's protocol).

        Returns:
            `torch.FloatTensor` of shape `(B, C)`; higher is likelier.

        Raises:
            ValueError: Shapes disagree, a candidate or a context is empty, or both exceed the LM's context.
        """
        return score_candidates(
            self.frozen_lm(),
            input_ids,
            attention_mask,
            candidate_ids,
            candidate_attention_mask,
            self._visual_tokens(pixel_values, pooled_image_features),
            shift,
        )

    # ---- forward --------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pooled_image_features: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        retrieval_input_ids: torch.LongTensor | None = None,
        retrieval_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        return_logits: bool | None = None,
        ret_targets: torch.LongTensor | None = None,
        retrieval_targets: torch.LongTensor | None = None,
        negative_pixel_values: torch.Tensor | None = None,
        negative_image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> FromageOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Tokens, `k` placeholders for each image.
            attention_mask, position_ids (`(B, L)`): 1 for tokens, 0 for padding on either side; counted from it.
            pixel_values (`(N, num_channels, height, width)`) or pooled_image_features (`(N, vision width)`):
                The images, in the order of their placeholders; in retrieval, image i is the match of text i.
            labels (`torch.LongTensor` of shape `(B, L)`): Targets of the captioning loss or -100. Shifted here.
            shift_labels: The same, shifted already; goes before `labels`. By keyword: no Trainer looks for it then.
            retrieval_input_ids, retrieval_attention_mask (`(M, L')`): Texts that end in `[RET]`.
            ret_targets (`(B, L)`), retrieval_targets (`(M,)`): The number of the image that a document's `[RET]` is to
                find, -100 where there is none; and that retrieval text i is to find, i where absent.
            negative_pixel_values or negative_image_features (`(N', ...)`): Images, in that form, that no text finds.
            inputs_embeds (`(B, L, D)`): In the place of tokens; images are put into them where `input_ids` come too.
            mm_encoder_outputs: Visual tokens that `generate` has computed.
            return_logits (`bool`): Whether to return logits beside a loss; by default in eval mode only.
            kwargs: For the language model (`output_hidden_states`, `output_attentions`, ...).

        Raises:
            ValueError: Counts disagree, a text has no `[RET]`, there is no telling where images go, ...
        """
        lm, across = self.frozen_lm(), self.training and _has_several_ranks()
        shift_labels: torch.LongTensor | None = kwargs.pop("shift_labels", None)
        _check(lm, self.training, input_ids, labels, shift_labels, retrieval_input_ids, past_key_values, ret_targets)
        forms = (pixel_values, pooled_image_features), (negative_pixel_values, negative_image_features)
        pooled, negatives = _images(self, *forms)
        embeds = _lm_inputs(lm, input_ids, inputs_embeds, pooled, mm_encoder_outputs, retrieval_input_ids, across)
        parts, documents = dict[str, Any](), None
        if embeds is not None:
            targets = next_tokens(labels, shift_labels, embeds)
            wants_logits = targets is None or (not self.training if return_logits is None else return_logits)
            kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache or None}
            keep = logits_to_keep if wants_logits else None
            parts, documents = sequence_losses(lm, embeds, attention_mask, targets, ret_targets, across, keep, kwargs)
        if retrieval_input_ids is not None or documents is not None:
            texts = retrieval_input_ids, retrieval_attention_mask
            parts |= retrieval_losses(lm, *texts, pooled, across, retrieval_targets, documents, negatives)
        return FromageOutput(loss=weighted_sum(parts, self.config), **parts)


def _check(
    lm: FrozenLM,
    training: bool,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    retrieval_input_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    ret_targets: torch.Tensor | None,
) -> None:
    """Raise a `ValueError` where what comes does not belong together."""
    if ret_targets is not None:
        refuse_torn_rets(input_ids, lm.config, ret_targets)
    if not training:
        return
    if retrieval_input_ids is not None and past_key_values is not None:
        raise ValueError(
            "Retrieval texts start anew: a training batch with them takes no `past_key_values`, as PEFT's "
            "prefix tuning gives. Take a method that changes layers (LoRA, ...)."
        )
    if input_ids is not None and retrieval_input_ids is not None and labels is None and shift_labels is None:
        raise ValueError(
            "A training batch has captioning rows and retrieval texts, but no labels. A Trainer with "
            "`label_smoothing_factor` or `compute_loss_func` takes them away and replaces the loss: leave it out."
        )
    if torch.is_grad_enabled():
        lm.traits.require_gradient(lm.language_model)


_Forms = tuple[torch.Tensor | None, torch.Tensor | None]  # images as pixels, or as pooled features


def _images(model: FromageForConditionalGeneration, images: _Forms, negatives: _Forms) -> _Forms:
    """The pooled features of images (N, vision width) and of negatives (N', vision width), pixels in one pass: equal
    images are known by equal features, and passes of other sizes may round otherwise."""
    if negatives[0] is None and (negatives[1] is None or images[0] is None):
        return model._pooled_features(*images), negatives[1]
    if images[0] is None or negatives[0] is None or negatives[1] is not None:
        raise ValueError(
            "Negative images come as the images of texts do: `negative_pixel_values` beside `pixel_values`, "
            "`negative_image_features` beside `pooled_image_features`."
        )
    pooled: Any = model._pooled_features(torch.cat([images[0], negatives[0]]), images[1])
    return pooled[: len(images[0])], pooled[len(images[0]) :]


def _lm_inputs(
    lm: FrozenLM,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    pooled: torch.Tensor | None,
    mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    retrieval_input_ids: torch.Tensor | None,
    across_processes: bool,
) -> torch.Tensor | None:
    """The LM's inputs (B, L, D), images included; `None` where there are only retrieval texts."""
    encoded = (mm_encoder_outputs or {}).get("image")
    visual = None if encoded is None else encoded.pooler_output
    if input_ids is not None:
        if visual is None and pooled is not None:
            visual = lm.adapter.visual_tokens(pooled)
        if inputs_embeds is None:
            return lm.embed(input_ids, visual, DISPATCH_HINT if across_processes else "")
        return inputs_embeds if visual is None else lm.place_images(inputs_embeds, input_ids, visual)
    # Without `input_ids`, pooled features may be those of the retrieval texts.
    if inputs_embeds is not None and (visual is not None or (pooled is not None and retrieval_input_ids is None)):
        raise ValueError(
            "`inputs_embeds` alone do not tell where the images go. Give `input_ids` with their placeholders too, or "
            "put the visual tokens of `get_image_features` into `inputs_embeds` and give no images."
        )
    return inputs_embeds


def _has_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


__all__ = ["FromageForConditionalGeneration", "FromageOutput", "FromagePreTrainedModel"]
