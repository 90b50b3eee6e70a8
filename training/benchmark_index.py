"""Measure the image index: `python -m training.benchmark_index`.

Measures opening, exact search against FAISS's flat index, and FAISS's IVF, over synthetic embeddings in 1,000
overlapping clusters; and a build from JPEG files against the encoder alone. `--milvus` measures an index in a file of
Milvus Lite instead: its recall, and what is left of it after a process that adds was killed again and again.
"""

import argparse
from pathlib import Path

import faiss  # noqa: F401 (missed now, not after minutes)

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import index, milvus
from .benchmarks.presets import PRESETS
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--count", type=at_least(1), default=1_000_000, help="images in the index")
    parser.add_argument("--preset", default="cpu", choices=sorted(PRESETS), help="the encoder of the build")
    parser.add_argument("--lists", type=at_least(1), default=1024, help="lists of the IVF index")
    parser.add_argument("--images", type=at_least(32), default=320, help="in the build")
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--milvus", action="store_true", help="measure Milvus Lite instead, into milvus_cpu.json")
    parser.add_argument("--kills", type=at_least(1), default=20, help="with --milvus")
    add_output_option(parser, "index_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        if options.milvus:
            return _measure_milvus(options, parser.get_default("output"))
        results = index.measure(options.count, options.preset, options.lists, options.images, options.rounds)
        write_results(options.output, results)
        print(index.table(results))


def _measure_milvus(options: argparse.Namespace, default: Path) -> None:
    results = milvus.measure(options.count, options.kills, options.rounds)
    write_results(default.with_name("milvus_cpu.json") if options.output == default else options.output, results)
    print(milvus.table(results))


if __name__ == "__main__":
    main()
