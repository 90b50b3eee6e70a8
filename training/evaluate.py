"""Evaluate a FROMAGe model on the paper's tasks: `python -m training.evaluate TASK MODEL --data ... --images ...`.

    vist      contextual image retrieval from Visual Storytelling's SIS files and a folder of photos (by Flickr id)
    visdial   Visual Dialog 1.0: ranking of answers, and retrieval between images and dialogues
    captions  captioning, perplexity and retrieval on COCO's caption files, or on a table, folder or dataset of pairs
    render    write the README's table from the results in training/results

Results are written as JSON, with what they were made from, beside a manifest of the images and texts that were really
used.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.io.command_line import at_least, device_option, dtype_option, errors_in_one_line

from .evaluation import captioning, visdial, vist
from .evaluation.dual_encoder import DualEncoder
from .publishing.provenance import digest_of, provenance
from .publishing.results import render_pages, results_file, write_results
from .publishing.tables import table

OUTPUT = Path("outputs/evaluate")
_OF_THE_COMMAND = {"task", "model", "output", "dual_encoder", "device", "dtype"}  # what no evaluation takes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("model", metavar="MODEL", help="folder or Hub id of a FROMAGe model")
    shared.add_argument("--output", type=results_file, help=f"JSON file; by default {OUTPUT}/TASK[_PROTOCOL].json")
    shared.add_argument(
        "--dual-encoder",
        nargs="?",
        const="",
        metavar="NAME",
        help="a CLIP or SigLIP model as baseline; without NAME the one whose image half is the model's vision tower",
    )
    shared.add_argument(
        "--batch-size",
        type=at_least(1),
        default=32,
        help="images or texts at a time; answers are ranked a dialogue at a time",
    )
    shared.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    shared.add_argument("--dtype", type=dtype_option, help="of the backbones; by default what they are stored in")
    protocol = argparse.ArgumentParser(add_help=False)
    protocol.add_argument(
        "--protocol",
        choices=sorted(vist.PROTOCOLS),
        default="paper",
        help="the authors' scripts with their quirks, or without them (docs/differences.md)",
    )

    one = tasks.add_parser("vist", parents=[shared, protocol], help=vist.__doc__.partition("\n")[0])
    one.add_argument("--data", type=Path, nargs="+", required=True, help="val.story-in-sequence.json, ...")
    one.add_argument("--images", type=Path, required=True, help="folder of photos, named by their Flickr ids")
    one.add_argument("--download", action="store_true", help="fetch photos that are missing into that folder")
    one.add_argument("--mask", choices=sorted(vist.MASKS), default="shown", help="images that are no candidates")

    one = tasks.add_parser("visdial", parents=[shared, protocol], help=visdial.__doc__.partition("\n")[0])
    one.add_argument("--data", type=Path, required=True, help="visdial_1.0_val.json")
    one.add_argument("--dense", type=Path, help="visdial_1.0_val_dense_annotations.json, for NDCG")
    one.add_argument("--images", type=Path, required=True, help="folder VisualDialog_val2018")
    one.add_argument("--tasks", nargs="+", choices=visdial.TASKS, default=visdial.TASKS)
    one.add_argument("--rounds", type=int, nargs="+", default=list(range(1, visdial.ROUNDS + 1)), metavar="N",
                     help="retrieval from the first N rounds, for each N; by default 1 to 10")  # fmt: skip
    one.add_argument(
        "--sample", type=at_least(1), metavar="N", help="take N dialogues, always the same, to try things out"
    )

    one = tasks.add_parser("captions", parents=[shared], help=captioning.__doc__.partition("\n")[0])
    one.add_argument("--data", required=True, help="captions_val2014.json; or a table, folder or dataset of pairs")
    one.add_argument("--images", type=Path, help="folder of COCO's images")
    one.add_argument("--split", default="validation", help="of a dataset")
    one.add_argument("--tasks", nargs="+", choices=captioning.TASKS, default=captioning.TASKS)
    one.add_argument("--caption-prefix", help="text between image and caption, by default as in training")
    one.add_argument("--caption-suffix", help="text that ends a caption, by default as in training")
    one.add_argument("--max-length", type=int, help="tokens of a caption that is read, by default as in training")
    one.add_argument("--max-new-tokens", type=at_least(1), default=32, help="tokens of a caption that is written")

    tasks.add_parser("render", help="write the README's table from the results in training/results")
    return parser


def load_dual_encoder(options: argparse.Namespace, model: FromageForConditionalGeneration) -> DualEncoder | None:
    if options.dual_encoder is None:
        return None
    name, revision = options.dual_encoder, None
    if not name:
        name, revision = model.config.vision_model_id, model.config.vision_model_revision
    if not name:
        raise ValueError("It is not known where the vision tower came from: name the baseline, --dual-encoder NAME.")
    return DualEncoder.from_pretrained(name, revision, options.device, model.vision_model.dtype)


def run(options: argparse.Namespace, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One evaluation; results with their provenance, and the manifest. What takes long is kept beside `output`.

    Raises:
        ValueError: Data, images or model cannot be used.
    """
    start = time.monotonic()
    dtype = {"dtype": options.dtype} if options.dtype else {}
    model = FromageForConditionalGeneration.from_pretrained(options.model, **dtype).eval().to(options.device)
    processor = FromageProcessor.from_pretrained(options.model)
    processor.check_config(model.config)
    dual_encoder = load_dual_encoder(options, model)
    arguments = {name: value for name, value in vars(options).items() if name not in _OF_THE_COMMAND}
    if options.task == "visdial":
        arguments["scores"] = output.with_suffix(".scores.jsonl")
    evaluate = {"vist": vist, "visdial": visdial, "captions": captioning}[options.task].evaluate
    folder = arguments.pop("images")
    results, manifest = evaluate(model, processor, folder=folder, dual_encoder=dual_encoder, **arguments)
    config = model.config
    facts = {
        "table": options.task,
        "protocol": getattr(options, "protocol", None),
        **results,
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
        "data": [{"file": path.name, "sha256": digest_of(path)} for path in _files(options)],
        "options": {name: str(value) for name, value in arguments.items() if value is not None},
        "seconds": time.monotonic() - start,
        **provenance(torch.device(options.device).type),
    }
    return facts, manifest


