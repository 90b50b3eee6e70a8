"""Talk with a model in the browser: `python -m hub_scripts.demo MODEL --index INDEX [--image-root FOLDER]`.

The page answers with text and with the pictures of the index, and takes pictures of your own into it. It is served to
this machine alone, unless `--host` or `--share` says otherwise, and loads nothing from elsewhere. Beside it is the API
of `python -m hub_scripts.serve`, with the same options; API keys are for the API, not for the page.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from modeling_fromage.io.command_line import command_parser, device_option, errors_in_one_line

from .serve import ServeOptions, add_server_options, load_pipeline, read_serve_options

_FIRST_PORT = 7860
_PAGE = ("save_index", "examples", "example_images", "title", "share")  # options of the page


def _page_module() -> Any:
    """
    Raises:
        ImportError: Gradio is not installed.
    """
    try:
        from modeling_fromage.serving import demo
    except ModuleNotFoundError as error:
        raise ImportError(f"The page needs {error.name}: pip install 'modeling-fromage[demo]'.") from error
    return demo


def _server_options(options: argparse.Namespace) -> ServeOptions:
    given = {name: value for name, value in vars(options).items() if name not in _PAGE}
    return read_serve_options(argparse.Namespace(**given))


def _page(engine: Any, options: argparse.Namespace) -> Any:
    demo = _page_module()
    pictures = [{"text": "", "files": [path]} for path in options.example_images]
    examples = [*(options.examples or demo.EXAMPLES), *pictures]
    return demo.Demo(engine, options.save_index).blocks(options.title, examples)


def make_page(options: argparse.Namespace) -> Any:
    """The page alone, a `gradio.Blocks`.

    Raises:
        ImportError: Gradio is not installed.
    """
    _page_module()
    from modeling_fromage.serving.engine import Engine

    return _page(Engine(load_pipeline(_server_options(options))), options)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="checkpoint: a folder or a Hub id; or a YAML file that names it")
    page = parser.add_argument_group("the page")
    page.add_argument("--save-index", metavar="FOLDER", help="save the index with pictures that people add, for all")
    page.add_argument("--examples", nargs="*", help="texts to click")
    page.add_argument("--example-images", nargs="*", default=[], help="pictures to click")
    page.add_argument("--title", default="FROMAGe")
    page.add_argument("--share", action="store_true", help="make a public address by Gradio's relay, of the API too")
    add_server_options(parser, ServeOptions)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with errors_in_one_line(parser):
        for image in options.example_images:
            if not Path(image).is_file():
                raise ValueError(f"There is no picture {image}. Check the path.")
        demo = _page_module()
        from modeling_fromage.serving.server import listen, make_server

        settings = _server_options(options)
        device_option(settings.device)
        ports = [settings.port] if "port" in vars(options) else range(_FIRST_PORT, _FIRST_PORT + 100)
        listener = listen(settings.host, ports)
        port = listener.getsockname()[1]
        keys = settings.read_api_keys()

        def mount(app: Any, service: Any) -> None:
            demo.mount(_page(service.engine, options), app, settings.max_image_bytes)

        server = make_server(load_pipeline(settings), settings, settings.name, keys, mount)
        address = demo.share(port) if options.share else f"http://{settings.host}:{port}"
        print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
        server.run([listener])


if __name__ == "__main__":
    main()
