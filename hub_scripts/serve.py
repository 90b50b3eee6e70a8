"""Serve a model by OpenAI's API: `python -m hub_scripts.serve MODEL --index INDEX`, or `... serve CONFIG.yaml`.

Chats with images in and out, embeddings of texts and images, and searches for images. A YAML file has the flags' names
as keys, with underscores; flags count more. SIGTERM ends the server once the requests that run are done.
"""

import argparse
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromagePipeline, FromageProcessor
from modeling_fromage.io.command_line import command_parser, device_option, dtype_name, errors_in_one_line
from modeling_fromage.io.option_files import read_options, to_dataclasses
from modeling_fromage.serving.settings import ServerSettings


@dataclass(kw_only=True)
class ServeOptions(ServerSettings):
    """What is served, and the server's own options."""

    model: str
    index: str | None = dataclasses.field(default=None, metadata={"help": "image index: a folder or a Hub id"})
    image_root: str | None = dataclasses.field(
        default=None, metadata={"help": "folder of the index's pictures; others are never shown"}
    )
    device: str = dataclasses.field(default="cpu", metadata={"help": "cpu, or a GPU of this machine"})
    dtype: str = dataclasses.field(default="float32", metadata={"help": "of the frozen parts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = dtype_name(self.dtype)

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or (Path(self.model).resolve().name if Path(self.model).exists() else self.model)


def load_pipeline(options: Any) -> FromagePipeline:
    """The model, its processor and the index that `options` name."""
    model = FromageForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
    index = options.index and FromageImageIndex.from_pretrained(options.index, image_root=options.image_root)
    processor = FromageProcessor.from_pretrained(options.model)
    return FromagePipeline(model=model.to(options.device).eval(), processor=processor, index=index)


def add_server_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add a flag for every field of a dataclass that has a help text; those that are not given stay away."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
            continue
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.type is bool or hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        many = {"nargs": "+"} if hints[field.name] == list[str] else {}
        if field.default not in (None, dataclasses.MISSING):
            text = f"{text} (by default {field.default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **many)


def read_serve_options(namespace: argparse.Namespace) -> ServeOptions:
    """Options of a YAML file, or of a model, with the flags that were given.

    Raises:
        ValueError: A key is unknown or missing, or a value has the wrong type.
    """
    given = dict(vars(namespace))
    model = given.pop("model")
    is_file = model.endswith((".yaml", ".yml"))
    config = read_options(model, []) if is_file else {"model": model}
    (options,) = to_dataclasses({**config, **given}, (ServeOptions,))
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="checkpoint: a folder or a Hub id; or a YAML file that names it")
    add_server_options(parser, ServeOptions)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    namespace = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    with errors_in_one_line(parser):
        options = read_serve_options(namespace)
        try:
            from modeling_fromage.serving.server import listen, serve
        except ModuleNotFoundError as error:
            raise ImportError(f"The server needs {error.name}: pip install 'modeling-fromage[serve]'.") from error
        device_option(options.device)
        keys = options.read_api_keys()
        listener = listen(options.host, [options.port])  # before the model is loaded, which takes longer
        serve(load_pipeline(options), options, options.name, keys, listener)


if __name__ == "__main__":
    main()
