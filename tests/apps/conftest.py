"""`make test-apps` runs these, in an environment that has Gradio; elsewhere they are left out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("gradio") else ["test_*.py"]
