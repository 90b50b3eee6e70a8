"""Measure the retrieval warm start: `python -m training.benchmark_warm_start LM VISION --data NAME=TRAIN ...`.

On each set of captioned images: joint training from nothing, then the warm start in fewer and more steps, from the same
cached image features, and the recall of pairs that were held out. The original's training step is timed beside ours.
"""

import argparse
import logging

from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .benchmarks import warm_start
from .publishing.results import add_output_option, write_results


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("language_model", help="Hub id or folder of a causal language model")
    parser.add_argument("vision_model", help="Hub id or folder of a vision encoder")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="NAME=TRAIN[,HELD_OUT]",
        help="tables or folders of captioned images and what to call them; without HELD_OUT every tenth caption is "
        "held out, by its hash; rows of one image are one example with several captions",
    )
    parser.add_argument("--joint-steps", type=at_least(1), default=160)
    parser.add_argument("--batch-size", type=at_least(2), default=32, help="of joint training")
    parser.add_argument("--steps", type=at_least(1), nargs="+", default=[25, 50, 100, 200, 400], help="of warm starts")
    parser.add_argument("--joint-seeds", type=at_least(1), default=1)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="of warm starts")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="in which single steps are timed")
    add_output_option(parser, "warm_start_cpu.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        plan = warm_start.Plan(
            options.joint_steps, options.batch_size, sorted(options.steps), options.joint_seeds, options.seeds,
            options.rounds,
        )  # fmt: skip
        for results in warm_start.measure(options.language_model, options.vision_model, options.data, plan):
            write_results(options.output, results)  # after each set
        print(warm_start.table(results))


if __name__ == "__main__":
    main()
