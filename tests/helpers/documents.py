"""The pages that tests read."""

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
