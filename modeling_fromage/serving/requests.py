"""The bodies of requests: OpenAI's fields, ours beside them, and those that are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..io.command_line import did_you_mean
from .errors import ApiError

# OpenAI's fields that would change the answer, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"], ["text", "image"], ["image", "text"]),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Those that change nothing of an answer.
_IGNORED = {"metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
            "safety_identifier", "service_tier", "store", "user"}  # fmt: skip

_MOST = 2**31 - 1  # what the generation of answers takes; larger numbers mean nothing more
_LONGEST_NAME = 100  # characters of an unknown option that are told
_MOST_VALUES = 1000  # of a filter or a list of ids: they are looked for at each search


def _few_values(where: dict[str, Any]) -> dict[str, Any]:
    count = sum(len(value) if isinstance(value, list) else 1 for value in where.values())
    if count > _MOST_VALUES:
        raise ValueError(f"it has {count:,} values; {_MOST_VALUES:,} are allowed")
    return where


Count = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Stops = Annotated[
    list[Annotated[str, Field(max_length=200)]],
    Field(max_length=16),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
Where = Annotated[dict[str, Any], Field(max_length=32), AfterValidator(_few_values)]
Probability = Annotated[float, Field(gt=0, le=1)]


class _Request(BaseModel):
    """A body in which `null` is as good as nothing, and nothing that is not known is passed over."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if value is None or name in _IGNORED:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in _NEUTRAL:
                name = name[:_LONGEST_NAME]
                hint = did_you_mean(name, cls.model_fields) or "Leave it out."
                raise ApiError(400, f"There is no option `{name}`. {hint}", param=name, code="unknown_parameter")
            elif not any(
                value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]
            ):
                raise ApiError(
                    400, f"`{name}` is not supported: this server cannot honour it. Leave it out.", param=name,
                    code="unsupported_parameter",
                )  # fmt: skip
        return kept


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class _Search(_Request):
    """What narrows a search down."""

    where: Where | None = None
    exclude_ids: Annotated[list[str], Field(max_length=_MOST_VALUES)] = []


class ChatRequest(_Search):
    """`POST /v1/chat/completions`."""

    model: str
    messages: list[dict[str, Any]]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    # Ours.
    top_k: Positive | None = None
    ret_bias: float | None = None
    ret_scale_factor: float | None = None
    min_tokens_before_ret: Count | None = None
    max_num_rets: Count | None = None
    images_per_ret: Annotated[int, Field(ge=1, le=16)] | None = None
    feed_images_back: bool = False
    load_images: bool = True
    inline_images: bool | None = None

    def options(self, default_max_tokens: int, max_tokens: int, stop_strings: list[str]) -> dict[str, Any]:
        """Options of [`Engine.submit`].

        Args:
            default_max_tokens (`int`), max_tokens (`int`): Tokens of an answer where the request does not say, and at
                most.
            stop_strings (`list[str]`): Those that end an answer anyway.
        """
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(self, name)
        if asked is not None and asked > max_tokens:
            raise ApiError(400, f"`{name}` is {asked}; an answer has {max_tokens} tokens at most here.", param=name)
        temperature = self.temperature
        if temperature is None:  # as OpenAI has it, once anything about sampling is said; else greedy
            temperature = 1.0 if self.top_k is not None or (self.top_p or 1) < 1 else 0.0
        options: dict[str, Any] = {
            "max_new_tokens": default_max_tokens if asked is None else asked,
            "temperature": temperature,
            "feed_images_back": self.feed_images_back,
            "load_images": self.load_images,
            "exclude_ids": self.exclude_ids,
        }
        if stop := [each for each in self.stop or [] if each]:
            options["stop_strings"] = [*stop_strings, *stop]
        names = ("top_p", "top_k", "seed", "ret_bias", "ret_scale_factor", "min_tokens_before_ret", "max_num_rets",
                 "images_per_ret", "where")  # fmt: skip
        given = {each: getattr(self, each) for each in names}
        return options | {each: value for each, value in given.items() if value is not None}


class EmbeddingsRequest(_Request):
    """`POST /v1/embeddings`: the input, or each of a list of them, is a text, an image, or a list of both in order."""

    model: str
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None


class ImageSearchRequest(_Search):
    """`POST /v1/images/search`: for a text, an image, or a list of both in order."""

    query: Any
    model: str | None = None
    top_k: Positive | None = None
    load_images: bool = False
    rerank: Count = 0
    rerank_weight: float | None = None


__all__ = ["ChatRequest", "EmbeddingsRequest", "ImageSearchRequest"]
