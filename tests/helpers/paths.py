"""Where the repository and the fixtures are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PARITY = FIXTURES / "parity"
IMAGES = PARITY / "common" / "images"
