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
    parser.add_argument("--words", type=at_least(1), default=chat.WORDS, help="of a turn")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        device = choose_device(options.preset, options.device)
        results = chat.measure(options.preset, device, options.rounds, options.words)
        name = f"chat_{options.preset}{'' if options.words == chat.WORDS else f'_{options.words}'}.json"
        write_results(options.output or results_folder() / name, results)
        print(chat.table(results))


if __name__ == "__main__":
    main()
