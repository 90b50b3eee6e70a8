"""Measure large indexes on disk: `python -m training.benchmark_large_index --count 10000000 --lists 1024`.

Measures one size at a time, each in processes of its own: building, opening, exact search beside one matrix product and
beside reading the same memory, filters, and FAISS with product quantization (IVF and PQ) and, with `--graph`, HNSW. The
results of other sizes stay in the output file. 10 million images take 7 GB of disk. Set OMP_NUM_THREADS on a machine
that others use.
"""

import argparse
import json

import faiss  # noqa: F401 (missed now, not after minutes)
import torch

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import large_index
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--count", type=at_least(1000), default=1_000_000, help="images in the index")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="of the stored embeddings")
    parser.add_argument("--lists", type=at_least(0), default=1024, help="lists of the IVF index; 0 leaves FAISS out")
    parser.add_argument("--training-size", type=at_least(1), default=100_000, help="images that train it")
    parser.add_argument("--graph", action="store_true", help="build HNSW, too")
    parser.add_argument("--seconds", type=at_least(0, float), default=20.0, help="that each measurement repeats for")
    parser.add_argument(
        "--folder", help="where the index is written, to be deleted; by default, that of temporary files"
    )
    add_output_option(parser, "large_index_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        kept = json.loads(options.output.read_text(encoding="utf-8"))["runs"] if options.output.is_file() else []
        kept = [run for run in kept if (run["count"], run["dtype"]) != (options.count, options.dtype)]
        found = large_index.measure(options.count, getattr(torch, options.dtype), options.lists, options.graph,
                                    options.training_size, options.folder, options.seconds)  # fmt: skip
        results = {"runs": [*kept, found]}
        write_results(options.output, results)
        print(large_index.table(results))


if __name__ == "__main__":
    main()
