"""Pictures on their way in and out: read within limits, shown as links, and known again where they come back."""

import base64
import io
import re
from collections.abc import Container
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from PIL import Image

from ..image_search_fromage import ImageIndex, Segment
from ..images_fromage import ImageLimits, is_url, load_rgb_image
from .errors import ApiError
from .guard import ApiKeys

_ROUTE = "/v1/images/"
_MOST_PIXELS = 1 << 20  # kept of a picture that is read, and sent of one that is shown
_LONGEST_FRAGMENT = 10_000  # characters
_LINK = re.compile(r"!\[[^\[\]\n]{0,200}\]\(([^()\s]+)\)")  # no name holds a bracket, so that a search is linear
_INLINE = re.compile(r"\(data:[^()\s]*\)")


def shrunk(image: Image.Image, shortest_side: int | None = None) -> Image.Image:
    """`image`, smaller where it has more than a million pixels, or its shorter side is longer than `shortest_side`:
    encoders see less, and many are in memory at once."""
    scale = (_MOST_PIXELS / (image.width * image.height)) ** 0.5
    if shortest_side is not None:
        scale = min(scale, shortest_side / min(image.size))
    if scale >= 1:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def text_length(text: str) -> int:
    """Characters of a text without the images in it that are `data:` URLs."""
    return len(text) - sum(len(match[0]) for match in _INLINE.finditer(text))


def read_picture(url: str, limits: ImageLimits, shortest_side: int | None = None) -> Image.Image:
    """The picture behind a `data:` or http(s) URL, [`shrunk`].

    Raises:
        ValueError: It cannot be read, or may not.
    """
    if not is_url(url):
        raise ValueError(f"An image is a data: or http(s) URL, got {url[:100]!r}.")
    if is_data_url(url):
        url = url.partition("#")[0]  # an answer's has a fragment
    return shrunk(load_rgb_image(url, limits), shortest_side)


def png_of(image: Image.Image) -> bytes:
    """`image` as PNG, [`shrunk`]."""
    shrunk(image).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """`image` as a `data:` URL, [`shrunk`]."""
    return f"data:image/png;base64,{base64.b64encode(png_of(image)).decode()}"


class Links:
    """Short links to images of the index, which the server answers and knows again.

    A link's fragment numbers the `[RET]` of its answer, so that an answer that comes back is read as it was written.

    Args:
        keys ([`ApiKeys`]): They sign links, since a browser sends no key for an image.
        base (`str`): The address that links begin with.
        index ([`ImageIndex`], *optional*): Only its images have links.
    """

    def __init__(self, keys: ApiKeys, base: str, index: ImageIndex | None):
        self.keys, self.base, self.index = keys, base.rstrip("/"), index

    def make(self, image_id: str) -> str:
        signature = f"?sig={self.keys.sign(image_id)}" if self.keys else ""
        return f"{self.base}{_ROUTE}{quote(image_id, safe='', errors='surrogatepass')}{signature}"

    def markdown(self, segment: Segment, inline: bool) -> str:
        """An image of an answer in Markdown, by its caption or else its id: a link, or all of it in a `data:` URL."""
        name = segment["metadata"].get("caption") or segment["id"]
        name = re.sub(r"[\[\]\\\s]+", " ", str(name)).strip()[:100]
        if inline and segment["image"] is not None:
            url = f"{data_url(segment['image'])}#id={quote(segment['id'], safe='')}&ret={segment['ret_index']}"
        else:
            url = f"{self.make(segment['id'])}#ret={segment['ret_index']}"
        return f"![{name}]({url})"

    def parse(self, url: str) -> dict[str, Any] | None:
        """The part of a message that a link stands for, if it is one of ours: an image that was shown already."""
        address, _, fragment = url.partition("#")
        told = {name: values[0] for name, values in parse_qs(fragment[:_LONGEST_FRAGMENT]).items()}
        start = self.base + _ROUTE
        if is_data_url(address):
            image_id = told.get("id")
        elif address.startswith(start):
            image_id = unquote(address.removeprefix(start).partition("?")[0], errors="surrogatepass")
        else:
            return None  # of another server
        if not image_id or not (isinstance(self.index, Container) and image_id in self.index):
            return None
        ret = told.get("ret", "0")
        return {"type": "image", "id": image_id, "ret_index": int(ret) if ret.isdecimal() and len(ret) < 6 else 0}

    def split(self, text: str) -> list[dict[str, Any]]:
        """An answer's text as parts: texts, and images in the place of our links. A space between two links of one
        `[RET]` is no text: [`ChatAnswer`] sets them apart by it."""
        parts: list[dict[str, Any]] = []
        end = 0
        for match in _LINK.finditer(text):
            if part := self.parse(match[1]):
                between = text[end : match.start()]
                is_same = bool(parts) and parts[-1]["type"] == "image" and parts[-1]["ret_index"] == part["ret_index"]
                parts += [{"type": "text", "text": "" if is_same and between == " " else between}, part]
                end = match.end()
        parts.append({"type": "text", "text": text[end:]})
        return [part for part in parts if part["type"] != "text" or part["text"]]

    def check(self, image_id: str, query: str) -> None:
        """Raise a 403 where links have signatures and this one has not."""
        signature = parse_qs(query).get("sig", [""])[0]
        if self.keys and not self.keys.is_signed(image_id, signature):
            raise ApiError(403, "This link to an image is not signed by the server. Take it from an answer as it is.")


def outgoing(segment: Segment, link: str, index: int) -> dict[str, Any]:
    """An image of an answer, as `message.images` and `delta.images` have it: with the link where it was not loaded.

    OpenAI's client puts the pieces of a stream together by `index`, the image's place in the answer.
    """
    image = segment["image"]
    return {
        "index": index,
        "type": "image_url",
        "image_url": {"url": link if image is None else data_url(image)},
        "id": segment["id"],
        "score": segment["score"],
        "ret_index": segment["ret_index"],
        "metadata": segment["metadata"],
        "link": link,
    }


__all__ = ["Links", "data_url", "is_data_url", "outgoing", "png_of", "read_picture", "shrunk", "text_length"]
