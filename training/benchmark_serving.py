"""Load a server, then attack it: `python -m training.benchmark_serving MODEL --index INDEX`.

It starts `fromage serve` as a process, asks every prompt by itself, then from many clients at once, with and without
images, whole and streamed, and compares answers, speed and memory. Then clients that are slow, leave, send 50 MB or
broken images, ask for too much, or only open connections, beside good ones. In the end the server is killed and started
again.
"""

import argparse
import logging

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import serving
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--index", required=True, help="image index: a folder or a Hub id")
    parser.add_argument("--image-root", help="folder of the index's pictures")
    parser.add_argument("--clients", type=at_least(1), default=32)
    parser.add_argument("--minutes", type=at_least(0.0, float), default=10.0, help="of load")
    parser.add_argument("--hostile-minutes", type=at_least(0.0, float), default=1.0)
    parser.add_argument("--connections", type=at_least(0), default=10_000, help="that are opened and ask for nothing")
    parser.add_argument("--prompts", type=at_least(2), default=32, help="different ones; every other has an image")
    parser.add_argument("--max-tokens", type=at_least(1), default=32, help="of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    add_output_option(parser, "serving_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        plan = serving.Plan(
            options.model, options.index, options.image_root, options.clients, options.minutes * 60,
            options.hostile_minutes * 60, options.connections, options.prompts, options.max_tokens, options.seed,
        )  # fmt: skip
        results = serving.measure(plan)
        write_results(options.output, results)
        print(serving.table(results))


if __name__ == "__main__":
    main()