def _files(options: argparse.Namespace) -> list[Path]:
    data = options.data if isinstance(options.data, list) else [options.data]
    paths = [Path(path) for path in [*data, getattr(options, "dense", None)] if path is not None]
    return [path for path in paths if path.is_file()]


def main(argv: list[str] | None = None):
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        _main(options)


def _main(options: argparse.Namespace):
    if options.task == "render":
        render_pages("evaluate", [table()], by="training.evaluate")
        return
    protocol = getattr(options, "protocol", None)
    output = options.output or OUTPUT / f"{options.task}{f'_{protocol}' if protocol else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results, manifest = run(options, output)
    manifest_path = output.with_suffix(".manifest.json")
    write_results(manifest_path, manifest)
    write_results(output, {**results, "manifest": {"file": manifest_path.name, "sha256": digest_of(manifest_path)}})
    print(summary(results))
    print(f"Wrote {output} and {manifest_path}.")


def summary(results: dict[str, Any]) -> str:
    """Results in lines to read: each group of figures, and what they are of."""
    lines = []

    def walk(name: str, value: Any):
        if isinstance(value, dict) and any(isinstance(part, float) for part in value.values()):
            figures = [f"{key} {_figure(part)}" for key, part in value.items() if isinstance(part, (int, float))]
            lines.append(f"{name}: {', '.join(figures)}")
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}, {key}" if name else key, part)

    for part in ("settings", "answers", "retrieval", "captions", "perplexity"):
        if part in results:
            walk("" if part == "settings" else part, results[part])
    for part in ("denominator", "gallery", "masking", "images", "stories", "dialogues", "left_out"):
        if results.get(part):
            lines.append(f"{part}: {results[part]}")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    main()
