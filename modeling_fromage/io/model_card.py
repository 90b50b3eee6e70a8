"""The model card: of a training run's folder, and of a repository on the Hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..adapter_fromage import trained_state
from ..configuration_fromage import FromageConfig
from ..images_fromage import printable

TEMPLATE = files(__package__) / "model_card_template.md"
RUN = "training_run.json"  # what a run trained on and how, beside its checkpoint
_NOT_THE_MODELS = ("_runtime", "_per_second", "total_flos", "epoch")  # endings of metrics that are not of the model
_NO_RESULTS = ("chance",)  # what answers by chance have
_RETRIEVAL = re.compile(r"(text_to_image|image_to_text)_R@(\d+)")
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass
class CardFacts:
    """What a card says that the model does not know.

    Attributes:
        results (`Mapping`): Metrics by name. Those of an evaluation, `eval_text_to_image_R@1` and the like, are listed
            in the model index too.
        run (`Mapping`): `data`, with `train` and `eval`, each a `name`, a `split`, and `on_hub`; and
            `hyperparameters`.
        data (`str`, *optional*): What the model was trained on, in words.
        datasets (`Sequence[str]`): Hub ids of the training data.
        license (`str`, *optional*): Of the trained parts.
        backbone_licenses (`Mapping`): Those of the `text` and the `vision` model, where they are known.
        adapter_dtype (`str`): Of the trained parts in the checkpoint.
        holds_backbones (`bool`): Whether the backbones are in the checkpoint.
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    backbone_licenses: Mapping[str, str | None] = field(default_factory=dict)
    adapter_dtype: str = "float32"
    holds_backbones: bool = False


def model_card(model: Any, processor: Any, repo_id: str, facts: CardFacts) -> ModelCard:
    """The card of `model`, from the template beside this file."""
    config = model.config
    roles = {"text": "language model", "vision": "vision encoder"}
    backbones = [
        _describe_backbone(config, prefix, role, facts.backbone_licenses.get(prefix)) for prefix, role in roles.items()
    ]
    trained_on = facts.run.get("data", {}).get("train") or []
    title = repo_id.rpartition("/")[2]
    results = eval_results(facts)
    data = ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[row["name"] for row in backbones if row["on_hub"]] or None,
        datasets=list(facts.datasets) or [each["name"] for each in trained_on if each["on_hub"]] or None,
        tags=["fromage", "image-retrieval", "arxiv:2301.13823"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    trained = sum(tensor.numel() for tensor in trained_state(model.adapter).values())
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        repo_id=repo_id,
        trained_parameters=f"{trained:,}",
        trained_megabytes=f"{trained * _DTYPE_BYTES[facts.adapter_dtype] / 1e6:.1f}",
        holds_backbones=facts.holds_backbones,
        backbones=backbones,
        license=facts.license or "not stated",
        prompt=json.dumps(processor.caption_prompt, ensure_ascii=False),
        stops=json.dumps(processor.caption_stop_strings, ensure_ascii=False),
        data=facts.data or ", ".join(facts.datasets) or named(trained_on) or "not stated",
        num_image_tokens=config.num_image_tokens,
        projection_dim=config.projection_dim,
        hyperparameters=[(_cell(name), _cell(value)) for name, value in facts.run.get("hyperparameters", {}).items()],
        evaluated_on=named(facts.run.get("data", {}).get("eval") or []),
        metrics=numbers(facts.results),
    )


def _describe_backbone(config: FromageConfig, prefix: str, role: str, license_: str | None) -> dict[str, Any]:
    name, on_hub = getattr(config, f"{prefix}_model_id"), is_on_hub(config, prefix)
    return {
        "role": role,
        "name": name if on_hub else getattr(config, f"{prefix}_config").model_type,
        "on_hub": on_hub,
        "revision": (getattr(config, f"{prefix}_model_revision") or "")[:8] or "-",
        "license": license_ or ("see there" if on_hub else "not stated"),
    }


def is_on_hub(config: FromageConfig, prefix: str) -> bool:
    """Whether a backbone (`text` or `vision`) is named by a Hub id."""
    name = getattr(config, f"{prefix}_model_id")
    return name is not None and not os.path.isdir(name)


def named(sources: Sequence[Mapping[str, Any]]) -> str:
    """Data sets in words."""
    told = [f"{each['name']} ({each['split']})" if each.get("split") else each["name"] for each in sources]
    return _cell(", ".join(told))


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """Recall and captioning loss of an evaluation, for the model index; none without the data set's name."""
    sources = facts.run.get("data", {}).get("eval") or []
    if len(sources) != 1:
        return []
    (source,) = sources
    pairs = facts.results.get("eval_num_pairs")
    found = []
    for key, value in facts.results.items():
        name = key.removeprefix("eval_")
        retrieval = _RETRIEVAL.fullmatch(name)
        if name == key or not (retrieval or name == "captioning_loss"):
            continue
        if retrieval and pairs and int(retrieval[2]) >= pairs:
            continue  # every model finds all of them
        among = f" among {pairs:,} pairs" if retrieval and pairs else ""
        found.append(
            EvalResult(
                task_type="image-text-retrieval" if retrieval else "image-to-text",
                task_name="Image-text retrieval" if retrieval else "Image captioning",
                dataset_name=source["name"],
                dataset_type=source["name"] if source["on_hub"] else re.sub(r"\W+", "-", source["name"]).lower(),
                dataset_split=source.get("split"),
                metric_type=f"recall_at_{retrieval[2]}" if retrieval else "loss",
                metric_name=f"{name}{among}",
                metric_value=value,
            )
        )
    return found


def numbers(results: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The numbers of results as cells of a Markdown table, nested names joined. Left out are lists (logs, captions),
    and levels of chance, which no model has reached."""
    rows: list[tuple[str, str]] = []
    for name, value in results.items():
        if name in _NO_RESULTS:
            continue
        if isinstance(value, Mapping):
            rows += numbers(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            rows.append((_cell(prefix + name), f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return rows


def of_the_model(results: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics that say something of the model, and not of a run's speed."""
    found = {name: value for name, value in results.items() if not name.endswith(_NOT_THE_MODELS)}
    return {name: value for name, value in found.items() if not name.startswith("bad_examples")}


def _cell(value: Any) -> str:
    """A text for a cell of a Markdown table."""
    return re.sub(r"[\\`*\[\]<>|]", r"\\\g<0>", printable(str(value)))
