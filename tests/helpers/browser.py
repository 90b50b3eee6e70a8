"""The browser that the tests of the page drive. `python tests/helpers/browser.py` fails where there is none.

It needs the standard library alone, since CI asks before there is an environment.
"""

import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """A Chromium or Chrome of this machine that starts."""
    return next((path for path in map(shutil.which, NAMES) if path and _starts(path)), None)


def _starts(path: str) -> bool:
    """Some systems have a script of that name that only says how to install one."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


if __name__ == "__main__":
    sys.exit(None if find_browser() else f"There is none of {', '.join(NAMES)}.")
