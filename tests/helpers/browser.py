"""The browser that the tests of the page drive: `python -m tests.helpers.browser` prints where it is, or fails."""

import shutil
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Chromium or Chrome of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


if __name__ == "__main__":
    found = find_browser()
    print(found or f"There is none of {', '.join(NAMES)}.")
    sys.exit(found is None)
