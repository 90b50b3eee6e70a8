"""Reading image files of every common kind as RGB."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image


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


def load_rgb_image(source: str | os.PathLike | Image.Image | dict[str, Any]) -> Image.Image:
    """Read a file, a PIL image or an undecoded `datasets` image (`{"bytes", "path"}`) as RGB.

    Raises:
        ValueError: The file is missing, truncated or no image; the message names it.
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        data = io.BytesIO(source["bytes"]) if isinstance(source, dict) and source["bytes"] else source
        with Image.open(data["path"] if isinstance(data, dict) else data) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = source["path"] if isinstance(source, dict) else getattr(source, "filename", "") or repr(source)
        raise ValueError(f"Cannot read the image {name}: {error}. Replace the file or leave it out.") from error


__all__ = ["load_rgb_image", "to_rgb"]
