"""The notebook as it is stored: it can be read, its code compiles, its outputs are those of a whole run and of no
machine in particular. tests/apps/test_notebook.py runs it."""

import ast
import json
import re

import pytest

from tests.helpers.store_notebook import NOTEBOOK

MAX_BYTES = 400_000


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def code_cells(notebook) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def trees(code_cells) -> list[ast.Module]:
    """The cells' code, with `pass` where they call pip."""
    return [ast.parse(re.sub(r"^(\s*)%pip .*", r"\1pass", "".join(cell["source"]), flags=re.M)) for cell in code_cells]


def texts(code_cells) -> str:
    """What the cells printed or returned as text, and as HTML."""
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    shown = [value for output in outputs for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "".join("".join(value) for value in [*(output.get("text", "") for output in outputs), *shown])


def test_format(notebook):
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert NOTEBOOK.stat().st_size < MAX_BYTES


def test_nothing_of_the_machine_or_the_hour_is_stored(notebook, code_cells):
    assert not any(cell["metadata"] for cell in notebook["cells"])
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    told = texts(code_cells)
    assert not re.findall(r"""(?:^|[\s"'(=])(?:/\w|[A-Z]:\\|~/).*""", told)  # absolute paths
    assert not re.findall(r"localhost|\b\d+\.\d+\.\d+\.\d+\b|\w+@\w+\.\w+", told)  # hosts and users


def test_every_cell_was_run_once_in_order_without_an_error(code_cells):
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4


def test_what_it_says_of_recall_is_far_above_chance(code_cells):
    table = {name: [float(n) for n in re.findall(r"(\d+) %", rest)] for name, rest in
             re.findall(r"^(text_to_image|image_to_text|chance) (.*)$", texts(code_cells), re.M)}  # fmt: skip
    for direction in ("text_to_image", "image_to_text"):
        assert table[direction][1] > 4 * table["chance"][1]


def test_the_code_compiles_and_imports_public_names_alone(code_cells):
    for tree in trees(code_cells):
        compile(tree, NOTEBOOK.name, "exec")
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            assert not [name for name in names if name.startswith("_")]


def test_nothing_is_published_unless_asked_for(code_cells):
    """`push` without `--dry-run` stands behind `PUBLISH`, which is off."""
    sources = ["".join(cell["source"]) for cell in code_cells]
    assert any(re.search(r"^PUBLISH = False$", source, re.M) for source in sources)
    calls = [source for source in sources if re.search(r"^\s*push\(", source, re.M)]
    assert len(calls) == 2 and "--dry-run" in calls[0] and calls[1].startswith("if PUBLISH:\n    push(")


def test_links(notebook):
    markdown = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", markdown) if "://" not in target]
    assert targets and all((NOTEBOOK.parent / target).is_file() for target in targets)
