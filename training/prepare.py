"""Turn a table of image URLs into local shards to train on: `python -m training.prepare TABLE DIR`.

TABLE is a TSV, CSV, JSON lines or Parquet file with a column of URLs and one of captions, several by a pattern in
quotes; Conceptual Captions' TSV files need no header. DIR gets shards that `train_data: DIR` reads, `00000.tar`, ...,
each with the rows of one stretch of the table, and beside each a report of what could not be had. Images are fetched
within limits on time, bytes and pixels, decoded once to see that they can be, and kept as they came, or made smaller
with `--size`.

Whatever it is stopped by, the same command goes on: shards that are whole are not fetched again. `--retry-failed`
fetches again what failed.
"""

import argparse
from pathlib import Path

from modeling_fromage.images_fromage import ImageLimits
from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

from .data.fetching import Fetcher
from .data.preparation import FORMATS, Preparation, describe_report


def make_parser() -> argparse.ArgumentParser:
    limits = ImageLimits()
    parser = command_parser(__doc__)
    parser.add_argument("table", help="the table, or a pattern of several")
    parser.add_argument("directory", help="folder for the shards")
    parser.add_argument("--image-column", help="by default image, url, image_url, ...")
    parser.add_argument("--caption-column", help="by default caption, text, captions, title or txt")
    parser.add_argument("--format", choices=FORMATS, default="tar")
    parser.add_argument("--shard-size", type=at_least(1), default=10_000, help="rows of the table in a shard")
    parser.add_argument("--size", type=at_least(1), help="pixels of the shorter side; larger images are made smaller")
    parser.add_argument("--threads", type=at_least(1), default=32, help="connections in all")
    parser.add_argument("--per-host", type=at_least(1), default=2, help="connections to a host at a time")
    parser.add_argument("--pause", type=at_least(0, float), default=0.0, help="seconds between two requests to a host")
    parser.add_argument("--retries", type=at_least(0), default=3, help="of a host that is busy or fails (429, 5xx)")
    parser.add_argument(
        "--max-wait",
        type=at_least(0, float),
        default=300.0,
        help="seconds to wait for a host that is busy or asks to be left alone (Retry-After); then its images fail",
    )
    parser.add_argument("--timeout", type=at_least(0.1, float), default=limits.timeout, help="seconds for an image")
    parser.add_argument("--max-bytes", type=at_least(1), default=limits.max_bytes, help="size of a file")
    parser.add_argument(
        "--allow-private-addresses", action="store_true", help="let URLs be of this machine or its network"
    )
    parser.add_argument("--allow-outside-paths", action="store_true", help="let paths lead out of the table's folder")
    parser.add_argument("--retry-failed", action="store_true", help="fetch again what failed in earlier runs")
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        limits = ImageLimits(
            timeout=options.timeout,
            max_bytes=options.max_bytes,
            allow_private_addresses=options.allow_private_addresses,
        )
        fetcher = Fetcher(
            limits,
            options.threads,
            options.per_host,
            options.pause,
            options.retries,
            options.max_wait,
            options.size,
        )
        preparation = Preparation(
            options.table,
            Path(options.directory),
            options.image_column,
            options.caption_column,
            options.format,
            options.shard_size,
            options.size,
            options.allow_outside_paths,
        )
        report = preparation.run(fetcher, options.retry_failed)
        print(describe_report(report))
        return report


if __name__ == "__main__":
    main()
