"""docs/backbones.md is what the stored results of the matrix say."""

from tests.helpers.backbones_page import PAGE, page


def test_the_page_is_made_of_the_stored_results():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.helpers.backbones_page`"
