"""Decoding images that others made: upright, in bounded memory, of allowed formats, and never anything but readable or
unreadable."""

import io
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from modeling_fromage import FromageDataCollator, FromageImageIndex, FromagePipeline, ImageLimits, UnreadableImageError
from modeling_fromage.images_fromage import _PixelBudget, load_rgb_image, to_rgb
from tests.helpers.backbones import make_model

ROOT = Path(__file__).parents[2]


def corners() -> Image.Image:
    """A picture of which no two sides look alike."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:12, :16], pixels[:12, 16:], pixels[12:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


# How a camera stores an upright picture, by the orientation that it writes beside it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def photo(orientation=6, format="PNG", **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    corners().transpose(STORED[orientation]).save(file, format, exif=exif, **options)
    return file.getvalue()


def encoded(image, format, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def failure(source, *args) -> UnreadableImageError:
    with pytest.raises(UnreadableImageError) as caught:
        load_rgb_image(source, *args)
    return caught.value


# ---- EXIF ----


@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_upright(orientation, tmp_path):
    data = photo(orientation)
    (tmp_path / "photo.png").write_bytes(data)
    expected = corners().tobytes()
    for source in (tmp_path / "photo.png", {"bytes": data}, Image.open(io.BytesIO(data))):
        image = load_rgb_image(source)
        assert image.size == (32, 24) and image.tobytes() == expected
        assert load_rgb_image(image).tobytes() == expected  # and stays so


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {})],
)
def test_orientation_in_every_format(format, options):
    found = np.asarray(load_rgb_image({"bytes": photo(6, format, **options)})).astype(int)
    assert found.shape == (24, 32, 3) and np.abs(found - np.asarray(corners())).mean() < 8


def test_a_pil_image_that_was_used_is_turned_once_and_stays_as_it_was():
    stored = Image.open(io.BytesIO(photo(6)))
    stored.load()
    before = stored.tobytes()
    assert to_rgb(stored).tobytes() == load_rgb_image(stored).tobytes() == corners().tobytes()
    assert (stored.size, stored.tobytes()) == ((24, 32), before)
    marked = corners().transpose(STORED[3])
    marked.getexif()[ExifTags.Base.Orientation] = 3
    assert load_rgb_image(marked).tobytes() == corners().tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_cost_the_photo():
    plain = encoded(corners(), "PNG", exif=b"Exif\0\0MM\0\x2a" + b"\xff" * 20)
    assert load_rgb_image({"bytes": plain}).tobytes() == corners().tobytes()
    assert load_rgb_image({"bytes": encoded(corners(), "PNG", exif=b"no exif")}).size == (32, 24)


def test_every_way_in_turns_photos(processor, tmp_path):
    """Processor, collator, index, pipeline and the index's images, of a file and of a PIL image."""
    model, path = make_model("opt_clip"), tmp_path / "photo.png"
    path.write_bytes(photo(6))
    upright = processor(images=corners(), return_tensors="pt")["pixel_values"]
    collate = FromageDataCollator(processor)
    pipe = FromagePipeline(model=model, processor=processor)
    for source in (path, Image.open(path)):
        assert torch.equal(processor(images=source, return_tensors="pt")["pixel_values"], upright)
        assert torch.equal(collate([{"image": source, "caption": "a photo"}])["pixel_values"], upright)
        assert pipe.preprocess([source, "what?"])["images"][0].tobytes() == corners().tobytes()
        index, expected = (
            FromageImageIndex.build(model, processor, [image], ids=["photo"], show_progress=False)
            for image in (source, corners())
        )
        assert torch.equal(torch.as_tensor(index.embeds[:]), torch.as_tensor(expected.embeds[:]))
        assert index.load_image("photo").tobytes() == corners().tobytes()


# ---- formats ----

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg"])
def test_no_file_starts_a_program(name, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: pytest.fail("Ghostscript was looked for"))
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for source in (tmp_path / name, {"bytes": POSTSCRIPT, "path": name}, Image.open(io.BytesIO(POSTSCRIPT))):
        error = failure(source)
        assert error.reason == "no image"
    assert "`ImageLimits(formats=...)` allows others" in str(failure(tmp_path / name))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM"])
def test_allowed_formats(format):
    data = encoded(corners(), format)
    assert load_rgb_image({"bytes": data}).size == load_rgb_image(Image.open(io.BytesIO(data))).size == (32, 24)


def test_other_formats_are_opted_in(tmp_path):
    data = encoded(corners(), "TGA")
    (tmp_path / "a.tga").write_bytes(data)
    limits = ImageLimits(formats=("PNG", "TGA"))
    for source in (tmp_path / "a.tga", {"bytes": data}, Image.open(tmp_path / "a.tga")):
        assert failure(source).reason == "no image"
        assert load_rgb_image(source, limits).size == (32, 24)
    opened = Image.open(tmp_path / "a.tga")
    opened.load()  # decoded by its owner
    assert load_rgb_image(opened).size == (32, 24)
    assert failure({"bytes": encoded(corners(), "JPEG")}, limits).reason == "no image"


def test_two_pictures_in_a_jpeg_give_the_first():
    data = encoded(corners(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 24))])
    for source in ({"bytes": data}, Image.open(io.BytesIO(data))):
        assert load_rgb_image(source).getpixel((2, 2))[0] > 200


