"""FROMAGe: a frozen causal LM and a frozen vision encoder joined by linear maps and a `[RET]` token.

Axes: B rows of text, L tokens, N images, k visual tokens an image, D the LM's input width, H its head's width,
V columns of logits, q the width of the shared image-text space, T target tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .backbone_loading_fromage import PARTS, assemble_from_vision_text
from .backbone_probes_fromage import check_decoder
from .backbones_fromage import (
    allow_activation_checkpointing,
    check_gradient_passes,
    check_length,
    check_vision_model,
    decoder_and_head,
    hidden_state_width,
    measure_embedding_scale,
    measure_logit_transform,
    pool_vision_output,
    vision_width,
)
from .branches_fromage import FromageBranchesMixin
from .checkpoint_fromage import FromageCheckpointMixin
from .checkpoint_origin_fromage import weights_digest
from .configuration_fromage import FromageConfig
from .fingerprint_fromage import trained_fingerprint
from .generation_fromage import FromageGenerationMixin, extend_generation_config
from .losses_fromage import mean_over_targets
from .packing_fromage import next_tokens, padding_side, positions, tokens_first
from .peft_layers_fromage import own_parameters, set_peft_training_mode
from .scoring_fromage import FromageScoringMixin


@dataclass
class FromageOutput(ModelOutput):
    """Output of [`FromageForConditionalGeneration`]. A part without inputs is `None`.

    Attributes:
        loss (): weighted sum of the three losses below.
        captioning_loss (): next-token cross-entropy of the captions given their images, unweighted.
        ret_token_loss (): next-token cross-entropy of the caption-plus-`[RET]` texts, unweighted.
        contrastive_loss (): mean of the two InfoNCE losses between `[RET]` and image embeddings, unweighted.
        logits (B, L, V): next-token logits; `None` in training with labels unless `return_logits=True`.
        image_embeds (N, q), text_embeds (N, q): unit-norm embeddings of images and of `[RET]`.
        logits_per_image (N, N), logits_per_text (N, N): scaled similarities, over all ranks' pairs in training.
        past_key_values, hidden_states, attentions: as the language model returns them.
    """

    loss: torch.FloatTensor | None = None
    captioning_loss: torch.FloatTensor | None = None
    ret_token_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class FromageAdapter(nn.Module):
    """All that is trained (section 3.2). Kept in fp32 whatever the dtype of the backbones."""

    def __init__(self, config: FromageConfig, input_width: int, head_width: int):
        super().__init__()
        features = vision_width(config.vision_config)
        self.feature_dropout = nn.Dropout(config.image_feature_dropout)
        self.multi_modal_projector = nn.Linear(features, config.num_image_tokens * input_width)
        self.visual_projection = nn.Linear(features, config.projection_dim)
        self.text_projection = nn.ModuleList(
            nn.Linear(hidden_state_width(config.text_config, layer, head_width), config.projection_dim)
            for layer in config.text_embed_layers
        )
        self.ret_embedding = nn.Embedding(config.num_ret_tokens, input_width)
        tied = config.tie_ret_embedding and input_width == head_width
        self.ret_lm_head = None if tied else nn.Linear(head_width, config.num_ret_tokens, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    def _apply(self, fn, recurse: bool = True):
        """As in torch, but for `half()`, `bfloat16()` and `to(dtype)`: they are meant for the backbones."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            is_narrower = tensor.is_floating_point() and converted.dtype.itemsize < min(tensor.dtype.itemsize, 4)
            return tensor.to(converted.device, torch.float32) if is_narrower else converted

        return super()._apply(convert, recurse)

    def image_features(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, vision width) as the projections take them: in their dtype, on their device."""
        return self.feature_dropout(pooled.to(self.logit_scale))

    def ret_rows(self) -> torch.Tensor:
        """The input embeddings of `[RET]` (num_ret_tokens, D), through a module call, so that offloading hooks fire."""
        return self.ret_embedding(torch.arange(self.ret_embedding.num_embeddings, device=self.logit_scale.device))

    def ret_head_rows(self) -> torch.Tensor:
        """Rows of `[RET]` in the output head (num_ret_tokens, H); of a separate head, what it makes of unit vectors."""
        if self.ret_lm_head is None:
            return self.ret_rows()
        width = self.ret_lm_head.in_features
        return self.ret_lm_head(torch.eye(width, device=self.logit_scale.device, dtype=self.logit_scale.dtype)).t()


class FromagePreTrainedModel(PreTrainedModel):
    config_class = FromageConfig
    config: FromageConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # a contrastive loss cannot be normalised by a count of tokens
    _keep_in_fp32_modules_strict = ["adapter"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, FromageAdapter):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class FromageForConditionalGeneration(
    FromageCheckpointMixin,
    FromagePreTrainedModel,
    FromageBranchesMixin,
    FromageGenerationMixin,
    FromageScoringMixin,
    GenerationMixin,
):
    """FROMAGe with its frozen backbones; see [`FromageConfig`] for the sizes and section 3 of the paper for the model.

    Args:
        config ([`FromageConfig`]): The configuration.
        language_model, vision_model (`PreTrainedModel`, *optional*):
            Live backbones to join. Built with random weights from the configuration where absent.
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
        given = language_model is not None
        self.language_model = language_model if given else AutoModelForCausalLM.from_config(config.text_config)
        self.vision_model = vision_model if vision_model is not None else AutoModel.from_config(config.vision_config)
        self.language_model.eval()  # as it is tried, and stays
        self.vision_model.eval()
        config.text_config = self.language_model.config
        config.vision_config = self.vision_model.config
        input_width = self.language_model.get_input_embeddings().weight.shape[-1]
        head_width = self.language_model.get_output_embeddings().weight.shape[-1]
        self.adapter = FromageAdapter(config, input_width, head_width)
        self._logit_transform: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._ret_norm_target: float | None = None
        self._known_fingerprint: tuple[dict[str, torch.Tensor], str] | None = None  # and of which tensors
        self._reload_kwargs: dict[str, dict[str, Any]] = {prefix: {} for prefix in PARTS}
        self._unchanged_weights: dict[str, dict[str, list[int]]] = {}  # digests of backbones that are as their files
        if given and hasattr(language_model, "hf_quantizer"):  # cannot be compared with files: they are not quantised
            self._unchanged_weights["text"] = weights_digest(language_model.state_dict())
        self._reasons: set[str] = set()  # said why the retrieval branch takes the ordinary pass
        self._abilities: dict[tuple[str, str], bool] = {}  # by attention implementation, once they have been tried
        self._gradient_passes = False  # once that has been seen
        self._is_stateful = self.language_model._is_stateful
        extend_generation_config(self, self.language_model)
        self.post_init()
        if given and new_adapter:
            self.init_ret_embedding()
            config.ret_embedding_scale = measure_embedding_scale(self.language_model)
            check_decoder(self.language_model)
        if vision_model is not None and new_adapter:
            check_vision_model(vision_model, config.vision_pooling)
        if self.get_output_embeddings().weight.device.type != "meta":  # else when it is first needed
            self.logit_transform  # noqa: B018
        self.remember_frozen_keys()
        self.freeze_backbones()

    # ---- assembling, freezing -------------------------------------------------------------------------------------

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        processor: Any = None,
        **kwargs: Any,
    ) -> "FromageForConditionalGeneration":
        """Assemble a new model from two pretrained backbones; only the adapter is new.

        Args:
            vision_model_name_or_path, text_model_name_or_path (`str`):
                Hub ids or folders.
            processor ([`FromageProcessor`], *optional*):
                Gives the token ids and `num_image_tokens`. Built from the text model's tokenizer where absent.
            kwargs:
                Fields of [`FromageConfig`]; `text_*` and `vision_*` for one backbone's `from_pretrained`
                (`text_gguf_file`, `text_quantization_config`, ...); `dtype`, `token`, `cache_dir` ... for both.

        Raises:
            ValueError: A backbone misses weights that are in use, or an id disagrees with the processor's.
        """
        return assemble_from_vision_text(cls, vision_model_name_or_path, text_model_name_or_path, processor, kwargs)

    @property
    def logit_transform(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the LM does to its head's output, elementwise; measured once."""
        if self._logit_transform is None:
            self._logit_transform = measure_logit_transform(self.language_model)
        return self._logit_transform

    @torch.no_grad()
    def init_ret_embedding(self):
        """Start `[RET]` as the LM's own row of that id where it has one (parity), else as the mean input row."""
        first, count = self.config.ret_token_id, self.config.num_ret_tokens
        pairs = [(self.adapter.ret_embedding, self.language_model.get_input_embeddings())]
        if self.adapter.ret_lm_head is not None:
            pairs.append((self.adapter.ret_lm_head, self.language_model.get_output_embeddings()))
        for ours, theirs in pairs:
            rows = theirs.weight
            mean = rows.float().mean(dim=0)
            start = [rows[i].float() if i < len(rows) else mean for i in range(first, first + count)]
            ours.weight.copy_(torch.stack(start))

    def freeze_backbones(self):
        """Let exactly the parameters of `adapter` require gradient; those that PEFT has put in are left as they are."""
        for backbone in (self.language_model, self.vision_model):
            for _, parameter in own_parameters(backbone):
                parameter.requires_grad_(False)
        for is_wrapped, parameter in own_parameters(self.adapter):
            parameter.requires_grad_(not is_wrapped)  # of a wrapped one PEFT trains a copy, or a difference from it
        self.train(self.training)
        return self

    @classmethod
    def _finalize_model_loading(cls, model, load_config, loading_info):
        info = super()._finalize_model_loading(model, load_config, loading_info)
        model.freeze_backbones()  # loading makes new parameters, which require gradient
        model._logit_transform = None  # measured on weights that were not there yet
        if model.get_output_embeddings().weight.device.type != "meta":
            model.logit_transform  # noqa: B018
        return info

    def train(self, mode: bool = True):
        """Set training mode; the frozen backbones stay in eval mode, but for what PEFT trains in them."""
        super().train(mode)
        self.language_model.eval()
        self.vision_model.eval()
        if mode:
            set_peft_training_mode(self.language_model)
            set_peft_training_mode(self.vision_model)
            allow_activation_checkpointing(self.language_model)
        return self

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any):
        """As in transformers: layers that take part recompute their activations in the captioning branch."""
        super().activation_checkpointing_enable(*args, **kwargs)
        self.train(self.training)

    @torch.no_grad()
    def normalize_ret_embedding(self):
        """Rescale each `[RET]` row to the mean norm of the LM's other input rows, as the authors do after each step."""
        if self._ret_norm_target is None:
            rows = self.language_model.get_input_embeddings().weight[: self.config.ret_token_id]
            self._ret_norm_target = rows.float().norm(dim=-1).mean().item()
        weight = self.adapter.ret_embedding.weight
        weight.mul_(self._ret_norm_target / weight.norm(dim=-1, keepdim=True))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # ---- images ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_pooled_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The frozen encoder's pooled output: (N, channels, height, width) -> (N, vision width)."""
        return self._encode_images(pixel_values).pooler_output

    @torch.no_grad()
    def _encode_images(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        output = self.vision_model(pixel_values.to(self.vision_model.dtype), return_dict=True, **kwargs)
        pooled = pool_vision_output(output, self.config.vision_pooling, type(self.vision_model).__name__)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=pooled,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def _visual_tokens(self, pooled: torch.Tensor) -> torch.Tensor:
        projected = self.adapter.multi_modal_projector(self.adapter.image_features(pooled))
        return projected.unflatten(-1, (self.config.num_image_tokens, -1))  # (N, k, D)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images for the LM: `pooler_output` holds the visual tokens (N, k, D)."""
        output = self._encode_images(pixel_values, **kwargs)
        output.pooler_output = self._visual_tokens(output.pooler_output)
        return output

    def get_image_embeds(
        self, pixel_values: torch.Tensor | None = None, pooled_image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Unit-norm embeddings (N, q) of images, from pixels or from pooled features (N, vision width)."""
        if (pixel_values is None) == (pooled_image_features is None):
            raise ValueError("Give exactly one of `pixel_values` and `pooled_image_features`.")
        pooled = pooled_image_features if pixel_values is None else self.get_pooled_image_features(pixel_values)
        projected = self.adapter.visual_projection(self.adapter.image_features(pooled))
        return nn.functional.normalize(projected, dim=-1)

    @torch.no_grad()
    def retrieval_fingerprint(self) -> str:
        """Tells the models apart whose embeddings can be compared: a digest of the trained parts, rounded to bfloat16,
        so that a checkpoint saved in bfloat16 has its original's. Taken anew when a trained tensor has changed."""
        return self.fingerprint_of(self._trained_state())

    def fingerprint_of(self, state: dict[str, torch.Tensor]) -> str:
        """[`retrieval_fingerprint`] of trained tensors, kept until they change."""
        if self._known_fingerprint is not None and self._known_fingerprint[0].keys() == state.keys():
            # Compared with a copy: 5 ms at the paper's shapes on a CPU, and unlike `_version` it sees edits of `.data`.
            known = {name: tensor.to(state[name]) for name, tensor in self._known_fingerprint[0].items()}
            if all(torch.equal(tensor, known[name]) for name, tensor in state.items()):
                self._known_fingerprint = known, self._known_fingerprint[1]  # on the device where it is asked for
                return self._known_fingerprint[1]
        self._known_fingerprint = {name: tensor.clone() for name, tensor in state.items()}, trained_fingerprint(state)
        return self._known_fingerprint[1]

    def take_saved_fingerprint(self):
        """Keep the fingerprint that the checkpoint just loaded gives for its tensors, if they were rounded when saved
        so that their own would be another."""
        if (saved := self.config.retrieval_fingerprint) is not None:
            self._known_fingerprint = {name: value.clone() for name, value in self._trained_state().items()}, saved
            self.config.retrieval_fingerprint = None

    def _trained_state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their plain names; of a PEFT wrapper, those of its active copy."""
        adapter = self.adapter
        if "modules_to_save" in dict(adapter.named_children()):
            adapter = adapter.modules_to_save[adapter.active_adapters[0]]
        return adapter.state_dict()

    # ---- text -----------------------------------------------------------------------------------------------------

    def get_text_embeds(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pooled_image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Unit-norm embeddings (B, q) at the last `[RET]` of each row of `input_ids` (B, L).

        Raises:
            ValueError: A row has no `[RET]`, or is longer than the LM's context.
        """
        check_length(input_ids, self.config.text_config)
        embeds = self._embed(input_ids, self._pooled_or_none(pixel_values, pooled_image_features))
        output = self._decode(embeds, attention_mask, output_hidden_states=self._needs_all_layers)
        rows, columns = self._last_rets(input_ids)
        return self._project_text([hidden[rows, columns] for hidden in self._text_layers(output)])

    @property
    def _needs_all_layers(self) -> bool:
        return self.config.text_embed_layers != [-1]

    def _pooled_or_none(self, pixel_values, pooled_image_features):
        if pixel_values is not None and pooled_image_features is not None:
            raise ValueError("Give `pixel_values` or `pooled_image_features`, not both.")
        return pooled_image_features if pixel_values is None else self.get_pooled_image_features(pixel_values)

    def _is_ret(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return (input_ids >= self.config.ret_token_id) & (input_ids < self.config.logit_width)

    def _last_rets(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Rows and columns, (B,) each, of the last `[RET]` of every row."""
        is_ret = self._is_ret(input_ids)
        if not bool(is_ret.any(-1).all()):
            rows = (~is_ret.any(-1)).nonzero().flatten().tolist()
            raise ValueError(f"Rows {rows} have no [RET] token (id {self.config.ret_token_id}); end each text with it.")
        columns = input_ids.shape[-1] - 1 - is_ret.flip(-1).int().argmax(-1)
        return torch.arange(len(columns), device=columns.device), columns

    def _text_layers(self, output: BaseModelOutputWithPast) -> list[torch.Tensor]:
        """The hidden states (B, L, width) that `text_embed_layers` names."""
        layers = self.config.text_embed_layers
        return [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]

    def _project_text(self, layers: list[torch.Tensor]) -> torch.Tensor:
        """Sum of the projections of each layer's hidden states (M, width): unit-norm (M, q)."""
        pairs = zip(layers, self.adapter.text_projection, strict=True)
        total = sum(projection(hidden.to(self.adapter.logit_scale)) for hidden, projection in pairs)
        return nn.functional.normalize(total, dim=-1)

    def _embed(self, input_ids: torch.LongTensor, pooled: torch.Tensor | None, visual: torch.Tensor | None = None):
        """Token ids (B, L) and image features -> the LM's inputs (B, L, D)."""
        is_ret, is_image = self._is_ret(input_ids), input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_ret | is_image, 0))
        ret_rows = self.adapter.ret_rows()
        if self.config.ret_embedding_scale != 1.0:  # in the output head the row stays as it is, as the LM's own do
            ret_rows = ret_rows * self.config.ret_embedding_scale
        ret_rows = ret_rows.to(embeds)
        ret_index = (input_ids - self.config.ret_token_id).clamp(0, len(ret_rows) - 1)
        embeds = torch.where(is_ret[..., None], ret_rows[ret_index], embeds)
        return self._place_images(embeds, input_ids, pooled, visual)

    def _place_images(self, embeds, input_ids, pooled: torch.Tensor | None, visual: torch.Tensor | None = None):
        """`embeds` (B, L, D) with visual tokens at the placeholders of `input_ids` (B, L)."""
        is_image = input_ids == self.config.image_token_id
        if visual is None and pooled is not None:
            visual = self._visual_tokens(pooled)
        if visual is None:
            vectors = embeds.new_empty(0, embeds.shape[-1])
        elif isinstance(visual, torch.Tensor):  # (N, k, D), or (1, rows, D): `generate` may cut within an image
            vectors = visual.flatten(0, 1)  # (N k, D)
        else:  # a list, from `generate`
            vectors = torch.cat(visual)
        count, k = int(is_image.sum()), self.config.num_image_tokens
        if count != len(vectors):
            raise ValueError(
                f"The text has {count} image placeholder tokens, but {len(vectors) // k} images were given, which take "
                f"{len(vectors)} ({k} each). Let FromageProcessor build both.{self._dispatch_hint}"
            )
        if count:
            embeds = embeds.masked_scatter(is_image[..., None], vectors.to(embeds))
        return embeds

    def _place_images_in(self, embeds, input_ids, pooled, visual, of_pairs: bool) -> torch.Tensor:
        """Put images into `embeds` that were given; `of_pairs`: they may be those of the retrieval texts alone.

        Raises:
            ValueError: There are no `input_ids` to tell where they go.
        """
        if input_ids is not None:
            return self._place_images(embeds, input_ids, pooled, visual)
        if of_pairs:
            return embeds
        raise ValueError(
            "`inputs_embeds` alone do not tell where the images go. Give `input_ids` with their placeholders too, or "
            "put the visual tokens of `get_image_features` into `inputs_embeds` and give no images."
        )

    def _decode(self, embeds, attention_mask=None, position_ids=None, **kwargs) -> BaseModelOutputWithPast:
        # Compiled code does not look at the mask, unless it has to.
        is_taken = torch.compiler.is_compiling() and self._takes("left padding") and self._takes("right padding")
        padding = None if is_taken else padding_side(attention_mask, embeds)
        if padding and not self._takes(f"{padding} padding"):
            return self._decode_padded_otherwise(embeds, attention_mask, position_ids, **kwargs)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask)[:, -embeds.shape[1] :]
        kwargs.setdefault("use_cache", False)
        decoder, _ = decoder_and_head(self.language_model)
        return decoder(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )

    def _decode_padded_otherwise(self, embeds, mask, position_ids, **kwargs) -> BaseModelOutputWithPast:
        """[`_decode`] of a batch padded on a side that the LM does not take: its padding moves to the right, and back.

        Raises:
            ValueError: The LM takes no padding on the right either, or a cache or attentions are asked for.
        """
        captured = kwargs.get("use_cache") or kwargs.get("output_attentions")
        if captured or not self._takes("right padding"):
            raise ValueError(
                f"{type(self.language_model).__name__} computes other numbers for texts that are padded "
                f"{'on the left ' if captured else ''}than for each text by itself. Give it texts of one length at a "
                "time" + (", or use no cache and no attentions." if captured else ".")
            )
        order = tokens_first(mask)
        if position_ids is not None:
            position_ids = position_ids.expand_as(mask).gather(1, order)
        output = self._decode(
            embeds.take_along_dim(order[..., None], dim=1), mask.gather(1, order), position_ids, **kwargs
        )
        back = order.argsort(dim=-1)[..., None]
        output.last_hidden_state = output.last_hidden_state.take_along_dim(back, dim=1)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(hidden.take_along_dim(back, dim=1) for hidden in output.hidden_states)
        return output

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V): the LM's columns, the image token's, and `[RET]`'s own."""
        frozen, ret = self._split_logits(hidden, self.adapter.ret_head_rows())
        columns = [frozen, ret]
        missing = self.config.ret_token_id - frozen.shape[-1]
        if missing > 0:  # ids that the LM has no row for: only `<|image|>`
            columns.insert(1, frozen.new_full((*frozen.shape[:-1], missing), torch.finfo(frozen.dtype).min))
        return torch.cat(columns, dim=-1)

    def _split_logits(self, hidden: torch.Tensor, ret_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., H) -> the LM's own logits (..., columns up to `[RET]`) and those of `ret_rows` (R, H), (..., R)."""
        _, head = decoder_and_head(self.language_model)
        frozen = self.logit_transform(head(hidden)[..., : self.config.ret_token_id])
        return frozen, self.logit_transform(hidden @ ret_rows.to(hidden).t())

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> FromageOutput:
        """
        Args:
            input_ids (B, L): Tokens, `k` placeholders for each image.
            attention_mask (B, L): 1 for tokens, 0 for padding on either side.
            position_ids (B, L): Counted from the mask where absent.
            pixel_values (N, channels, height, width) or pooled_image_features (N, vision width):
                The images, in the order of their placeholders; in retrieval, image i is the match of text i.
            labels (B, L): Targets of the captioning loss, -100 where there is none. Shifted here.
            shift_labels (B, L): The same, shifted already: entry t is the target of token t. Goes before `labels`. By
                keyword, as transformers has it: a Trainer asks every batch for what the signature calls labels.
            inputs_embeds (B, L, D): Take the place of tokens. With `input_ids`, whose placeholders tell where they go,
                images are put into them.
            retrieval_input_ids, retrieval_attention_mask (N, L'): Texts that end in `[RET]`, for the retrieval losses.
            return_logits: Whether to return logits beside a loss; defaults to True in eval mode only.

        Raises:
            ValueError: Counts of images, placeholders or retrieval texts disagree, a text has no `[RET]`, images come
                with `inputs_embeds` alone, a layer of the LM that is to train with loses the gradient, or in training
                the labels of captioning rows beside retrieval texts are missing.
        """
        shift_labels: torch.LongTensor | None = kwargs.pop("shift_labels", None)
        has_rows = input_ids is not None and retrieval_input_ids is not None
        if self.training and has_rows and labels is None and shift_labels is None:
            raise ValueError(
                "A training batch has captioning rows and retrieval texts, but no labels. A Trainer with "
                "`label_smoothing_factor` or `compute_loss_func` takes them away and replaces the loss: leave it out."
            )
        if self.training and torch.is_grad_enabled() and not self._gradient_passes:
            check_gradient_passes(self.language_model)
            self._gradient_passes = True
        pooled = self._pooled_or_none(pixel_values, pooled_image_features)
        parts: dict[str, Any] = {}
        if input_ids is not None or inputs_embeds is not None:
            encoded = (mm_encoder_outputs or {}).get("image")
            visual = None if encoded is None else encoded.pooler_output
            if inputs_embeds is None:
                inputs_embeds = self._embed(input_ids, pooled, visual)
            elif visual is not None or pooled is not None:
                of_pairs = retrieval_input_ids is not None and visual is None
                inputs_embeds = self._place_images_in(inputs_embeds, input_ids, pooled, visual, of_pairs)
            captured = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            captured = {name: value for name, value in captured.items() if value is not None}  # else the LM's setting
            targets = next_tokens(labels, shift_labels, inputs_embeds)
            wants_logits = targets is None or (not self.training if return_logits is None else return_logits)
            more = (position_ids, past_key_values, use_cache or None, *captured.values(), *kwargs.values())
            if not wants_logits and all(value is None for value in more):
                parts["captioning_loss"] = self._captioning_loss(inputs_embeds, attention_mask, targets)
            else:
                lm_output = self._decode(
                    inputs_embeds,
                    attention_mask,
                    position_ids,
                    past_key_values=past_key_values,
                    use_cache=bool(use_cache),
                    **captured,
                    **kwargs,
                )
                parts.update({name: lm_output.get(name) for name in ("past_key_values", "hidden_states", "attentions")})
                hidden = lm_output.last_hidden_state
                if targets is not None:
                    is_target = targets != -100
                    loss = self._token_loss(hidden[is_target], targets[is_target])
                    parts["captioning_loss"] = mean_over_targets(loss, is_target.sum(), self._across_processes)
                if wants_logits:
                    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                    parts["logits"] = self._logits(hidden[:, keep])
        if retrieval_input_ids is not None:
            parts.update(self._retrieval(retrieval_input_ids, retrieval_attention_mask, pooled))
        return FromageOutput(loss=self._weighted_loss(parts), **parts)


__all__ = ["FromageForConditionalGeneration", "FromageOutput", "FromagePreTrainedModel"]
