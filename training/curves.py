"""A plot of a run's curves: losses, accuracies and recall, learning rate."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILE = "curves.png"
_LOSSES = ("loss", "captioning_loss", "ret_token_loss", "contrastive_loss")
_SHARES = ("text_to_image_accuracy", "image_to_text_accuracy")
_RECALL = ("eval_text_to_image_R@1", "eval_image_to_text_R@1", "eval_text_to_image_R@10", "eval_image_to_text_R@10")
# Each panel's title and its curves.
PANELS = {
    "losses": (*_LOSSES, *(f"eval_{name}" for name in _LOSSES)),
    "accuracy in the batch, and recall among all held-out pairs": (*_SHARES, *_RECALL),
    "learning rate": ("learning_rate",),
}


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each curve that a log has, by name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for name in (name for names in PANELS.values() for name in names if name in entry):
            steps, values = found.setdefault(name, ([], []))
            if not steps or steps[-1] < entry["step"]:  # the best model is evaluated again at the end
                steps.append(entry["step"])
                values.append(float(entry[name]))
    return found


def plot_curves(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `curves.png` of a log into `folder`, where matplotlib is installed and there is anything to plot."""
    found = curves(history)
    if not found:
        return
    if find_spec("matplotlib") is None:
        logger.info("The curves are not plotted: pip install matplotlib.")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 11), layout="constrained")
    panels = {title: [name for name in names if name in found] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    for axes, (title, names) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name in names:
            steps, values = found[name]
            is_held_out = name.startswith("eval_")
            style = "--" if is_held_out else "-"
            color = f"C{list(_LOSSES).index(name.removeprefix('eval_'))}" if name.endswith("loss") else None
            axes.plot(steps, values, style, color=color, marker="o" if is_held_out or len(steps) == 1 else None,
                      markersize=4, label=name)  # fmt: skip
        axes.set(title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FILE, dpi=110)