# ---- hostile files ----


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for source in (tmp_path / "fifo.png", str(tmp_path / "fifo.png"), tmp_path, "/dev/zero"):
        found = []
        thread = threading.Thread(target=lambda source=source, found=found: found.append(failure(source)), daemon=True)
        thread.start()
        thread.join(5)
        assert found and found[0].reason == "not a regular file"
    assert failure("a\0b.png").reason == "broken"
    assert failure({"bytes": 3}).reason == failure({"path": 3}).reason == "no image"


def animation(format) -> bytes:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)) for _ in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=10)


def test_a_cut_animation_gives_its_first_frame_or_is_unreadable():
    whole = animation("GIF")
    expected, readable = load_rgb_image({"bytes": whole}).tobytes(), 0
    for end in range(len(whole)):
        try:
            readable += load_rgb_image({"bytes": whole[:end]}).tobytes() == expected
        except UnreadableImageError:
            continue
    assert readable > len(whole) // 4


FUZZED = {
    "JPEG": encoded(corners(), "JPEG"),
    "progressive": encoded(corners(), "JPEG", progressive=True),
    "photo": photo(6, "JPEG"),
    "PNG": encoded(corners().quantize(8), "PNG", transparency=0),
    "16 bits": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
    "APNG": animation("PNG"),
    "GIF": animation("GIF"),
    "WEBP": animation("WEBP"),
    "AVIF": encoded(corners(), "AVIF"),
    "BMP": encoded(corners(), "BMP"),
    "TIFF": encoded(corners(), "TIFF"),
    "photo TIFF": photo(6, "TIFF"),
    "LZW": encoded(corners(), "TIFF", compression="tiff_lzw"),
    "PPM": encoded(corners(), "PPM"),
}


@pytest.mark.parametrize("kind", FUZZED)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_read_or_unreadable(kind):
    whole, rng = FUZZED[kind], np.random.default_rng(zlib.crc32(kind.encode()))
    limits = ImageLimits(max_pixels=1_000_000)
    for case in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400 if case % 2 else len(data)), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        data = bytes(data[: rng.integers(1, len(data))] if case % 3 == 0 else data)
        try:
            image = load_rgb_image({"bytes": data}, limits)
            assert image.mode == "RGB" and image.width * image.height <= limits.max_pixels
        except UnreadableImageError as error:
            assert error.reason in ("no image", "broken", "too many pixels", "too thin", "out of memory")


def test_whatever_a_decoder_raises_is_unreadable(monkeypatch):
    for kind in (IndexError, KeyError, ZeroDivisionError, OverflowError, AttributeError, MemoryError, zlib.error):

        def load(self, kind=kind):
            raise kind

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        error = failure({"bytes": encoded(corners(), "PNG"), "path": "a.png"})
        assert error.reason == ("out of memory" if kind is MemoryError else "broken") and kind.__name__ in str(error)


def test_names_do_not_write_lines_into_logs(tmp_path):
    for name in ("a\n2026 ERROR all is lost.png", "\x1b[2Jb.png", "c\u202egnp.exe", "\udcff.png"):
        for source in ({"path": str(tmp_path / name)}, tmp_path / name, f"http://127.0.0.1/{name}"):
            message = str(failure(source))
            assert message.isprintable() and ("not found" in message or "private address" in message)
            message.encode()
    assert "b\xe4r \u732b.png" in str(failure("b\xe4r \u732b.png"))


# ---- memory ----


def test_pixels_in_flight_are_bounded():
    budget, lock, inside, most, order = _PixelBudget(10), threading.Lock(), [0], [0], []

    def decode(pixels):
        with budget.of(pixels):
            with lock:
                inside[0] += pixels
                most[0] = max(most[0], inside[0])
                order.append(pixels)
                assert inside[0] <= 10 or inside[0] == pixels
            time.sleep(0.002)
            with lock:
                inside[0] -= pixels

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in [3, 4, 5, 25, 3] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert len(order) == len(threads) and most[0] == 25


FOUR_AT_ONCE = """
import re, sys, threading, types
from pathlib import Path
from PIL import Image
package = sys.modules["modeling_fromage"] = types.ModuleType("modeling_fromage")  # without its __init__, and so torch
package.__path__ = [sys.argv.pop(1)]
from modeling_fromage.images_fromage import load_rgb_image

def peak():
    # Of this program alone: getrusage's starts at that of the process that started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_rgb_image(Image.new("RGB", (10, 10)))
before = peak()
sizes = []
threads = [threading.Thread(target=lambda path=path: sizes.append(load_rgb_image(path).size)) for path in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(sizes), (peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_threads_decode_large_images_in_bounded_memory(tmp_path):
    """26 megapixels each, so one by one; files of some hundred kilobytes."""
    side = (5100, 5100)
    images = {
        "rgba.png": Image.new("RGBA", side, (200, 10, 10, 100)),
        "deep.png": Image.fromarray(np.full(side, 40_000, np.uint16)),
        "grey.png": Image.new("LA", side, (200, 10)),
        "palette.gif": Image.new("P", side),
    }
    for name, image in images.items():
        image.save(tmp_path / name, **({"transparency": 0} if name.endswith("gif") else {"compress_level": 1}))
    paths = [str(tmp_path / name) for name in images]
    assert sum(map(os.path.getsize, paths)) < 2_000_000
    command = [sys.executable, "-c", FOUR_AT_ONCE, str(ROOT / "modeling_fromage"), *paths]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    done, megabytes = map(int, run.stdout.split())
    assert done == 4 and megabytes < 20 * 26 + 104  # one image while it is decoded, and the result before it
