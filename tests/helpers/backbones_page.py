"""docs/backbones.md, written from what the tests of the matrix have found: `python -m tests.helpers.backbones_page`."""

from tests.helpers.backbone_table import Row, stored
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "backbones.md"

INTRODUCTION = """\
# Backbones

Which language models and vision encoders work? The rule: a pair is right in every stage, or it is refused when it is
assembled, with the reason and what to do. Nothing in between.

No list of names decides. A backbone is asked by trying, on a copy with few layers and large random weights, when a
model is assembled or when an ability is first needed. So a model that is not below, or one of your own, is judged by
the same rule.

The tables are what the tests have found with transformers {version}; `make test-vision` runs them anew, and a model
type without a row fails there. Each test takes a tiny random model of its type with a CLIP, or a vision encoder with an
OPT and a Llama, and compares with the backbone itself: one text at a time, no padding, no cache, `[RET]` a row of the
language model's own matrices. The stages: assembly from live models and from folders, losses and gradients (ordinary
and large weights, padding on either side, unequal lengths), a training step that moves the adapter alone, generation
with and without a cache, scoring of candidates, saving and loading to the bit.

| | exact | refused |
|---|---|---|
{counts}
"""

LANGUAGE = """\
## Language models

Every model type that `AutoModelForCausalLM` takes. The training step is *packed* (several texts share a row; texts
before `[RET]` run without gradient), *grouped* (texts of like length in a batch, the same saving for `[RET]`), or
*ordinary* (groups of like length, whole texts with gradient); the note says why it is not packed. Generation uses a
cache where the model continues from one as from the whole text, and runs the whole text anew where it does not. The
last column bounds the relative differences of losses and gradients, and names the precision that the kernels take.
"""

MULTIMODAL = """\
## Language models within multimodal models

`text_model_name_or_path` may name a multimodal checkpoint, and `language_model` may be a live one. Its decoder and head
become the causal language model of its text configuration, if its logits of text alone are that model's. What has none
by itself is refused; then take the language model that it was built from (Qwen2.5 for Qwen2.5-VL, say).
"""

VISION = """\
## Vision encoders

Every model type of `MODEL_MAPPING` whose main input is `pixel_values`, and the vision half of every image-text model:
of a live one, of a folder with the whole model, of a configuration. `vision_pooling` makes one vector of an image; what
an encoder has not is refused. An encoder is refused where it needs more than pixel values, where an image's features
change from call to call or with the images beside it, or where there is no vector for each image. The last column
bounds the relative difference between features of a batch and of each image by itself.
"""


def page() -> str:
    kinds = {"Language models": "language_models", "Multimodal models, as a language model": "multimodal_models",
             "Vision encoders": "vision_models"}  # fmt: skip
    counts = [f"| {title} | {count(kind, 'exact')} | {count(kind, 'refused')} |" for title, kind in kinds.items()]
    parts = [INTRODUCTION.format(version=version(), counts="\n".join(counts)), LANGUAGE]
    parts.append(table("language_models", "exact", exact_language_model, LANGUAGE_COLUMNS))
    parts.append(table("language_models", "refused", refused, REFUSED_COLUMNS))
    parts.append(MULTIMODAL)
    parts.append(table("multimodal_models", "exact", text_part, ["model type", "text part"]))
    parts.append(table("multimodal_models", "refused", refused, REFUSED_COLUMNS[:2]))
    if stored("vision_models"):
        parts.append(VISION)
        parts.append(table("vision_models", "exact", exact_vision_model, VISION_COLUMNS))
        parts.append(table("vision_models", "refused", refused, REFUSED_COLUMNS))
    return "\n".join(parts)


def version() -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return next(line.partition("==")[2] for line in lines if line.startswith("transformers=="))


def count(kind: str, result: str) -> int:
    return sum(row["result"] == result for row in stored(kind).values())


def table(kind, result, cells, columns: list[str]) -> str:
    rows = {model_type: row for model_type, row in stored(kind).items() if row["result"] == result}
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join([f"`{model_type}`", *cells(row)]) + " |" for model_type, row in rows.items()]
    return f"### {result.capitalize()}: {len(rows)}\n\n" + "\n".join(lines) + "\n"


LANGUAGE_COLUMNS = ["model type", "class", "training step", "generation", "note", "differences"]
VISION_COLUMNS = ["model type", "class", "`vision_pooling`", "difference"]
REFUSED_COLUMNS = ["model type", "message", "shown by that model alone"]


def exact_language_model(row: Row) -> list[str]:
    exponent = f"{row['within']:.0e}".replace("e-0", "e-")
    return [f"`{row['text_part']}`", row["training"], row["generation"], row["why"], f"< {exponent}, {row['dtype']}"]


def refused(row: Row) -> list[str]:
    why = row["why"].replace("|", "\\|")
    return [why, row["shown"]] if "shown" in row else [why]


def text_part(row: Row) -> list[str]:
    return [f"`{row['text_part']}`"]


def exact_vision_model(row: Row) -> list[str]:
    return [f"`{row['class']}`", row["poolings"], f"< {row['within']:.0e}".replace("e-0", "e-")]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
