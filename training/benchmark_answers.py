"""Measure generation and candidate scoring against the original's algorithm: `python -m training.benchmark_answers`.

The prompt has the size of the paper's VIST prompts: four images and five captions. Both sides continue it greedily in
the same dtype, taking turns; the time includes encoding the images. The original takes one prompt at a time. Scoring
has the size of VisDial: an image, ten rounds of dialogue, and 100 answers. Ranking scores the answers of all ten
rounds, by the authors' protocol.
"""

import argparse

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import answers
from .benchmarks.presets import add_preset_options, choose_device
from .publishing.results import results_folder, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add_preset_options(parser, "answers")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        results = answers.measure(options.preset, choose_device(options.preset, options.device), options.rounds)
        write_results(options.output or results_folder() / f"answers_{options.preset}.json", results)
        print(answers.table(results))


if __name__ == "__main__":
    main()
