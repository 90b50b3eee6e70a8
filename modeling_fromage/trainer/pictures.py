"""Sheets of pictures and texts, drawn with Pillow alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

_SIZE, _LINE, _GAP = 14, 20, 8  # of the font, of a line, between cells, in pixels


class Word(NamedTuple):
    """A text on a coloured ground; one that is `"\\n"` ends the line."""

    text: str
    ground: str | None = None


@dataclass
class Cell:
    """A picture, and words below it."""

    picture: Image.Image | None = None
    words: Sequence[Word] = field(default_factory=list)


def words_of(text: str, ground: str | None = None) -> list[Word]:
    """The words of a text, and the end of its line."""
    return [*(Word(word + " ", ground) for word in text.split()), Word("\n")]


def draw_sheet(titles: Sequence[str], rows: Sequence[Sequence[Cell]], widths: Sequence[int]) -> Image.Image:
    """Cells in rows and columns.

    Args:
        titles (`Sequence[str]`): One above each column.
        rows (`Sequence[Sequence[Cell]]`): As many cells each.
        widths (`Sequence[int]`): Of the columns, in pixels; pictures are scaled to fit.
    """
    rows = [[Cell(words=words_of(title)) for title in titles], *rows]
    heights = [max(_height(cell, width) for cell, width in zip(row, widths, strict=True)) + _GAP for row in rows]
    lefts, tops = (list(accumulate(sizes, initial=0)) for sizes in ((w + _GAP for w in widths), heights))
    sheet = Image.new("RGB", (lefts[-1] + _GAP, tops[-1] + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops, strict=False):
        pen.line((0, top, sheet.width, top), fill="lightgrey")
        for cell, left, width in zip(row, lefts, widths, strict=False):
            _draw(sheet, pen, cell, (left + _GAP, top + _GAP // 2), width)
    return sheet


def _draw(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, corner: tuple[int, int], width: int) -> None:
    left, top = corner
    if cell.picture is not None:
        picture = _fitted(cell.picture, width)
        sheet.paste(picture, corner)
        top += picture.height
    for line, words in enumerate(_lines(cell.words, width)):
        for word, x in words:
            place = (left + x, top + line * _LINE)
            if word.ground is not None:
                end = (place[0] + _font().getlength(word.text), place[1] + _LINE - 3)
                pen.rectangle((*place, *end), fill=word.ground)
            pen.text((place[0], place[1] + 1), word.text, fill="black", font=_font())


def _height(cell: Cell, width: int) -> int:
    picture = 0 if cell.picture is None else _fitted(cell.picture, width).height
    return picture + _LINE * len(_lines(cell.words, width))


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    return ImageOps.contain(picture.convert("RGB"), (width, width))


def _lines(words: Sequence[Word], width: int) -> list[list[tuple[Word, float]]]:
    """Words with their places from the left, line by line; what is too long for a line is cut."""
    lines: list[list[tuple[Word, float]]] = [[]]
    x = 0.0
    for word in words:
        if word.text == "\n":
            lines.append([])
            x = 0.0
            continue
        while _font().getlength(word.text) > width:
            word = word._replace(text=word.text[: max(1, len(word.text) - 4)] + "…")
        length = _font().getlength(word.text)
        if x + length > width:
            lines.append([])
            x = 0.0
        lines[-1].append((word, x))
        x += length + (2 if word.ground else 0)
    return lines if lines[-1] else lines[:-1]


@cache
def _font() -> Any:
    """matplotlib's font, where that is installed, since it has most alphabets; else Pillow's."""
    package = find_spec("matplotlib")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), _SIZE)
    return ImageFont.load_default(_SIZE)


__all__ = ["Cell", "Word", "draw_sheet", "words_of"]
