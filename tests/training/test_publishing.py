"""What is published: results files, where they come from, and the tables that are rendered from them."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.evaluation import read
from tests.helpers.paths import ROOT
from training.evaluation import vist
from training.publishing import results as stored_results
from training.publishing import tables as table

PAGES = [page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]


def test_readme_table_is_rendered(tmp_path, monkeypatch):
    page = next(text for text in PAGES if "<!-- evaluate: rendered by training.evaluate -->" in text)
    assert stored_results.replace_between(page, "evaluate", [table.table()], "training.evaluate") == page
    published = read(stored_results.STORED / "published.json")["rows"]
    assert len(published) == 8
    rendered = table.table()
    stored = list(stored_results.STORED.glob("evaluate_*.json"))
    cells = [line.split("|")[-2].strip() for line in rendered.splitlines()[2:10]]
    assert any(cells) == bool(stored)  # nothing stands there without a run

    metrics = {"R@1": 0.183, "R@5": 0.4, "R@10": 0.5, "N": 4990, "MRR": 0.22, "NDCG": 0.166}
    model = {"language_model": "facebook/opt-6.7b", "vision_model": "openai/clip-vit-large-patch14",
             "num_image_tokens": 1}  # fmt: skip
    sis, visual = [{"file": "val.story-in-sequence.json"}], [{"file": "visdial_1.0_val.json"}]
    of_vist = {"table": "vist", "protocol": "paper", "model": model, "data": sis, "masking": vist.MASKS["shown"]}
    other = {"settings": {"1 caption": {"ours": {**metrics, "N": 1}}}}
    (tmp_path / "published.json").write_text(json.dumps({"rows": published}), encoding="utf-8")
    for name, result in {
        "a": {**of_vist, "settings": {"5 captions + 4 images": {"ours": metrics}}},
        "b": {"table": "visdial", "protocol": "corrected", "model": model, "data": visual,
              "answers": {"ours": metrics}},
        # Not of the paper's kind:
        "c": {**of_vist, **other, "model": {**model, "language_model": "another"}},
        "d": {**of_vist, **other, "model": {**model, "num_image_tokens": 4}},
        "e": {**of_vist, **other, "masking": vist.MASKS["none"]},
        "f": {**of_vist, **other, "data": [{"file": "test.story-in-sequence.json"}]},
        "g": {"table": "visdial", "protocol": "paper", "model": model, "data": visual,
              "dialogues": {"sampled": 1}, "answers": {"ours": {**metrics, "N": 1}}},
    }.items():  # fmt: skip
        (tmp_path / f"evaluate_{name}.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(stored_results, "STORED", tmp_path)
    rendered = table.table()
    assert "| 18.2 / 42.7 / 51.8 | 18.3 / 40.0 / 50.0 (N = 4,990) |" in rendered
    assert "16.6 / 22.0 / 18.3 / 40.0 / 50.0 (N = 4,990, corrected) |" in rendered and "(N = 1)" not in rendered


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


WHERE = """
import json
from training.publishing.provenance import checkout, provenance
from training.publishing.results import results_folder
found = provenance("cpu")
print(json.dumps([found["commit"], found["dirty"], str(checkout()), str(results_folder())]))
"""


def where(code, folder):
    run = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(code), str(ROOT)])},
    )  # fmt: skip
    return json.loads(run.stdout)


def test_git_facts_are_of_the_checkout_that_the_code_is_in(tmp_path):
    """Installed code has none, even where its environment lies below somebody's checkout."""
    code = tmp_path / "repository" / "environment"
    shutil.copytree(ROOT / "training" / "publishing", code / "training" / "publishing")
    (code / "training" / "__init__.py").touch()
    (code / "training" / "results").mkdir()
    assert where(code, code) == ["no repository", False, "None", "outputs/benchmarks"]
    git(tmp_path / "repository", "init")
    git(tmp_path / "repository", "commit", "--allow-empty", "-m", "a")
    assert where(code, code)[0] == "no repository"
    git(tmp_path / "repository", "add", "-A")
    git(tmp_path / "repository", "commit", "-m", "b")
    commit, _, root, results = where(code, code)
    assert len(commit) == 40 and root == str(tmp_path / "repository") and results == "training/results"
    assert where(code, tmp_path)[3] == "outputs/benchmarks"


def test_tables_go_between_their_marks(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    marks = "<!-- speed: rendered by a.b -->\nold\n<!-- end of speed -->"
    (tmp_path / "docs" / "page.md").write_text(f"Before.\n{marks}\nAfter.\n")
    (tmp_path / "README.md").write_text("No marks.\n")
    monkeypatch.setattr(stored_results, "checkout", lambda: tmp_path)
    stored_results.render_pages("speed", ["| new |"], by="a.b")
    expected = "Before.\n<!-- speed: rendered by a.b -->\n\n| new |\n\n<!-- end of speed -->\nAfter.\n"
    assert (tmp_path / "docs" / "page.md").read_text() == expected
    assert (tmp_path / "README.md").read_text() == "No marks.\n"
    with pytest.raises(ValueError, match="No page has the line <!-- other"):
        stored_results.render_pages("other", [], by="a.b")
    monkeypatch.setattr(stored_results, "checkout", lambda: None)
    with pytest.raises(ValueError, match="in a checkout"):
        stored_results.render_pages("speed", [], by="a.b")
