"""Evaluate a FROMAGe model on the paper's tasks: `python -m training.evaluate TASK MODEL --data ... --images ...`.

Writes results with their provenance as JSON, beside a manifest of the images and texts that were actually used.
"""

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.io.command_line import at_least, command_parser, device_option, dtype_option, errors_in_one_line

from .evaluation import EVALUATORS
from .evaluation.dual_encoder import DualEncoder
from .evaluation.evaluator import Evaluator
from .publishing.provenance import digest_of, provenance
from .publishing.results import render_pages, results_file, write_results
from .publishing.tables import table

OUTPUT = Path("outputs/evaluate")


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for evaluator in EVALUATORS:
        summary = (evaluator.__doc__ or "").partition("\n")[0]
        one = tasks.add_parser(evaluator.name, help=summary, description=summary)
        one.set_defaults(evaluator=evaluator)
        _add_shared_options(one)
        evaluator.add_options(one)
        if evaluator.protocols:
            one.add_argument(
                "--protocol",
                choices=list(evaluator.protocols),
                default=next(iter(evaluator.protocols)),
                help="the authors' scripts with their quirks, or without them (docs/differences.md)",
            )
    tasks.add_parser("render", help="write the tables of the pages from the results in training/results")
    return parser


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a FROMAGe model")
    parser.add_argument("--output", type=results_file, help=f"JSON file; by default {OUTPUT}/TASK[_PROTOCOL].json")
    parser.add_argument(
        "--dual-encoder",
        nargs="?",
        const="",
        metavar="NAME",
        help="a CLIP or SigLIP model as baseline; without NAME the one whose image half is the model's vision tower",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=32,
        help="images or texts per batch; answers are ranked one dialogue at a time",
    )
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=dtype_option, help="of the backbones; by default as stored")


def load_dual_encoder(name: str | None, model: FromageForConditionalGeneration) -> DualEncoder | None:
    """The baseline of this name; for an empty name, the model that the vision tower comes from."""
    if name is None:
        return None
    revision = None
    if not name:
        name, revision = model.config.vision_model_id, model.config.vision_model_revision
    if not name or model.config.vision_model_library != "transformers":
        raise ValueError("The vision tower's own text encoder is not known here. Name a baseline: --dual-encoder NAME.")
    return DualEncoder.from_pretrained(name, revision, model.device, model.vision_model.dtype)


def make_evaluator(
    options: argparse.Namespace, dual_encoder: DualEncoder | None, scores: Path
) -> tuple[Evaluator, dict[str, Any]]:
    """The evaluation that the options select, and those options as strings for the results file."""
    names = {field.name for field in fields(options.evaluator)}
    given = {name: value for name, value in vars(options).items() if name in names and name != "dual_encoder"}
    arguments = dict(given)
    if options.evaluator.protocols:
        arguments["protocol"] = options.evaluator.protocols[options.protocol]
    words = {name: str(value) for name, value in given.items() if value is not None and name != "images"}
    return options.evaluator(dual_encoder=dual_encoder, scores=scores, **arguments), words


def run(options: argparse.Namespace, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one evaluation; returns the results with their provenance, and the manifest.

    Scores that take long are kept in a file beside `output`.

    Raises:
        ValueError: Data, images or model cannot be used.
    """
    start = time.monotonic()
    dtype = {"dtype": options.dtype} if options.dtype else {}
    model = FromageForConditionalGeneration.from_pretrained(options.model, **dtype).eval().to(options.device)
    processor = FromageProcessor.from_pretrained(options.model)
    processor.check_config(model.config)
    dual_encoder = load_dual_encoder(options.dual_encoder, model)
    evaluator, words = make_evaluator(options, dual_encoder, output.with_suffix(".scores.jsonl"))
    evaluation = evaluator.run(model, processor)
    config = model.config
    facts = {
        "table": options.task,
        "protocol": getattr(options, "protocol", None),
        **evaluation.results,
        "primary_metric": {
            evaluator.primary_metric: evaluator.metrics(evaluation.results).get(evaluator.primary_metric)
        },
        "model": {
            "name": options.model,
            "fingerprint": model.retrieval_fingerprint(),
            "language_model": config.text_model_id,
            "vision_model": config.vision_model_id,
            "num_image_tokens": config.num_image_tokens,
            "dtype": str(model.language_model.dtype),
        },
        "dual_encoder": None
        if dual_encoder is None
        else {"name": dual_encoder.model.name_or_path, "texts_cut": dual_encoder.truncated},
        "data": [{"file": path.name, "sha256": digest_of(path)} for path in evaluator.data_files if path.is_file()],
        "options": words,
        "seconds": time.monotonic() - start,
        **provenance(torch.device(options.device).type),
    }
    return facts, evaluation.manifest


def summary(results: dict[str, Any], sections: list[str]) -> str:
    """Results as lines of text: each group of figures, then what they were computed on."""
    lines = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict) and any(isinstance(part, float) for part in value.values()):
            figures = [f"{key} {_figure(part)}" for key, part in value.items() if isinstance(part, (int, float))]
            lines.append(f"{name}: {', '.join(figures)}")
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}, {key}" if name else key, part)

    for part in sections:
        if part in results:
            walk("" if part == "settings" else part, results[part])
    for part in ("denominator", "gallery", "masking", "images", "stories", "dialogues", "left_out"):
        if results.get(part):
            lines.append(f"{part}: {results[part]}")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        if options.task == "render":
            return render_pages("evaluate", [table()], by="training.evaluate")
        protocol = getattr(options, "protocol", None)
        output = options.output or OUTPUT / f"{options.task}{f'_{protocol}' if protocol else ''}.json"
        results, manifest = run(options, output)
        manifest_path = output.with_suffix(".manifest.json")
        write_results(manifest_path, manifest)
        write_results(output, {**results, "manifest": {"file": manifest_path.name, "sha256": digest_of(manifest_path)}})
        print(f"{summary(results, list(options.evaluator.sections))}\nWrote {output} and {manifest_path}.")


if __name__ == "__main__":
    main()
