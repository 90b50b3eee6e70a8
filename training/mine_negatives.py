"""Mine hard negatives for a table of captioned images:
`python -m training.mine_negatives MODEL --data TABLE --index INDEX --output MINED.jsonl`.

For each caption of TABLE (CSV, TSV, JSON lines or Parquet, with paths or URLs of images) the nearest images of INDEX
that are not its own become a column `negative_images`, which `fromage train` draws further negatives from
(`train_data: MINED.jsonl`, `hard_negatives: 1`). INDEX is one that MODEL made, of files or URLs, say of TABLE itself
(`fromage index MODEL TABLE INDEX`). Images that are as near to a caption as its own, or nearly, are left out: they
probably show what it says.
"""

import argparse
import json
from pathlib import Path

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from modeling_fromage.file_writing_fromage import replacing
from modeling_fromage.io.columns import NEGATIVES, find_columns
from modeling_fromage.io.command_line import at_least, command_parser, device_option, dtype_option, errors_in_one_line

from .data.negative_mining import NegativeMining, relative_to


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of the model that made the index")
    parser.add_argument("--data", type=Path, required=True, metavar="TABLE", help="a table of images and captions")
    parser.add_argument("--index", required=True, help="folder or Hub id of the index")
    parser.add_argument("--output", type=Path, required=True, metavar="MINED.jsonl", help="the table to write")
    parser.add_argument("--per-example", type=at_least(1), default=8, help="negatives of a row")
    parser.add_argument(
        "--skip-above",
        type=at_least(0, float),
        default=0.95,
        help="leave images out whose cosine with a caption is above this share of its own image's",
    )
    parser.add_argument("--image-root", type=Path, help="folder that paths in the index start from; by default TABLE's")
    parser.add_argument("--image-column", help="by default image, file_name, url, ...")
    parser.add_argument("--caption-column", help="by default caption, text, captions, title or txt")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=32, help="captions or images that are embedded at once"
    )
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=dtype_option, help="of the backbones; by default as stored")
    return parser


def mine(options: argparse.Namespace) -> str:
    """Write the table; returns what was found, in words."""
    if options.output.suffix.lower() != ".jsonl":
        raise ValueError(f"The table is written as JSON lines: give --output NAME.jsonl, got {options.output}.")
    dtype = {"dtype": options.dtype} if options.dtype else {}
    model = FromageForConditionalGeneration.from_pretrained(options.model, **dtype).eval().to(options.device)
    mining = NegativeMining(
        model,
        FromageProcessor.from_pretrained(options.model),
        FromageImageIndex.from_pretrained(options.index),
        options.data,
        options.image_root,
        options.per_example,
        options.skip_above,
        options.batch_size,
        options.image_column,
        options.caption_column,
    )
    folder = options.output.parent.absolute()
    with replacing(options.output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in mining.rows():
            image, _ = find_columns(str(options.data), list(row), options.image_column, options.caption_column)
            file.write(json.dumps(relative_to(row, (image, NEGATIVES), folder), ensure_ascii=False) + "\n")
    return mining.report()


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        print(f"{mine(options)}\nWrote {options.output}.")


if __name__ == "__main__":
    main()
