"""The quickstart's report: an HTML page, a PNG, and a summary for the terminal."""

import base64
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)
from jinja2 import Environment, StrictUndefined  # noqa: E402
from matplotlib.figure import SubFigure  # noqa: E402

from modeling_fromage.images_fromage import load_rgb_image  # noqa: E402

DEFAULT_PROMPTS = ["slice of pizza", "moon", "red heart", "cat"]
_SHOWN = 12
_KS = ("R@1", "R@5", "R@10")
_TEMPLATE = Path(__file__).parent / "report.html.jinja"


def summary(results: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    t2i, i2t, chance = results["text_to_image"], results["image_to_text"], results["chance"]
    low, high = t2i["R@1_95%"]
    minutes = results["seconds"] / 60
    lines = [
        f"{results['num_pairs']} held-out pairs, {results['steps']} steps, {minutes:.1f} minutes in all",
        *(f"  {k}: text to image {t2i[k]:.1%}, image to text {i2t[k]:.1%} (chance {chance[k]:.1%})" for k in _KS),
        f"  text-to-image R@1, 95 % interval: {low:.1%} to {high:.1%}",
        f"  caption loss a token: {results['caption_loss']:.2f}, "
        f"with shuffled images {results['caption_loss_shuffled_images']:.2f}",
    ]
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


def write(output: Path, results: dict[str, Any], images: list[str], captions: list[str]) -> None:
    """Write report.png, report.html and results.json into `output`."""
    results["output_dir"] = str(output)
    _draw(output / "report.png", results, images, captions)
    (output / "report.html").write_text(_page(output, results, images, captions), encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")


def _draw(path: Path, results: dict[str, Any], images: list[str], captions: list[str]) -> None:
    figure = plt.figure(figsize=(14, 11), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 2])
    curves, bars = top.subplots(1, 2)
    history = [entry for entry in results["log_history"] if "contrastive_loss" in entry]
    for name in ("captioning_loss", "ret_token_loss", "contrastive_loss"):
        curves.plot([e["step"] for e in history], [e[name] for e in history], label=name.replace("_", " "))
    curves.set(title="Training losses", xlabel="step", ylim=(0, None))
    curves.legend()
    for i, (name, values) in enumerate(
        [
            ("text to image", results["text_to_image"]),
            ("image to text", results["image_to_text"]),
            ("chance", results["chance"]),
        ]
    ):
        bars.bar([x + 0.27 * i for x in range(3)], [100 * values[k] for k in _KS], width=0.25, label=name)
    bars.set_xticks([x + 0.27 for x in range(3)], _KS)
    bars.set(title=f"Recall among {results['num_pairs']} emoji never seen in training (%)")
    bars.legend()
    _draw_grid(bottom, results, images, captions)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_grid(figure: SubFigure, results: dict[str, Any], images: list[str], captions: list[str]) -> None:
    shown = _examples(results, images)[:6]
    axes = figure.subplots(6, 6, width_ratios=[2.6, 1, 1, 1, 1, 1])
    for row, i in zip(axes, shown, strict=False):
        row[0].text(1, 0.5, f"“{captions[i]}” →", ha="right", va="center", fontsize=11)
        for axis, path in zip(row[1:], results["rankings"][i], strict=False):
            image = load_rgb_image(path)
            axis.imshow(image)
            if path == images[i]:
                frame = plt.Rectangle((0, 0), image.width - 1, image.height - 1, fill=False)
                axis.add_patch(frame)
                frame.set(edgecolor="green", linewidth=4)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("Held-out emoji found by their names; the right one has a green frame")


def _examples(results: dict[str, Any], images: list[str]) -> list[int]:
    """Rows of evenly spaced examples, not selected by result."""
    step = max(1, len(images) // _SHOWN)
    return list(range(0, len(images), step))[:_SHOWN]


def _page(output: Path, results: dict[str, Any], images: list[str], captions: list[str]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        results=results,
        ks=_KS,
        shown=_examples(results, images),
        images=images,
        captions=captions,
        figure=output / "report.png",
    )


def _data_uri(path: str | Path) -> str:
    """A PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
