"""Reading images of every common kind, from files, memory or the web, as RGB."""

import io
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .fetching_fromage import DEFAULT_LIMITS, ImageLimits, UnreadableImageError, fetch, is_url

# Of the web: Pillow hands PostScript to a program of its own.
WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
# What Pillow raises, and why; the first kind that fits counts.
_REASONS = {
    FileNotFoundError: "not found",
    UnidentifiedImageError: "no image",
    Image.DecompressionBombError: "too many pixels",
    Image.DecompressionBombWarning: "too many pixels",
    OSError: "broken",
    SyntaxError: "broken",
    ValueError: "broken",
    EOFError: "broken",
    RuntimeError: "broken",
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to RGB.

    Transparent pixels become white, 16-bit and float images are scaled to 8 bits, and of an animation the first frame
    is taken (PIL's own conversions make transparency black and clip 16 bits).
    """
    if getattr(image, "is_animated", False):
        image.seek(0)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image).astype(np.float64)
        top = 1.0 if image.mode == "F" and pixels.max() <= 1.0 else 65535.0 if pixels.max() > 255 else 255.0
        image = Image.fromarray((pixels.clip(0, top) * (255.0 / top)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def load_rgb_image(
    source: str | os.PathLike | Image.Image | dict[str, Any], limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Read a file, a URL (`http`, `https`, `data`), a PIL image or an undecoded `datasets` image (`{"bytes", "path"}`)
    as RGB.

    Raises:
        UnreadableImageError: A `ValueError` that names an image that is missing, truncated, none at all, or over one of
            `limits`.
    """
    if isinstance(source, dict):
        name = str(source.get("path") or "in memory")
        source = io.BytesIO(source["bytes"]) if source.get("bytes") else source.get("path")
        if not source:
            raise UnreadableImageError(name, "no image", "neither bytes nor a path")
    else:
        name = str(getattr(source, "filename", "") or repr(source))[:200]
    formats = None
    if not isinstance(source, (str, os.PathLike, io.BytesIO, Image.Image)):
        raise UnreadableImageError(name, "no image", f"it is a {type(source).__name__}")
    if is_url(source):
        source, formats = io.BytesIO(fetch(source, limits)), WEB_FORMATS
    elif isinstance(source, str) and source.lower().startswith("file:"):
        raise UnreadableImageError(name, "file: URLs are refused", "give a path for a local file")
    try:
        return _decode(source, name, limits, formats)
    except UnreadableImageError:
        raise
    except tuple(_REASONS) as error:
        reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        raise UnreadableImageError(name, reason, str(error)) from error


def _decode(source: Any, name: str, limits: ImageLimits, formats: Sequence[str] | None) -> Image.Image:
    image = source if isinstance(source, Image.Image) else Image.open(source, formats=formats)
    with nullcontext() if image is source else image:
        if image.width * image.height > limits.max_pixels:
            raise UnreadableImageError(name, "too many pixels", f"{image.width} x {image.height}")
        if max(image.size) > limits.max_aspect_ratio * min(image.size):
            raise UnreadableImageError(name, "too thin", f"{image.width} x {image.height}")
        return to_rgb(image)


__all__ = ["load_rgb_image", "to_rgb"]
