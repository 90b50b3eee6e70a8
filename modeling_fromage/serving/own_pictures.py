"""Pictures that people bring along, in the index that a model answers from."""

import itertools
from collections.abc import Container, Sequence
from pathlib import Path

from PIL import Image

from ..images_fromage import UnreadableImageError, load_rgb_image, printable
from ..index.index import FromageImageIndex
from .engine import Engine

_LONGEST_SIDE = 1024  # as many pixels as a page shows; they stay in memory
MOST_AT_ONCE = 200


def add_pictures(engine: Engine, index: FromageImageIndex, files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Embed pictures and add them to `index`, which keeps them, under their files' names.

    Returns:
        The ids of those that were added, and a sentence for each of the others.

    Raises:
        ValueError: Another model made the index, or there are too many files.
    """
    if len(files) > MOST_AT_ONCE:
        raise ValueError(f"Those are {len(files)} pictures. Add {MOST_AT_ONCE} at a time at most.")
    images, names, refused = [], [], []
    for file in files:
        try:
            image = read_picture(file)
        except ValueError as error:
            refused.append(str(error))
            continue
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        images.append(image)
        names.append(printable(file.name))
    ids: list[str] = []
    if images:

        def add() -> None:  # nobody else adds meanwhile: ids stay free
            for name in names:
                ids.append(_free_id(name, index, ids))
            metadata = [{"caption": Path(name).stem} for name in names]
            index.add_images(engine.pipe.model, engine.pipe.processor, images, ids=ids, metadata=metadata,
                             show_progress=False)  # fmt: skip

        engine.run(add)
    return ids, refused


def read_picture(file: Path) -> Image.Image:
    """The picture in a file that somebody uploaded.

    Raises:
        ValueError: There is none.
    """
    try:
        return load_rgb_image(file)
    except UnreadableImageError as error:
        raise ValueError(f"{printable(file.name)} cannot be read as a picture ({error.reason}).") from error


def _free_id(name: str, *taken: Container[object]) -> str:
    """`name`, or with a number where an image is called that already."""
    if not any(name in ids for ids in taken):
        return name
    stem, suffix = Path(name).stem, Path(name).suffix
    numbered = (f"{stem} ({number}){suffix}" for number in itertools.count(2))
    return next(each for each in numbered if not any(each in ids for ids in taken))


__all__ = ["MOST_AT_ONCE", "add_pictures", "read_picture"]
