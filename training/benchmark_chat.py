"""Measure a chat that goes on from its earlier turns, against starting over: `python -m training.benchmark_chat`.

Ten turns and four images. The original's algorithm runs beside it.
"""

import argparse

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import chat
from .benchmarks.presets import add_preset_options, choose_device
from .publishing.results import results_folder, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add_preset_options(parser, "chat")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        results = chat.measure(options.preset, choose_device(options.preset, options.device), options.rounds)
        write_results(options.output or results_folder() / f"chat_{options.preset}.json", results)
        print(chat.table(results))


if __name__ == "__main__":
    main()
