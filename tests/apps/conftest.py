"""`make test-apps` runs these, in an environment that has Gradio and Milvus; elsewhere they are left out."""

from importlib.util import find_spec
from pathlib import Path

NEEDED = {"test_milvus.py": "milvus_lite"}
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_*.py") if find_spec(NEEDED.get(path.name, "gradio")) is None
]
