"""Train on data with errors in it: `python -m training.benchmark_dirty_data LANGUAGE_MODEL VISION_MODEL`.

One epoch over tar shards, some of whose examples are broken in ten ways, in two processes, and one over the same
without errors: what was trained on and what is listed, memory over time, seconds. `fromage tiny DIR` makes two
backbones small enough that reading the data is what counts.
"""

import argparse

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import dirty_data
from .publishing.results import add_output_option, write_results


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share is from 0 to below 1, got {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("language_model", help="Hub id or folder of a causal language model")
    parser.add_argument("vision_model", help="Hub id or folder of a vision encoder")
    parser.add_argument("--count", type=at_least(20), default=100_000, help="examples")
    parser.add_argument("--shard-size", type=at_least(1), default=1000, help="examples of a tar file")
    parser.add_argument("--broken", type=_share, default=0.03, help="share of the examples")
    parser.add_argument("--size", type=at_least(8), default=48, help="pixels of a picture's side")
    parser.add_argument("--batch-size", type=at_least(2), default=50, help="per process")
    parser.add_argument("--workers", type=at_least(0), default=1, help="per process")
    parser.add_argument("--processes", type=at_least(1), default=2)
    add_output_option(parser, "dirty_data_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        plan = dirty_data.Plan(
            options.count, options.shard_size, options.broken, options.size, options.batch_size, options.workers,
            options.processes,
        )  # fmt: skip
        results = dirty_data.measure(options.language_model, options.vision_model, plan)
        write_results(options.output, results)
        print(dirty_data.table(results))


if __name__ == "__main__":
    main()
