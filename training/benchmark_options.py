"""Measure what options of training are worth: `python -m training.benchmark_options LM VISION --pairs NAME=TRAIN ...`.

Each option is trained with several seeds beside the plain model, for as many steps and for as long, and tested on what
was held out. The results so far are written after each run.
"""

import argparse
import logging

from modeling_fromage.io.command_line import at_least, command_parser, dtype_option, errors_in_one_line

from .benchmarks import options as study
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    plan = study.Plan()
    parser.add_argument("language_model", help="Hub id or folder of a causal language model")
    parser.add_argument("vision_model", help="Hub id or folder of a vision encoder")
    parser.add_argument(
        "--pairs", nargs="*", default=[], metavar="NAME=TRAIN[,HELD_OUT]", help="captioned images; see --help of "
        "benchmark-warm-start",
    )  # fmt: skip
    parser.add_argument("--documents", nargs="*", default=[], metavar="NAME=TRAIN,TEST", help="tables of documents")
    parser.add_argument("--options", nargs="*", choices=list(study.OPTIONS), default=list(study.OPTIONS))
    parser.add_argument(
        "--minutes", type=at_least(0, float), default=plan.minutes, help="of the plain model's training"
    )
    parser.add_argument("--seeds", type=at_least(1), default=plan.seeds)
    parser.add_argument("--batch-size", type=at_least(2), default=plan.batch_size)
    parser.add_argument("--documents-batch-size", type=at_least(1), default=plan.documents_batch_size)
    parser.add_argument("--learning-rate", type=at_least(0, float), default=plan.learning_rate)
    parser.add_argument("--warm-start-steps", type=at_least(1), default=plan.warm_start_steps)
    parser.add_argument("--warm-start-learning-rate", type=at_least(0, float), default=plan.warm_start_learning_rate)
    parser.add_argument("--max-length", type=at_least(4), default=plan.max_length)
    parser.add_argument("--max-document-length", type=at_least(8), default=plan.max_document_length)
    parser.add_argument("--max-queries", type=at_least(1), default=plan.max_queries)
    parser.add_argument("--dtype", type=dtype_option, help="of the frozen models; float32 by default")
    add_output_option(parser, "options_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        if not options.pairs + options.documents:
            raise ValueError("Name data: --pairs NAME=TRAIN, --documents NAME=TRAIN,TEST.")
        plan = study.Plan(
            options.minutes, options.seeds, options.batch_size, options.documents_batch_size, options.learning_rate,
            options.warm_start_steps, options.warm_start_learning_rate, options.max_length,
            options.max_document_length, options.max_queries, str(options.dtype or "float32").removeprefix("torch."),
        )  # fmt: skip
        sets = [study.read_pairs(*_named(given)) for given in options.pairs]
        sets += [study.read_document_sets(*_named(given)) for given in options.documents]
        backbones = options.vision_model, options.language_model
        for results in study.measure(backbones, sets, options.options, plan):
            write_results(options.output, results)
        print(study.table(results))


def _named(given: str) -> tuple[str, str]:
    name, _, source = given.partition("=")
    if not source:
        raise ValueError(f"Data are named as NAME=TRAIN[,HELD_OUT], got {given!r}.")
    return name, source


if __name__ == "__main__":
    main()
