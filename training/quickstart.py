"""Train a small FROMAGe on emoji, test it on emoji it never saw, talk with it, and write a report.

Run it with `make quickstart`. Packages from the Python Package Index are all it needs; `--language-model` and
`--vision-model` take any Hub id or folder instead, `--data` a folder or TSV of captioned images.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .arguments import parse_config
from .config import CONFIGS
from .publishing.provenance import provenance
from .quickstart_emoji import report
from .quickstart_emoji.conversation import converse, load_pipeline
from .quickstart_emoji.data import encode, make_index, prepare
from .quickstart_emoji.fitting import fast_dtype, fit
from .quickstart_emoji.held_out import evaluate, search_texts
from .train import assemble, describe_parameters, make_collator

CONFIG = CONFIGS / "quickstart.yaml"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train, evaluate, save, and write a report; returns what `results.json` holds."""
    start = time.monotonic()
    set_seed(0)
    parse_config(str(CONFIG), options.overrides)  # refuses a wrong key now, before minutes of preparation
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"This takes about {options.train_minutes + 3:.0f} minutes on two CPU cores; a report follows in {output}.")
    sources = prepare(output, options.language_model, options.vision_model, options.data)
    backbones = [f"language_model={sources.language_model}", f"vision_model={sources.vision_model}"]
    model_args, data_args, args = parse_config(
        str(CONFIG), [*backbones, f"output_dir={output / 'model'}", *options.overrides]
    )
    processor, model = assemble(model_args, text_dtype=fast_dtype(), vision_dtype=torch.float32)
    print(f"{type(model.language_model).__name__} in {model.language_model.dtype}. {describe_parameters(model)}.")

    train = encode(sources.train, model, processor, output / "images" / "train")
    held_out = encode(sources.held_out, model, processor, output / "images" / "held_out")
    collator = make_collator(processor, data_args, args.seed)
    trainer = fit(model, collator, args, train, held_out, 60 * options.train_minutes)
    results = evaluate(model, processor, collator, trainer, held_out)
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    index, image_root = make_index(model, [train, held_out])
    index.save_pretrained(output / "index")

    # From here on with what a user would load.
    pipe = load_pipeline(output, image_root, model.language_model.dtype)
    gallery, _ = make_index(pipe.model, [held_out])
    results["rankings"] = search_texts(pipe.model, pipe.processor, held_out.captions, gallery, top_k=5)
    results["conversation"] = converse(pipe, held_out, options.prompts or report.DEFAULT_PROMPTS)
    results["seconds"] = time.monotonic() - start
    results |= provenance("cpu")
    report.write(output, results, held_out.images, held_out.captions)
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--language-model", help="Hub id or folder of a causal language model")
    parser.add_argument("--vision-model", help="Hub id or folder of a vision encoder")
    parser.add_argument("--data", help="TSV file or folder of captioned images")
    parser.add_argument("--output-dir", default="outputs/quickstart")
    parser.add_argument(
        "--train-minutes", type=at_least(0, float), default=5.0, help="about how long to train, 300 steps at most"
    )
    parser.add_argument("--prompts", nargs="*", help="texts to be answered with an image")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"replaces a key of {CONFIG.name}")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        print(report.summary(run(options)))


if __name__ == "__main__":
    main()
