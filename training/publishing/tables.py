"""The table "paper | original code | ours", from stored results. Cells without a run stay empty."""

from typing import Any

from ..evaluation.vist import MASKS, PAPER
from .results import read_results

_TASKS = {"vist": "VIST, fifth image", "visdial": "VisDial"}
_SETTINGS = {"answers": "rank answers", "image_to_dialogue": "image to dialogue, 10 rounds"}
_PAPERS_MODEL = ("facebook/opt-6.7b", "openai/clip-vit-large-patch14", 1)
_DATA = {"vist": ["val.story-in-sequence.json"], "visdial": ["visdial_1.0_val.json"]}


def table() -> str:
    """The table in Markdown, with a note on its columns.

    Raises:
        ValueError: There are no stored results, which only a checkout has.
    """
    rows = ["| | | paper | original code | ours |", "|---|---|---|---|---|"]
    stored = read_results("published.json")
    if not stored:
        raise ValueError("The table is rendered from the repository's stored results: run this in a checkout.")
    published = stored[0]["rows"]
    results = [found for found in read_results("evaluate_*.json") if _is_of_the_papers_kind(found)]
    for row in published:
        who = "" if row["who"] == "ours" else ", CLIP ViT-L/14"
        name = f"{_TASKS[row['table']]}: {_SETTINGS.get(row['setting'], row['setting'])}{who}"
        paper = _cell(row.get("paper")) or (f"{_cell(row['quoted'])} *" if "quoted" in row else "")
        ours = "; ".join(cell for result in results if (cell := _our_cell(result, row)))
        metrics = " / ".join(row["metrics"])
        rows.append(f"| {name} | {metrics} | {paper} | {_cell(row.get('original code'))} | {ours} |")
    note = (
        "In per cent, OPT-6.7B and CLIP ViT-L/14, one visual token, validation sets (VisDial: 2,064 dialogues; VIST in "
        "the authors' notebook: 4,990 stories, 7,043 images). Original code: printed in the authors' notebooks. "
        "\\* As a later paper quotes it."
    )
    if not results:
        note += " The column of ours fills when a run with these models is stored in `training/results`; none is yet."
    return "\n".join([*rows, "", note])


def _is_of_the_papers_kind(results: dict[str, Any]) -> bool:
    """Whether a run has the paper's backbones, the whole validation set, and the paper's candidates."""
    model = results["model"]
    return (
        (model["language_model"], model["vision_model"], model["num_image_tokens"]) == _PAPERS_MODEL
        and [data["file"] for data in results["data"]][:1] == _DATA.get(results["table"])
        and results.get("masking", MASKS["shown"]) == MASKS["shown"]
        and results.get("dialogues", {}).get("sampled") is None
    )


def _our_cell(results: dict[str, Any], row: dict[str, Any]) -> str:
    if results["table"] != row["table"]:
        return ""
    found = {
        **results.get("settings", {}),
        "answers": results.get("answers", {}),
        "image_to_dialogue": results.get("retrieval", {}).get("10", {}).get("image_to_dialogue", {}),
    }
    metrics = found.get(row["setting"], {}).get(row["who"])
    if metrics is None or any(name not in metrics for name in row["metrics"]):
        return ""
    figures = _cell([100 * metrics[name] for name in row["metrics"]])
    note = "" if results["protocol"] == PAPER.name else f", {results['protocol']}"
    return f"{figures} (N = {metrics['N']:,}{note})"


def _cell(figures: list[float] | None) -> str:
    return " / ".join(f"{figure:.1f}" for figure in figures or [])
