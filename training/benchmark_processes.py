"""Compare training in two processes with training in one: `python -m training.benchmark_processes`.

The same global batches in one process, in two, and in two with `shard_backbones`: the largest differences of losses,
gradients and weights, with backbones in float32 and bfloat16; and the memory of each process, sharded and not.
"""

import argparse

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import processes
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--layers", type=at_least(1), default=8, help="of 50 MB each, in the model whose memory is measured"
    )
    add_output_option(parser, "processes_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        results = processes.measure(options.dtypes, options.layers)
        write_results(options.output, results)
        print(processes.table(results))


if __name__ == "__main__":
    main()
