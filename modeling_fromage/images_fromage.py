"""Reading images of every common kind as RGB, within limits on what an image may cost."""

import contextlib
import io
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

# What Pillow raises for reasons other than a broken file; the first class that fits counts.
_REASONS = {
    FileNotFoundError: "not found",
    UnidentifiedImageError: "no image",
    Image.DecompressionBombError: "too many pixels",
    Image.DecompressionBombWarning: "too many pixels",
    MemoryError: "out of memory",
}
_PIXELS_AT_ONCE = 50_000_000  # decoded by all threads of a process together
_STRIP_PIXELS = 1 << 20  # converted at a time: some conversions take 24 bytes a pixel


@dataclass(frozen=True)
class ImageLimits:
    """Limits on what an image may cost.

    Attributes:
        timeout: Seconds for a whole download, redirects included.
        max_bytes: Size of a downloaded file.
        max_pixels: Width times height. Decoding takes up to 20 bytes a pixel; all threads together decode no more than
            50 million pixels at a time, and an image of more than that by itself.
        max_aspect_ratio: The longer side over the shorter: resizing the shorter one blows a thin image up.
        formats: Formats that are decoded, by Pillow's names, whatever a file is called and wherever it comes from.
            Pillow reads others (`"JPEG2000"`, `"TGA"`, or `"HEIF"` with the pillow-heif plugin); for `"EPS"` it
            starts Ghostscript.
        allow_private_addresses: Whether a host may be this machine or one of its network (loopback, 10.0.0.0/8, the
            cloud's metadata service, ...).
    """

    timeout: float = 10.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_aspect_ratio: float = 100.0
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM")
    allow_private_addresses: bool = False


DEFAULT_LIMITS = ImageLimits()


def printable(text: str) -> str:
    """`text` with control characters, line breaks and invalid Unicode as backslash escapes, so that an untrusted name
    cannot write lines of its own into a log or a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UnreadableImageError(ValueError):
    """An image that cannot be read; `reason` says why in a few words, the same for the same cause."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        self.name, self.reason, self.detail = name, reason, detail
        detail = f" ({detail})" if detail else ""
        super().__init__(printable(f"Cannot read the image {name}: {reason}{detail}. Replace it or leave it out."))


def is_url(source: object) -> bool:
    """Whether `source` is a web address or a `data:` URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "data:"))


class _PixelBudget:
    """Admits threads in order of arrival while their images together have at most `most` pixels.

    An image of more than `most` waits for all others and is then decoded alone.
    """

    def __init__(self, most: int):
        self.most = most
        self.reset()

    def reset(self) -> None:
        self._free, self._turn, self._changed = self.most, threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self.most)
        with self._turn, self._changed:  # a waiting thread keeps its turn, so that small images never starve it
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = _PixelBudget(_PIXELS_AT_ONCE)
if hasattr(os, "register_at_fork"):  # a child lacks the threads that hold pixels or a lock
    os.register_at_fork(after_in_child=_budget.reset)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to RGB, upright.

    Its EXIF orientation is applied, transparent pixels become white, 16-bit and float images are scaled to 8 bits, and
    an animation gives its first frame. (PIL's own conversions make transparency black and clip 16 bits.)
    """
    return _turned(*_converted(image))


