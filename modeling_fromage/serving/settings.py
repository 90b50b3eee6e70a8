"""What a server allows, and how it is reached."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..images_fromage import ImageLimits

API_KEYS = "FROMAGE_API_KEYS"  # an environment variable: keys, separated by commas


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class ServerSettings:
    """Options of the server, one key of a YAML file or one flag each; sizes are in bytes, times in seconds.

    Raises:
        ValueError: A limit is not positive.
    """

    host: str = _option("127.0.0.1", "address to listen at; 0.0.0.0 is every one of the machine")
    port: int = _option(8000, "0 takes a free one")
    served_model_name: str | None = _option(None, "the name that clients give; by default the model's own")
    public_url: str | None = _option(None, "address that links to images begin with; by default the client's own")
    api_keys_file: str | None = _option(None, f"file with an API key a line; {API_KEYS} in the environment works too")
    cors_origins: list[str] = _option([], "origins whose pages may call the server, such as https://chat.example.org")
    inline_images: bool = _option(False, "images as data: URLs in the text, for clients that show nothing else")

    default_max_tokens: int = _option(64, "tokens of an answer where a request does not say")
    max_tokens: int = _option(1024, "tokens of an answer at most")
    max_prompt_chars: int = _option(100_000, "characters of a request's texts")
    max_images: int = _option(8, "images of a request")
    max_inputs: int = _option(128, "inputs of a request for embeddings")
    max_results: int = _option(100, "images that a search returns")
    max_body_bytes: int = _option(20_000_000, "size of a request's body")
    max_image_bytes: int = _option(10_000_000, "size of an image's file")
    max_image_pixels: int = _option(50_000_000, "width times height of an image")
    allow_private_addresses: bool = _option(False, "whether image URLs may lead to this machine and its network")

    max_batch_size: int = _option(16, "answers that are generated together")
    max_queue: int = _option(64, "answers that wait for that; more are refused")
    max_connections: int = _option(1000, "open connections; a new one then replaces one that asks for nothing")
    request_timeout: float = _option(120.0, "for a whole request")
    header_timeout: float = _option(10.0, "for a request's headers to arrive")
    body_timeout: float = _option(30.0, "for a request's body to arrive, and for a client that reads nothing")
    image_timeout: float = _option(10.0, "for the download of an image")
    shutdown_timeout: float = _option(30.0, "for requests that run when the server is told to end")

    def __post_init__(self) -> None:
        for each in fields(ServerSettings):
            value = getattr(self, each.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and each.name != "port" and value <= 0:
                raise ValueError(f"`{each.name}` must be more than 0, got {value}.")
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"`default_max_tokens` ({self.default_max_tokens}) is more than `max_tokens` ({self.max_tokens})."
            )

    @property
    def image_limits(self) -> ImageLimits:
        """What an image of a request may cost."""
        return ImageLimits(
            timeout=self.image_timeout,
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            allow_private_addresses=self.allow_private_addresses,
        )

    def read_api_keys(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        """The API keys of the file and of the environment; none means that everybody may ask.

        Raises:
            ValueError: The file cannot be read, or there are no keys where some are asked for.
        """
        keys = environment.get(API_KEYS, "").split(",")
        if self.api_keys_file is not None:
            try:
                keys += Path(self.api_keys_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"The API keys cannot be read: {error}. Give a text file with a key a line."
                ) from error
        keys = [key.strip() for key in keys if key.strip()]
        if not keys and (self.api_keys_file is not None or API_KEYS in environment):
            raise ValueError(f"There are no API keys in `api_keys_file` or {API_KEYS}. Add one, or give neither.")
        return keys


__all__ = ["API_KEYS", "ServerSettings"]
