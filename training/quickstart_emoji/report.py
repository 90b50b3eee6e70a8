"""The quickstart's report: an HTML page, a PNG, and a summary for the terminal."""

import base64
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jinja2 import Environment, StrictUndefined

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)
from matplotlib.figure import SubFigure  # noqa: E402

from modeling_fromage.images_fromage import load_rgb_image  # noqa: E402

from .data import Split  # noqa: E402
from .emoji import CREDITS  # noqa: E402
from .held_out import KS  # noqa: E402

TITLES = {
    "redrawn": "known things, in drawings by a hand that training never saw draw them",
    "new": "things that training never saw at all",
    "held out": "pictures that training never saw",
}
Points = tuple[torch.Tensor, torch.Tensor]  # embeddings of images and of their texts, (N, q) each
_SHOWN = 12
_RATES = tuple(f"R@{k}" for k in KS)
_TEMPLATE = Path(__file__).parent / "report.html.jinja"


def summary(results: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{results['steps']} joint steps, {results['seconds'] / 60:.1f} minutes in all"]
    for name, test in results["tests"].items():
        lines.append(f"{name} ({TITLES[name]}): N = {test['num_pairs']}")
        for title, key in _rows(test):
            lines.append(f"  {title}: " + ", ".join(f"{k} {rate(test[key], k)}" for k in _RATES))
        lines.append(
            f"  caption loss a token: {test['caption_loss']:.2f}, "
            f"with shuffled images {test['caption_loss_shuffled_images']:.2f}"
        )
        if "caption_words" in test:
            lines.append(
                f"  captions with a word of the name or a keyword: {test['caption_words']:.0%}, "
                f"dealt to other pictures {test['caption_words_dealt_to_others']:.0%}"
            )
    if told := verdict(results):
        lines.append(told)
    for answer in results["prompts"]:
        lines.append(f"  {answer['prompt']} -> {', '.join(answer['names'])}")
    for turn in results["conversation"]:
        shown = f" [shows: {turn['image_caption']}, ret_bias {turn['ret_bias']}]" if "image_caption" in turn else ""
        given = "<image> " if turn["role"] == "user" and "image" in turn else ""
        lines.append(f"  {turn['role']:>5}: {given}{turn['text']}{shown}")
    where = results["output_dir"]
    lines += [
        f"Report: {where}/report.html and {where}/report.png; model: {where}/model; image index: {where}/index.",
        'Try next: make quickstart ARGS=\'--prompts "a birthday cake" "a dog"\', or --data with your own images.',
    ]
    return "\n".join(lines)


def verdict(results: dict[str, Any]) -> str:
    """How many of the twelve prompts, and of the hundred, did what they should; empty where they were not asked."""
    told = []
    judged = [answer for answer in results["prompts"] if "right" in answer]
    if judged:
        right = sum(any(answer["right"]) for answer in judged)
        told.append(f"{right} of {len(judged)} prompts of a person have a right picture among the first three.")
    if said := results.get("ret"):
        told.append(f"[RET] comes by itself for {said['num_with_ret']} of {said['num_prompts']} prompts.")
    return " ".join(told)


def rate(found: dict[str, Any], k: str) -> str:
    """A rate, with its 95 % interval where it has one."""
    told = f"{100 * found[k]:.1f} %"
    if "95%" in found:
        low, high = found["95%"][k]
        told += f" ({100 * low:.0f} to {100 * high:.0f})"
    return told


def _rows(test: dict[str, Any]) -> list[tuple[str, str]]:
    titles = {
        "text_to_image": "text to image",
        "image_to_text": "image to text",
        "sentences": "sentences of kinds never trained on, to image",
        "ceiling": "ceiling: the other hand's drawing as the query",
        "chance": "chance",
    }
    return [(title, key) for key, title in titles.items() if key in test]


def write(output: Path, results: dict[str, Any], splits: dict[str, Split], points: dict[str, Points]) -> None:
    """Write report.png, report.html and results.json into `output`.

    Args:
        splits: What each test is of.
        points: Embeddings of the images of each test, and of their captions.
    """
    results["output_dir"] = str(output)
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    _draw(output / "report.png", results)
    (output / "report.html").write_text(_page(output, results, splits, points), encoding="utf-8")


def _draw(path: Path, results: dict[str, Any]) -> None:
    figure = plt.figure(figsize=(14, 13), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.4, 1])
    _draw_prompts(top, results["prompts"][:12])
    curves, *bars = bottom.subplots(1, 1 + len(results["tests"]))
    history = [entry for entry in results["log_history"] if "contrastive_loss" in entry]
    for name in ("captioning_loss", "ret_token_loss", "contrastive_loss"):
        curves.plot([e["step"] for e in history], [e[name] for e in history], label=name.replace("_", " "), marker=".")
    curves.set(title="Losses of joint training", xlabel="step", ylim=(0, None))
    curves.legend()
    for axis, (name, test) in zip(bars, results["tests"].items(), strict=True):
        kinds = [(title, key) for title, key in _rows(test) if key != "sentences"]
        for i, (title, key) in enumerate(kinds):
            heights = [100 * test[key][k] for k in _RATES]
            axis.bar([x + 0.2 * i for x in range(3)], heights, width=0.18, label=title.split(":")[0])
        axis.set_xticks([x + 0.3 for x in range(3)], _RATES)
        axis.set(title=f"{name}: recall among {test['num_pairs']} (%)", ylim=(0, 100))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_prompts(figure: SubFigure, answers: list[dict[str, Any]]) -> None:
    rows = (len(answers) + 1) // 2
    axes = figure.subplots(rows, 8, width_ratios=[2.4, 1, 1, 1] * 2, squeeze=False)
    for number, answer in enumerate(answers):
        text, *pictures = axes[number % rows][4 * (number // rows) :][:4]
        text.text(1, 0.5, f"“{answer['prompt']}”", ha="right", va="center", fontsize=12)
        for axis, file, right in zip(pictures, answer["images"], answer.get("right", [False] * 3), strict=False):
            image = load_rgb_image(file)
            axis.imshow(image)
            if right:
                frame = plt.Rectangle((0, 0), image.width - 1, image.height - 1, fill=False)
                frame.set(edgecolor="green", linewidth=4)
                axis.add_patch(frame)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("What it shows for prompts; what counts as right, written down beforehand, has a green frame")


def examples(count: int) -> list[int]:
    """Rows of evenly spaced examples: by this rule, not by result."""
    return list(range(0, count, max(1, count // _SHOWN)))[:_SHOWN]


def places(images: torch.Tensor, texts: torch.Tensor) -> list[list[tuple[float, float]]]:
    """Where the map shows the embeddings (N, q) of images, and those of their texts: two principal components of both
    about their own means, by rank, in per cent."""
    rows = torch.cat([each.float() - each.float().mean(0) for each in (images, texts)])
    _, _, axes = torch.pca_lowrank(rows, q=2, niter=10)
    ranks = (rows @ axes).argsort(dim=0).argsort(dim=0)
    found = [(x, y) for x, y in (96 * ranks / max(1, len(rows) - 1)).tolist()]
    return [found[: len(images)], found[len(images) :]]


def _page(output: Path, results: dict[str, Any], splits: dict[str, Split], points: dict[str, Points]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    environment.globals.update(
        rate=rate, rows_of=_rows, examples=examples, titles=TITLES, rates=_RATES, verdict=verdict(results),
        credits=CREDITS, places={name: places(*both) for name, both in points.items()},
    )  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(results=results, splits=splits, figure=output / "report.png")


def _data_uri(path: str | Path) -> str:
    """A PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
