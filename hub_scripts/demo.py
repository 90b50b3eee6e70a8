"""Talk with a model in the browser: `python -m hub_scripts.demo MODEL --index INDEX [--image-root FOLDER]`.

The page answers with text and with the pictures of the index, and takes pictures of your own into it. It is served to
this machine alone, unless `--host` or `--share` says otherwise, and loads nothing from elsewhere.
"""

import argparse
from pathlib import Path
from typing import Any

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromagePipeline, FromageProcessor
from modeling_fromage.io.command_line import at_least, command_parser, device_option, dtype_option, errors_in_one_line


def load_pipeline(options: argparse.Namespace) -> FromagePipeline:
    """The model, its processor and the index that the command line names."""
    model = FromageForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
    index = options.index and FromageImageIndex.from_pretrained(options.index, image_root=options.image_root)
    processor = FromageProcessor.from_pretrained(options.model)
    return FromagePipeline(model=model.to(options.device).eval(), processor=processor, index=index)


def make_page(options: argparse.Namespace) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        ImportError: Gradio is not installed.
    """
    try:
        from modeling_fromage.serving.demo import EXAMPLES, Demo
    except ModuleNotFoundError as error:
        raise ImportError(f"The page needs {error.name}: pip install 'modeling-fromage[demo]'.") from error
    examples = [*(options.examples or EXAMPLES), *({"text": "", "files": [path]} for path in options.example_images)]
    return Demo(load_pipeline(options), options.save_index).blocks(options.title, examples)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--index", help="image index: a folder or a Hub id")
    parser.add_argument("--image-root", help="folder of the index's pictures; others are never shown")
    parser.add_argument("--save-index", metavar="FOLDER", help="save the index with pictures that people add, for all")
    parser.add_argument("--examples", nargs="*", help="texts to click")
    parser.add_argument("--example-images", nargs="*", default=[], help="pictures to click")
    parser.add_argument("--title", default="FROMAGe")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves it to the network")
    parser.add_argument("--port", type=at_least(1), help="by default the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="make a public address by Gradio's relay")
    parser.add_argument("--device", type=device_option, default="cpu")
    parser.add_argument("--dtype", type=dtype_option, default="float32")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        for image in options.example_images:
            if not Path(image).is_file():
                raise ValueError(f"There is no picture {image}. Check the path.")
        page = make_page(options)
        from modeling_fromage.serving.demo import launch

        _, address, public = launch(page, options.host, options.port, share=options.share, prevent_thread_lock=True)
        print(f"The page is at {public or address} (Ctrl-C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    main()