def load_rgb_image(
    source: str | os.PathLike | Image.Image | dict[str, Any], limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Read an image as RGB, upright.

    Args:
        source: A file, a URL (`http`, `https`, `data`), a PIL image, or an undecoded `datasets` image
            (`{"bytes": ..., "path": ...}`).
        limits ([`ImageLimits`]): What reading it may cost.

    Raises:
        UnreadableImageError: A `ValueError` that names the image: it is missing, truncated, not an image, not a regular
            file, or exceeds one of `limits`.
    """
    opened: Any = source
    if isinstance(source, dict):
        name = str(source.get("path") or "in memory")
        opened = source["bytes"] if source.get("bytes") else source.get("path")
        if not opened:
            raise UnreadableImageError(name, "no image", "neither bytes nor a path")
        if isinstance(opened, (bytes, bytearray, memoryview)):
            opened = io.BytesIO(opened)
    else:
        name = str(getattr(source, "filename", "") or repr(source))[:200]
    if not isinstance(opened, (str, os.PathLike, io.BytesIO, Image.Image)):
        raise UnreadableImageError(name, "no image", f"it is a {type(opened).__name__}")
    if isinstance(opened, str) and is_url(opened):
        opened = io.BytesIO(_fetch(opened, name, limits))
    elif isinstance(opened, str) and opened.lower().startswith("file:"):
        raise UnreadableImageError(name, "file: URLs are refused", "give a path for a local file")
    try:
        return _decode(opened, name, limits)
    except UnreadableImageError:
        raise
    # Pillow's decoders raise whatever the bytes of a broken or hostile file lead them to: IndexError, struct.error,
    # KeyError, ZeroDivisionError, ... All of it means that this image cannot be read, and nothing about others.
    except Exception as error:
        reason = next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "broken")
        detail = str(error) or type(error).__name__
        if reason == "no image":
            detail = f"of {', '.join(limits.formats)}; `ImageLimits(formats=...)` allows others"
        raise UnreadableImageError(name, reason, detail) from error


def _fetch(url: str, name: str, limits: ImageLimits) -> bytes:
    """Fetch a URL by the installed package: checkpoints do not carry the code that fetches."""
    try:
        from modeling_fromage.images_fromage import UnreadableImageError as PackageError
        from modeling_fromage.io.fetching import fetch
    except ImportError as error:
        raise UnreadableImageError(
            name, "not fetched", "install the `modeling-fromage` package to read URLs, or download the image"
        ) from error
    try:
        return fetch(url, limits)
    except UnreadableImageError:
        raise
    except PackageError as error:  # another class than this one where this is a checkpoint's code
        raise UnreadableImageError(name, error.reason, error.detail) from error


def _decode(source: Any, name: str, limits: ImageLimits) -> Image.Image:
    if isinstance(source, Image.Image):
        # Its owner may only have opened it; then it is decoded here.
        is_undecoded = isinstance(source, ImageFile.StubImageFile) or bool(getattr(source, "tile", None))
        kind = "JPEG" if source.format == "MPO" else source.format  # a JPEG with more pictures after the first
        if is_undecoded and kind not in limits.formats:
            advice = f"{kind} is none of {', '.join(limits.formats)}; `image.load()` before makes it your choice"
            raise UnreadableImageError(name, "no image", advice)
        opened: contextlib.AbstractContextManager[Image.Image] = contextlib.nullcontext(source)
    else:
        if not isinstance(source, io.BytesIO) and not stat.S_ISREG(os.stat(source).st_mode):  # a FIFO blocks, say
            raise UnreadableImageError(name, "not a regular file")
        opened = Image.open(source, formats=limits.formats)
    with opened as image:
        _check_size(image, name, limits)
        with _budget.of(image.width * image.height):
            rgb, orientation = _converted(image)
            _check_size(rgb, name, limits)  # a decoder may find another size than the header gives
    del opened, image, source  # frees the source's pixels, if nobody else holds them
    return _turned(rgb, orientation)


def _check_size(image: Image.Image, name: str, limits: ImageLimits) -> None:
    size = f"{image.width} x {image.height}"
    if image.width * image.height > limits.max_pixels:
        raise UnreadableImageError(name, "too many pixels", size)
    if max(image.size) > limits.max_aspect_ratio * min(image.size):
        raise UnreadableImageError(name, "too thin", size)


def _converted(image: Image.Image) -> tuple[Image.Image, int]:
    """`image` as RGB, as stored, and its EXIF orientation.

    It is converted a strip at a time, so that the memory needed besides the two images does not grow with them.
    """
    if image.tell():  # the number of frames is not asked for: Pillow reads them all to know it
        image.seek(0)
    image.load()
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    boxes = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    is_deep = image.mode.startswith("I") or image.mode == "F"
    white = _white_level(image, boxes) if is_deep else None
    if len(boxes) == 1:
        rgb = _convert_strip(image, white)
    else:
        rgb = Image.new("RGB", image.size)
        for box in boxes:
            rgb.paste(_convert_strip(image.crop(box), white), box)
    rgb.info = {}  # the orientation among it
    return rgb, _orientation(image)


def _white_level(image: Image.Image, boxes: list[tuple[int, int, int, int]]) -> float:
    """The value that becomes 255 in a 16-bit or float image, which does not say: 1, 255 or 65535, by its brightest
    pixel."""
    brightest = max(np.asarray(image.crop(box)).max() for box in boxes)
    return 1.0 if image.mode == "F" and brightest <= 1.0 else 65535.0 if brightest > 255 else 255.0


def _convert_strip(strip: Image.Image, white: float | None) -> Image.Image:
    if white is not None:
        pixels = np.asarray(strip).astype(np.float64)
        strip = Image.fromarray((pixels.clip(0, white) * (255.0 / white)).astype(np.uint8))
    if strip.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in strip.info:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return strip.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The orientation of a photo by EXIF or XMP; 1 is as stored."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # raised by Pillow's parsers; a photo with a damaged EXIF block is still a photo
        return 1


def _turned(rgb: Image.Image, orientation: int) -> Image.Image:
    if orientation != 1:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


__all__ = [
    "DEFAULT_LIMITS",
    "ImageLimits",
    "UnreadableImageError",
    "is_url",
    "load_rgb_image",
    "printable",
    "to_rgb",
]
