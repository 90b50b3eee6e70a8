"""The Markdown pages: their snippets, commands, tables and links."""

import re
import shlex
from pathlib import Path

from tests.helpers.paths import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BACKBONES = {"openai/clip-vit-base-patch32": "vision_model", "facebook/opt-125m": "language_model"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each line of the page's shell blocks."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def links(page: str) -> list[Path]:
    """The files that the page links to."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    return [(ROOT / page).parent / target for target in targets if "://" not in target]


def with_tiny_backbones(text: str, folder: Path) -> str:
    """`text` with folders of tiny backbones in place of the Hub ids that pages name."""
    for name, part in BACKBONES.items():
        text = text.replace(name, str(folder / part))
    text = text.replace("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "local-dir:open_clip_vit")
    return text
