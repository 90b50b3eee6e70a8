"""Kill a training run again and again, and compare its weights: `python -m training.benchmark_kills`.

Two processes with loader workers read tar shards. SIGKILL hits the whole run, one process or a loader worker at random
times, and the same command starts it again. In the end its weights must be those of a run that was left alone, bit by
bit.
"""

import argparse
import logging
from pathlib import Path

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import kills
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--kills", type=at_least(1), default=20)
    parser.add_argument("--examples", type=at_least(16), default=1200)
    parser.add_argument("--shards", type=at_least(1), default=6)
    parser.add_argument("--epochs", type=at_least(1), default=4)
    parser.add_argument("--save-steps", type=at_least(1), default=5, help="from one checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for data, logs and checkpoints; by default a temporary one")
    add_output_option(parser, "kills_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        plan = kills.Plan(
            options.kills, options.examples, options.shards, options.epochs, options.save_steps, options.seed
        )
        results = kills.measure(plan, options.keep)
        write_results(options.output, results)
        print(kills.table(results))


if __name__ == "__main__":
    main()
