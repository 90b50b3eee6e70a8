"""Measure the training step against the original's algorithm: `python -m training.benchmark [--preset cpu|paper]`.

Both train the same shapes in the same dtype on the same captions, which are as long as those of Conceptual Captions,
taking turns; the table shows medians. Weights are random: they do not change the cost of a step. `--preset paper` takes
the paper's shapes and needs a GPU. Results go to a JSON file with the hardware, the versions and the state of the
repository; `--render` writes the repository's tables from all such files. `benchmark_answers` measures generation and
scoring, `benchmark_chat` a chat, `benchmark_serving` the server, `benchmark_index` and `benchmark_large_index` the
image index, `benchmark_cluster` an index that is built on Ray, `benchmark_warm_start` training for retrieval first,
`benchmark_options` what options of training are worth, `benchmark_dirty_data` data with errors in it,
`benchmark_processes` and `benchmark_kills` runs of several processes.
"""

import argparse

from modeling_fromage.io.command_line import command_parser, errors_in_one_line

from .benchmarks import (
    answers,
    chat,
    cluster,
    index,
    kills,
    large_index,
    milvus,
    processes,
    run,
    serving,
    step,
    warm_start,
)
from .benchmarks import options as study
from .benchmarks.presets import add_preset_options, choose_device
from .publishing.results import read_results, render_pages, results_folder, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add_preset_options(parser, "benchmark")
    parser.add_argument("--render", action="store_true", help="only render the repository's tables from stored results")
    return parser


def render() -> None:
    """Render the tables of all stored results into the repository's pages."""
    tables = {"benchmark": step.table, "answers": answers.table, "chat": chat.table, "index": index.table,
              "large_index": large_index.table, "milvus": milvus.table, "warm_start": warm_start.table,
              "processes": processes.table, "kills": kills.table, "cluster": cluster.table,
              "serving": serving.table, "options": study.table}  # fmt: skip
    for name, table in tables.items():
        render_pages(name, [table(results) for results in read_results(f"{name}_*.json")], by="training.benchmark")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        if options.render:
            return render()
        device = choose_device(options.preset, options.device)
        results = run.measure(step.measure(options.preset, device), device)
        write_results(options.output or results_folder() / f"benchmark_{options.preset}.json", results)
        print(step.table(results))


if __name__ == "__main__":
    main()
