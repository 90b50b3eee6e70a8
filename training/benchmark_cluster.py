"""Kill what builds an index on Ray, and compare the index: `python -m training.benchmark_cluster`.

Actors on this machine build an index of random pictures in tar shards. SIGKILL hits an actor in the middle of one run,
and the driver in the middle of another, which the same command then goes on with. Both indexes must be that of a plain
build.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import cluster
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--images", type=at_least(100), default=20_000)
    parser.add_argument("--shards", type=at_least(1), default=40, help="tar files of them")
    parser.add_argument("--actors", type=at_least(1), default=2)
    parser.add_argument("--parts", type=at_least(4), default=8)
    parser.add_argument("--keep", type=Path, help="folder for shards, indexes and logs; by default a temporary one")
    add_output_option(parser, "cluster_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        try:
            ray = version("ray")
        except PackageNotFoundError as error:
            raise ImportError("This needs Ray: pip install 'modeling-fromage[ray]'.") from error
        plan = cluster.Plan(options.images, options.shards, options.actors, options.parts)
        results = cluster.measure(plan, options.keep)
        results["versions"]["ray"] = ray
        write_results(options.output, results)
        print(cluster.table(results))


if __name__ == "__main__":
    main()
