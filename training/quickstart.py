"""Train a small FROMAGe on emoji, test it on drawings and things that it never saw, talk with it, and write a report.

Run it with `make quickstart`. Packages from the Python Package Index are all it needs; `--language-model` and
`--vision-model` take any Hub id or folder instead, `--data` a folder or TSV of captioned images.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .arguments import parse_config
from .benchmarks.timing import fastest_dtype
from .config import CONFIGS
from .publishing.provenance import provenance
from .quickstart_emoji import report
from .quickstart_emoji.conversation import converse, load_pipeline
from .quickstart_emoji.data import encode, make_index, prepare
from .quickstart_emoji.fitting import fit
from .quickstart_emoji.held_out import HeldOutTest, drawings_of_the_other_hand
from .quickstart_emoji.prompts import PROMPTS
from .quickstart_emoji.views import training_rows
from .train import assemble, describe_parameters, make_collator

CONFIG = CONFIGS / "quickstart.yaml"
SAID_IN_CONVERSATION = ["a slice of pizza", "I love you", "a cat", "the moon at night"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train, evaluate, save, and write a report; returns what `results.json` holds."""
    start = time.monotonic()
    _, _, args = parse_config(str(CONFIG), options.overrides)  # refuses a wrong key now, not after minutes
    set_seed(args.seed)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"This takes about {options.train_minutes + 5:.0f} minutes on two CPU cores; a report follows in {output}.")
    sources = prepare(output, options.language_model, options.vision_model, options.data, options.part)
    own = [f"language_model={sources.language_model}", f"vision_model={sources.vision_model}"]
    own += [f"output_dir={output / 'model'}", f"ret_state_cache={output / 'ret_states'}"]
    if options.language_model:
        own.append("text_embed_layers=[-1]")  # those of the file are of SmolLM2
    model_args, data_args, args = parse_config(str(CONFIG), [*own, *options.overrides])
    dtype = fastest_dtype()
    processor, model = assemble(model_args, dtype=dtype)
    print(f"{type(model.language_model).__name__} in {model.language_model.dtype}. {describe_parameters(model)}.")

    def encoded(name: str, dataset: Any) -> Any:
        return encode(dataset, model, processor, output / "images" / name)

    train = encoded("train", sources.train)
    held_out = {name: encoded(name.replace(" ", "_"), dataset) for name, dataset in sources.held_out.items()}
    ceilings = {name: encoded(name, drawings_of_the_other_hand(split)) for name, split in held_out.items()
                if sources.emoji}  # fmt: skip
    collator = make_collator(processor, data_args, args.seed)
    rows = training_rows(sources.emoji, train, args.seed) if sources.emoji else train.dataset()
    trainer = fit(model, collator, args, rows, 60 * options.train_minutes)
    test = HeldOutTest(model, processor, collator, sources.emoji)
    tests = {name: test.evaluate(split, ceilings.get(name)) for name, split in held_out.items()}
    trainer.save_metrics("all", figures_of(tests), combined=False)  # for the model card
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    index, image_root = make_index(model, [train, *held_out.values()])
    index.save_pretrained(output / "index")
    results = {"tests": tests, "steps": trainer.state.global_step, "log_history": trainer.state.log_history}

    # From here on with what a user would load.
    pipe = load_pipeline(output, image_root, dtype)
    test = HeldOutTest(pipe.model, pipe.processor, collator, sources.emoji)
    points = {}
    for name, split in held_out.items():
        gallery, _ = make_index(pipe.model, [split])
        results["tests"][name]["rankings"] = test.search(split.captions, gallery, top_k=5)
        points[name] = gallery.embeds, test.text_embeds(split.captions)
    prompts = options.prompts or (list(PROMPTS) if sources.emoji else next(iter(held_out.values())).captions[:12])
    results["prompts"] = test.answer_prompts(prompts, pipe.index)
    if sources.emoji:
        results["ret"] = test.says_ret(held_out["redrawn"].captions)
    said = options.prompts or SAID_IN_CONVERSATION
    results["conversation"] = converse(pipe, next(iter(held_out.values())), said)
    results["seconds"] = time.monotonic() - start
    results |= provenance("cpu")
    report.write(output, results, held_out, points)
    return results


def figures_of(tests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of tests, by test and kind."""
    kinds = ("num_pairs", "text_to_image", "image_to_text", "sentences", "caption_loss", "caption_words")
    return {name: {kind: test[kind] for kind in kinds if kind in test} for name, test in tests.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--language-model", help="Hub id or folder of a causal language model")
    parser.add_argument("--vision-model", help="Hub id or folder of a vision encoder")
    parser.add_argument("--data", help="TSV file or folder of captioned images")
    parser.add_argument(
        "--part", choices=("test", "validation"), default="test", help="which of the held-out emoji to test it on"
    )
    parser.add_argument("--output-dir", default="outputs/quickstart")
    parser.add_argument(
        "--train-minutes",
        type=at_least(0, float),
        default=1.5,
        help="about how long to train jointly, 240 steps at most",
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
