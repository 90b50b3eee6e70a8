"""Turn an illustrated manual of HTML pages into documents: `python -m training.manual_pages FOLDER OUTPUT`.

A page's headings, paragraphs and pictures become a document in reading order; small pictures (icons) and those that
several pages show are left out. Pages that share a picture stay together, and a quarter of these groups is held out, by
a hash, so that no picture of the test is in training. GIMP's manual, for example, under the GNU Free Documentation
License, comes with Debian's package gimp-help-en: `dpkg-deb -x gimp-help-en_*.deb manual`, then
`python -m training.manual_pages manual/usr/share/gimp/2.0/help/en pages`.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_fromage.file_writing_fromage import replace_file
from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "li", "td", "th", "pre", "div"}  # which end a text
_NAVIGATION = ("navheader", "navfooter", "toc", "nav")
_WITHOUT_TEXT = {"script", "style", "head", "nav"}
_VOID = {"img", "br", "hr", "meta", "link", "input", "col"}
Part = dict[str, Any]


class _Page(HTMLParser):
    """The texts and pictures of a page in reading order."""

    def __init__(self, path: Path):
        super().__init__()
        self.parts: list[Part] = []
        self.path, self._text, self._open, self._skipped = path, "", [], 0
        self.feed(path.read_text(encoding="utf-8", errors="replace"))
        self.close()
        self._end_text()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in _BLOCKS or tag == "img":
            self._end_text()
        if tag == "img" and given.get("src") and not self._skipped:
            self.parts.append({"type": "image", "image": str((self.path.parent / str(given["src"])).resolve())})
        if tag in _VOID:
            return
        is_skipped = tag in _WITHOUT_TEXT or any(name in (given.get("class") or "").split() for name in _NAVIGATION)
        self._open.append((tag, is_skipped))
        self._skipped += is_skipped

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._end_text()
        if any(tag == known for known, _ in self._open):
            while True:
                known, was_skipped = self._open.pop()
                self._skipped -= was_skipped
                if known == tag:
                    return

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text += data

    def _end_text(self) -> None:
        text, self._text = " ".join(self._text.split()), ""
        if text:
            self.parts.append({"type": "text", "text": f"{text}\n"})


def read_pages(folder: Path, min_size: int = 64, max_repeats: int = 2) -> dict[Path, list[Part]]:
    """The parts of each page that has a picture with something before it.

    Args:
        min_size: Pixels of a picture's shorter side; smaller ones are left out.
        max_repeats: Pages that may show a picture; one that more show is left out.
    """
    pages = {path: _Page(path).parts for path in sorted(folder.rglob("*.htm*"))}
    digests: dict[str, str | None] = {}
    shown_on: dict[str, set[Path]] = defaultdict(set)
    for path, parts in pages.items():
        for image in (part["image"] for part in parts if part["type"] == "image"):
            if image not in digests:
                digests[image] = _digest(Path(image), min_size)
            if (digest := digests[image]) is not None:
                shown_on[digest].add(path)
    kept = {digest for digest, where in shown_on.items() if len(where) <= max_repeats}
    found = {}
    for path, parts in pages.items():
        parts = [
            part if part["type"] == "text" else {**part, "digest": digests[part["image"]]}
            for part in parts
            if part["type"] == "text" or digests[part["image"]] in kept
        ]
        if any(part["type"] == "image" for part in parts[1:]):
            found[path] = parts
    return found


def _digest(path: Path, min_size: int) -> str | None:
    """What tells a picture from others; `None` of one that is too small, or none."""
    try:
        with Image.open(path) as image:
            if min(image.size) < min_size:
                return None
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def split_pages(pages: dict[Path, list[Part]], test_share: float = 0.25) -> tuple[list[Path], list[Path]]:
    """Pages to train and to test on; those that share a picture are on one side."""
    group = {path: path for path in pages}
    first: dict[str, Path] = {}

    def root(path: Path) -> Path:
        while group[path] != path:
            path = group[path]
        return path

    for path, parts in pages.items():
        for part in parts:
            if part["type"] == "image":
                group[root(path)] = root(first.setdefault(part["digest"], path))
    sides: tuple[list[Path], list[Path]] = ([], [])
    for path in pages:
        number = int.from_bytes(hashlib.sha256(root(path).name.encode()).digest()[:8]) / 2**64
        sides[number < test_share].append(path)
    return sides


def in_pieces(parts: list[Part], max_characters: int) -> Iterator[list[Part]]:
    """A page in documents of about so many characters, cut between parts, each with a picture."""
    piece: list[Part] = []
    size = 0
    for part in [*parts, None]:
        length = len(part.get("text", "")) if part else 0
        has_picture = any(each["type"] == "image" for each in piece)
        if part is None or (has_picture and size + length > max_characters):
            if has_picture:
                yield piece
            piece, size = [], 0
        if part is not None:
            text = {"text": part["text"][:max_characters]} if part["type"] == "text" else {"image": part["image"]}
            piece.append({"type": part["type"], **text})
            size += length


def write_documents(output: Path, documents: list[list[Part]]) -> int:
    """One a line; returns the number of pictures."""
    lines = [json.dumps({"document": document}, ensure_ascii=False) + "\n" for document in documents]
    replace_file(output, "".join(lines).encode())
    return sum(part["type"] == "image" for document in documents for part in document)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="of HTML pages")
    parser.add_argument("output", type=Path, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--max-characters", type=at_least(100), default=1600, help="of a training document")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        pages = read_pages(options.folder)
        if not pages:
            raise ValueError(f"{options.folder} has no HTML pages with pictures.")
        options.output.mkdir(parents=True, exist_ok=True)
        for name, side in zip(("train", "test"), split_pages(pages), strict=True):
            whole = [pages[path] for path in side]
            size = options.max_characters if name == "train" else 10**9
            documents = [piece for parts in whole for piece in in_pieces(parts, size)]
            pictures = write_documents(options.output / f"{name}.jsonl", documents)
            print(f"{name}: {len(side)} pages, {len(documents)} documents, {pictures} pictures")


if __name__ == "__main__":
    main()
