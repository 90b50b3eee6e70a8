"""Fetch transformers' own common tests, of the installed version, from its source distribution.

They lie beside the installed packages, as the package `transformers_tests`, and are no part of this repository. The
distribution lacks the tests of generation and of export that they build on, which are empty here
(`tests/model/test_generation.py` stands for the first), and a helper that downloads media, in whose place stands one of
our images.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

ROOT = Path(sys.prefix) / f"transformers-{transformers.__version__}-tests"
_IMAGE = Path(__file__).parents[1] / "fixtures" / "parity" / "common" / "images" / "img_000.png"
_STUBS = {
    "transformers_tests/__init__.py": "",
    "transformers_tests/exporters/__init__.py": "",
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "transformers_tests/generation/__init__.py": "",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "transformers_tests/utils/__init__.py": "",
    "transformers_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fetch_hub_objects_for_ci.py": f"def url_to_local_path(url, *args, **kwargs):\n    return {str(_IMAGE)!r}\n",
}


def fetch() -> Path:
    """Download once; returns the folder to put on `sys.path`."""
    if ROOT.is_dir():
        return ROOT
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory(dir=sys.prefix) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
        subprocess.run([*command, "--no-binary", "transformers", requirement, "-d", temporary], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        staging = Path(temporary) / "staging"
        with tarfile.open(archive) as tar:
            top = archive.name.removesuffix(".tar.gz")
            tar.extractall(staging, [m for m in tar if m.name.startswith(f"{top}/tests/")], filter="data")
        (staging / top / "tests").rename(staging / "transformers_tests")
        (staging / top).rmdir()
        for name, text in _STUBS.items():
            path = staging / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        staging.rename(ROOT)
    return ROOT


if __name__ == "__main__":
    fetch()
