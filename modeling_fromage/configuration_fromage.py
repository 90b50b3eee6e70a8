"""Configuration of FROMAGe (arXiv 2301.13823)."""

import copy
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

try:
    from transformers.pipelines import PIPELINE_REGISTRY  # the first import that takes transformers' image processing
except RuntimeError as error:
    raise ImportError(
        f"transformers cannot import torchvision, which is of another build than torch ({error}). Uninstall "
        "torchvision, or install the build that goes with your torch. Or install modeling-fromage and import it first: "
        "it makes do with this torchvision."
    ) from error

from .vision_efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel  # noqa: F401 (registers the classes)
from .vision_open_clip import OpenClipVisionConfig, OpenClipVisionModel  # noqa: F401 (likewise)


@strict
class FromageConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FromageForConditionalGeneration`]: a frozen causal LM, a frozen vision encoder, and the sizes
    and token ids of what is trained between them.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to OPT's defaults):
            Configuration of the frozen causal language model.
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to CLIP's vision defaults):
            Configuration of the frozen vision encoder, or of an image-text model whose vision half it is.
        num_image_tokens (`int`, defaults to 1):
            `k` of the paper (section 3.1): vectors in the LM's input space, and placeholders in the text, per image.
        projection_dim (`int`, defaults to 256):
            `q` of the paper (section 3.2): width of the space shared by images and `[RET]` embeddings.
        text_embed_layers (`list[int]`, defaults to `[-1]`):
            Indices into the LM's `hidden_states` whose projections are summed at `[RET]`.
        image_token_id (`int`, *optional*): Id of `<|image|>`. Defaults to the LM's `vocab_size`.
        ret_token_id (`int`, *optional*): Id of the first `[RET]` token. Defaults to `image_token_id + 1`.
        num_ret_tokens (`int`, defaults to 1): `[RET]` tokens in a row, with contiguous ids, that ask for an image.
        ret_aggregation (`"concat"` or `"max"`, defaults to `"concat"`):
            Of several: one query from their states side by side; or one each, of which the nearest to an image counts.
        tie_ret_embedding (`bool`, defaults to `True`):
            One row serves as input embedding and as output-head row of `[RET]`. Where the LM's input and head widths
            differ a separate output row is trained whatever this says.
        ret_embedding_scale (`float`, defaults to 1):
            What `[RET]`'s row is multiplied by where it enters the LM: what the LM's embedding module multiplies its
            own rows by (the square root of the width in Gemma). Measured when a new model is assembled.
        text_embedding_scale (`float`, defaults to 1):
            What the LM multiplies the embeddings of token ids by, beside its embedding module, and embeddings that are
            given to it not (Falcon-H1). Found out when a new model is assembled.
        logit_scale_init_value (`float`, *optional*):
            Initial log of what cosines are multiplied by in the contrastive loss; by default ln(1 / 0.07), with
            `"siglip"` ln(10).
        logit_scale_max (`float`, *optional*):
            The most that cosines are multiplied by: after each step the trained scale is cut to it. CLIP takes 100.
        projector_type (`"linear"`, `"mlp"` or `"resampler"`, defaults to `"linear"`):
            What makes an image's visual tokens: a linear map (the paper's), one hidden layer more, or learned queries
            that attend to its patch tokens.
        resampler_num_layers (`int`, defaults to 1): Layers of the resampler, 1 or 2.
        vision_pooling (`"pooler"`, `"cls"` or `"mean"`, defaults to `"pooler"`):
            What one vector stands for an image: the encoder's `pooler_output`, its first token, or the mean over its
            tokens (or pixels of the feature map).
        vision_patch_tokens (`int`, defaults to 0):
            Patches that stand behind that vector, averaged over a square grid: 4, 9, 16, ... The visual tokens are made
            of them; retrieval reads the vector alone.
        vision_feature_layer (`int`, defaults to -1):
            The encoder's layer (of its `hidden_states`) that `"cls"`, `"mean"` and patches are taken from; -1 is its
            output.
        vision_feature_size (`int`, *optional*):
            Width of that vector, patches included. Measured with a dummy image when a model is made from the
            configuration.
        captioning_loss_weight, ret_token_loss_weight, contrastive_loss_weight (`float`, default to 1):
            Weights of the three losses in their sum (section 3.3).
        contrastive_loss_type (`"infonce"` or `"siglip"`, defaults to `"infonce"`):
            The contrastive loss: the paper's, or SigLIP's pairwise sigmoid loss (Zhai et al. 2023), which trains a bias
            too, `logit_bias`.
        contrastive_label_smoothing (`float`, defaults to 0):
            Label smoothing of InfoNCE, in training alone: this share of a target is spread evenly over a batch.
        captioning_label_smoothing (`float`, defaults to 0):
            Label smoothing of the captioning loss, in training alone: this share of a target is spread evenly over all
            tokens that have a logit.
        mask_duplicate_images (`bool`, defaults to `False`):
            Do not count an image that occurs twice in a batch as its own negative.
        gradient_cache_chunk_size (`int`, *optional*):
            Rows of a batch whose activations are held at once in training; more are recomputed in the backward pass, so
            that the number of contrastive negatives is not bound by memory.
        image_feature_dropout (`float`, defaults to 0):
            In training, chance that an entry of an image's pooled features is dropped: for small data sets.
        text_model_id, vision_model_id (`str`, *optional*):
            Where the frozen backbones came from: a Hub id or a folder. In a saved configuration a folder is given
            relative to it (`../backbones/opt`), and both are absent where the checkpoint holds the backbones itself.
        text_model_revision, vision_model_revision (`str`, *optional*): The commits of those Hub ids.
        vision_model_library (`"transformers"` or `"open_clip"`, defaults to `"transformers"`):
            The library that `vision_model_id` is a checkpoint of. Models of timm are transformers', by its wrapper.
        text_model_fingerprint, vision_model_fingerprint (`dict`, *optional*):
            Size and digests of their weight files; a checkpoint of the trained parts loads with no others.
        text_gguf_file (`str`, *optional*): The GGUF file that the language model was read from.
        retrieval_fingerprint (`str`, *optional*):
            In a saved configuration, the model's `retrieval_fingerprint()` where its trained parts were rounded when
            saved (to float16) so that theirs would be another.
    """

    model_type = "fromage"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
    }
    keys_to_ignore_at_inference = ["past_key_values", "logits", "hidden_states", "attentions", "logits_per_image",
                                   "logits_per_text"]  # fmt: skip

    if TYPE_CHECKING:  # what `__post_init__` makes of them
        text_config: PreTrainedConfig
        vision_config: PreTrainedConfig
        text_embed_layers: list[int]
        image_token_id: int
        ret_token_id: int
        logit_scale_init_value: float
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
        text_embed_layers: list[int] | None = None
        image_token_id: int | None = None
        ret_token_id: int | None = None
        logit_scale_init_value: float | None = None
    num_image_tokens: int = 1
    projection_dim: int = 256
    num_ret_tokens: int = 1
    ret_aggregation: Literal["concat", "max"] = "concat"
    tie_ret_embedding: bool = True
    ret_embedding_scale: float = 1.0
    text_embedding_scale: float = 1.0
    logit_scale_max: float | None = None
    projector_type: Literal["linear", "mlp", "resampler"] = "linear"
    resampler_num_layers: int = 1
    vision_pooling: Literal["pooler", "cls", "mean"] = "pooler"
    vision_patch_tokens: int = 0
    vision_feature_layer: int = -1
    vision_feature_size: int | None = None
    captioning_loss_weight: float = 1.0
    ret_token_loss_weight: float = 1.0
    contrastive_loss_weight: float = 1.0
    contrastive_loss_type: Literal["infonce", "siglip"] = "infonce"
    contrastive_label_smoothing: float = 0.0
    captioning_label_smoothing: float = 0.0
    mask_duplicate_images: bool = False
    gradient_cache_chunk_size: int | None = None
    image_feature_dropout: float = 0.0
    text_model_id: str | None = None
    text_model_revision: str | None = None
    vision_model_id: str | None = None
    vision_model_revision: str | None = None
    vision_model_library: Literal["transformers", "open_clip"] = "transformers"
    text_model_fingerprint: dict | None = None
    vision_model_fingerprint: dict | None = None
    text_gguf_file: str | None = None
    retrieval_fingerprint: str | None = None
    tie_word_embeddings: bool = False  # the LM ties its own; nothing is tied across the parts

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("custom_pipelines"):
            kwargs["custom_pipelines"] = _CustomPipelines(kwargs["custom_pipelines"])
        for name in ("text_config", "vision_config"):
            if isinstance(given := getattr(self, name), PreTrainedConfig):  # a live model's, whose attention is unset
                setattr(self, name, copy.deepcopy(given))
        super().__post_init__(**kwargs)
        self.vision_config, self.text_config = vision_half(self.vision_config), text_half(self.text_config)
        if not isinstance(getattr(self.text_config, "num_hidden_layers", None), int):
            raise ValueError(
                f"A `text_config` of type {self.text_config.model_type!r} names no `num_hidden_layers`: it is not "
                "of one decoder. Take another language model."
            )
        if self.text_embed_layers is None:
            self.text_embed_layers = [-1]
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        if self.ret_token_id is None:
            self.ret_token_id = self.image_token_id + 1
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = math.log(10 if self.contrastive_loss_type == "siglip" else 1 / 0.07)
        self._check()
        _check_losses(self)

    def _check(self) -> None:
        for name in ("num_image_tokens", "projection_dim", "num_ret_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.ret_aggregation == "max" and self.num_ret_tokens == 1:
            raise ValueError("`ret_aggregation='max'` takes the best of several queries, and `num_ret_tokens` is 1.")
        self._check_vision()
        if not self.text_embed_layers or len(set(self.text_embed_layers)) != len(self.text_embed_layers):
            raise ValueError(
                f"`text_embed_layers` must be a non-empty list without repeats, got {self.text_embed_layers}."
            )
        depth = self.text_config.num_hidden_layers
        for layer in self.text_embed_layers:
            if not -depth - 1 <= layer <= depth:
                raise ValueError(
                    f"`text_embed_layers` has {layer}, but the language model has hidden states {-depth - 1}..{depth}."
                )
        if self.ret_token_id <= self.image_token_id:
            raise ValueError(
                f"`ret_token_id` ({self.ret_token_id}) must come after `image_token_id` ({self.image_token_id}): "
                "FromageProcessor adds `<|image|>` first and `[RET]` after it."
            )

    def _check_vision(self) -> None:
        patches = self.vision_patch_tokens
        if patches < 0 or math.isqrt(patches) ** 2 != patches:
            raise ValueError(f"`vision_patch_tokens` must be 0 or a square number (4, 9, 16, ...), got {patches}.")
        if self.vision_feature_layer != -1 and self.vision_pooling == "pooler" and not patches:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but `vision_pooling='pooler'` reads no hidden "
                "state. Set `vision_pooling` to 'cls' or 'mean', or `vision_patch_tokens`; or leave the layer out."
            )
        if self.projector_type == "resampler" and not patches:
            raise ValueError(
                "`projector_type='resampler'` attends to patch tokens, and `vision_patch_tokens` is 0. Set it."
            )
        if self.projector_type != "resampler" and 0 < patches < self.num_image_tokens:
            raise ValueError(
                f"{patches} patch tokens (`vision_patch_tokens`) make no {self.num_image_tokens} visual tokens "
                "(`num_image_tokens`): each is the mean of one or more. Set more, or `projector_type='resampler'`."
            )
        if self.resampler_num_layers not in (1, 2):
            raise ValueError(f"`resampler_num_layers` must be 1 or 2, got {self.resampler_num_layers}.")
        if self.projector_type != "resampler" and self.resampler_num_layers != 1:
            raise ValueError(
                f"`resampler_num_layers` is {self.resampler_num_layers}, but `projector_type={self.projector_type!r}` "
                "has no such layers. Leave it out, or set `projector_type='resampler'`."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, which sets the fields among `kwargs` once all else is checked: these are checked too."""
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config._check()
        _check_losses(config)
        return found

    @classmethod
    def from_vision_text_configs(
        cls, vision_config: PreTrainedConfig, text_config: PreTrainedConfig, **kwargs: Any
    ) -> "FromageConfig":
        """Build a [`FromageConfig`] of copies of its backbones' configurations (of CLIP's, the vision half)."""
        return cls(vision_config=vision_config, text_config=text_config, **kwargs)

    @property
    def logit_width(self) -> int:
        """Number of columns of the model's logits: the LM's up to the last `[RET]`."""
        return self.ret_token_id + self.num_ret_tokens

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The LM's configuration, whose `vocab_size` is [`logit_width`], as transformers' generation code needs."""
        inner = self.text_config
        if not isinstance(inner, PreTrainedConfig):  # while the base class is still building the sub-configs
            return self
        if not self.ret_token_id:
            return inner
        base: Any = type(inner)
        view: PreTrainedConfig = object.__new__(_full_width_class(base, self.logit_width))
        object.__setattr__(view, "__dict__", inner.__dict__)  # shared: callers write to it
        return view


def _check_losses(config: FromageConfig) -> None:
    for name in ("contrastive_label_smoothing", "captioning_label_smoothing"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {getattr(config, name)}.")
    if config.contrastive_label_smoothing and config.contrastive_loss_type == "siglip":
        raise ValueError(
            "`contrastive_label_smoothing` spreads a target over the batch, and SigLIP's loss decides each pair by "
            'itself. Set it to 0, or take `contrastive_loss_type="infonce"`.'
        )
    first = math.exp(config.logit_scale_init_value)
    if config.logit_scale_max is not None and config.logit_scale_max < first * (1 - 1e-6):
        raise ValueError(
            f"`logit_scale_max` ({config.logit_scale_max}) is below what the scale starts at, the exponential of "
            f"`logit_scale_init_value` ({first:.6g}). Raise the one, or lower the other."
        )


def vision_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision encoder's configuration within that of an image-text model, or the configuration itself."""
    halves = [getattr(config, name) for name in ("vision_config", "image_config") if name in config.sub_configs]
    return next((half for half in halves if half is not None), config)


def text_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's configuration within that of a multimodal model, or the configuration itself."""
    text_config = config.get_text_config(decoder=True)
    is_part = any(text_config is getattr(config, name, None) for name in config.sub_configs)
    return text_config if is_part else config


class _CustomPipelines(dict):
    """The pipelines whose code a checkpoint carries. `pipeline` takes the task's name from here, and then the code,
    unless the task is not among them: those that are registered in this process need no code of the checkpoint."""

    def __contains__(self, task: object) -> bool:
        return super().__contains__(task) and task not in PIPELINE_REGISTRY.supported_tasks


@functools.cache
def _full_width_class(base: type, width: int) -> type:
    def refuse(self: PreTrainedConfig, value: int) -> None:
        raise NotImplementedError(
            "The vocabulary of a FROMAGe model cannot be resized: its language model is frozen. Add tokens to the "
            "language model first, then assemble the FROMAGe model from it."
        )

    return type(base.__name__, (base,), {"vocab_size": property(lambda self: width, refuse)})


__all__ = ["FromageConfig", "text_half", "vision_half"]
