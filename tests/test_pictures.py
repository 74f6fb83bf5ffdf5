"""Every picture a person may hand over is read as they expect it, or refused in one sentence."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from lvlm_fix import LVLM, PictureError, PromptError, open_picture
from lvlm_fix.pictures import LONGEST_SIDE, MOST_PIXELS, THINNEST

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sixteen_bits(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint16)), "PNG")


def png(width: int, height: int, rows: bool = True) -> bytes:
    """A one-bit black PNG, row by row, so that making it takes no memory; without rows it is a header that lies."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, row = zlib.compressobj(9), bytes(1 + -(-width // 8))
    data = b"".join(packer.compress(row) for _ in range(height if rows else 1)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (2, 0, 4, 2))
    return encoded(image, "PNG", transparency=0)


def rotated_by_exif() -> bytes:
    """Stored lying down, red on the left; upright, red is on top."""
    image = Image.new("RGB", (40, 20), BLUE)
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=95)


def animation() -> bytes:
    return encoded(
        Image.new("RGB", (8, 6), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), BLUE)]
    )


# name -> (file, size as read, [(pixel, its colour)])
READABLE: dict[str, tuple[Callable[[], bytes], tuple[int, int], list]] = {
    "cmyk.jpg": (
        lambda: encoded(Image.new("CMYK", (32, 16), (0, 255, 255, 0)), "JPEG", quality=95),
        (32, 16),
        [((5, 5), RED)],
    ),
    "sixteen_bits.png": (
        lambda: sixteen_bits(np.array([[0, 257, 32896, 65535]])),
        (4, 1),
        [((0, 0), (0,) * 3), ((1, 0), (1,) * 3), ((2, 0), (128,) * 3), ((3, 0), WHITE)],
    ),
    "sixteen_bits_dark.png": (lambda: sixteen_bits(np.full((2, 3), 250)), (3, 2), [((1, 1), (1, 1, 1))]),
    "float.tif": (
        lambda: encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF"),
        (3, 1),
        [((0, 0), (0,) * 3), ((1, 0), (128,) * 3), ((2, 0), WHITE)],
    ),
    "deep.tif": (
        lambda: encoded(Image.fromarray(np.array([[0, 500_000, 1_000_000]], dtype=np.int32)), "TIFF"),
        (3, 1),
        [((0, 0), (0,) * 3), ((1, 0), (128,) * 3), ((2, 0), WHITE)],
    ),
    "palette.png": (palette_with_transparency, (4, 2), [((0, 0), WHITE), ((3, 1), BLUE)]),
    "rgba.png": (
        lambda: encoded(Image.new("RGBA", (3, 3), (255, 0, 0, 128)), "PNG"),
        (3, 3),
        [((1, 1), (255, 127, 127))],
    ),
    "clear.png": (
        lambda: encoded(Image.new("RGBA", (3, 3), (9, 9, 9, 0)), "PNG"),
        (3, 3),
        [((1, 1), WHITE)],
    ),
    "la.png": (lambda: encoded(Image.new("LA", (3, 3), (0, 128)), "PNG"), (3, 3), [((1, 1), (127,) * 3)]),
    "one_bit.png": (lambda: png(9, 7), (9, 7), [((8, 6), (0, 0, 0))]),
    "rotated.jpg": (rotated_by_exif, (20, 40), [((10, 5), RED), ((10, 35), BLUE)]),
    "animated.gif": (animation, (8, 6), [((4, 3), RED)]),
    "dot.png": (lambda: encoded(Image.new("RGB", (1, 1), BLUE), "PNG"), (1, 1), [((0, 0), BLUE)]),
    "strip.png": (
        lambda: encoded(Image.new("RGB", (20_000, 10), BLUE), "PNG"),
        (LONGEST_SIDE, -(-LONGEST_SIDE // THINNEST)),
        [((2000, 102), BLUE), ((2000, 5), WHITE), ((2000, 200), WHITE)],
    ),
    "pole.png": (
        lambda: encoded(Image.new("RGB", (10, 20_000), BLUE), "PNG"),
        (-(-LONGEST_SIDE // THINNEST), LONGEST_SIDE),
        [((102, 2000), BLUE), ((5, 2000), WHITE)],
    ),
    "large.jpg": (
        lambda: encoded(Image.new("RGB", (6000, 3000), RED), "JPEG"),
        (LONGEST_SIDE, LONGEST_SIDE // 2),
        [((0, 0), RED)],
    ),
}

# name -> (file, what the one sentence says)
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "is empty"),
    "notes.jpg": (lambda: b"Dear diary,\nno picture today.\n", "not in a picture format"),
    "page.png": (lambda: b"<html>404 not found</html>", "not in a picture format"),
    "half.png": (lambda: encoded(noise(), "PNG")[:3000], "damaged or cut short"),
    "half.jpg": (lambda: encoded(noise(), "JPEG")[:1500], "damaged or cut short"),
    "lying_bomb.png": (lambda: png(50_000, 50_000, rows=False), "pixels; scale it down first"),
    "true_bomb.png": (lambda: png(10_100, 10_000), "10100 x 10000 pixels, and the limit is 100,000,000"),
}


def assert_one_sentence(error: pytest.ExceptionInfo[PictureError], name: str, says: str) -> None:
    message = str(error.value)
    assert message.startswith(f"cannot read picture {name}: ") and says in message
    assert "\n" not in message and len(message) < 300 + len(name)


def assert_close(image: Image.Image, pixels: list) -> None:
    for place, colour in pixels:
        found: Any = image.getpixel(place)
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 3, (place, found, colour)


@pytest.fixture(scope="module")
def lvlm(embedded) -> LVLM:
    return LVLM(*embedded)


@pytest.mark.parametrize("name", READABLE)
def test_every_kind_of_picture_is_read_as_a_person_sees_it(name: str, tmp_path: Path) -> None:
    make, size, pixels = READABLE[name]
    path = tmp_path / name
    path.write_bytes(make())
    for source in (path, str(path), make(), io.BytesIO(make())):
        image = open_picture(source)
        assert (image.mode, image.size) == ("RGB", size)
        assert_close(image, pixels)


@pytest.mark.parametrize("name", READABLE)
def test_the_model_answers_about_every_kind_of_picture(name: str, lvlm: LVLM, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(READABLE[name][0]())
    answer = lvlm.ask(path, "Is there a dog in the image?", max_new_tokens=3)
    assert answer.text in ("Yes", "No")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_in_one_sentence(name: str, lvlm: LVLM, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(PictureError) as error:
        open_picture(path)
    assert_one_sentence(error, str(path), says)
    with pytest.raises(PictureError) as error:
        open_picture(make())
    assert_one_sentence(error, "given in memory", says)
    with path.open("rb") as stream, pytest.raises(PictureError) as error:
        open_picture(stream)
    assert_one_sentence(error, str(path), "")
    with pytest.raises(PictureError) as error:
        lvlm.ask(path)
    assert_one_sentence(error, str(path), says)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(PictureError) as error:
        open_picture(tmp_path / "nothing.png")
    assert_one_sentence(error, str(tmp_path / "nothing.png"), "there is no such file")
    with pytest.raises(PictureError) as error:
        open_picture(tmp_path)
    assert_one_sentence(error, str(tmp_path), "it is a folder")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_file_cut_anywhere_is_refused_unless_only_its_end_mark_is_lost(file_format: str) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(noise(), file_format)
    whole = open_picture(data)
    marks = 12 if file_format == "PNG" else 2
    for stop in [*range(0, 60), *range(60, len(data) - marks - 60, 97)]:
        with pytest.raises(PictureError) as error:
            open_picture(data[:stop])
        assert_one_sentence(error, "given in memory", "")
    for stop in range(len(data) - marks - 60, len(data)):
        try:
            assert open_picture(data[:stop]).size == whole.size
        except PictureError as refusal:
            assert "cut short" in str(refusal)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TGA", "AVIF"])
def test_a_garbled_file_never_raises_anything_else(file_format: str) -> None:
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if file_format in ("PNG", "JPEG", "WEBP") else {}
    data, rng, refused = encoded(noise(30, 20), file_format, **options), random.Random(1), 0
    for trial in range(200):
        garbled = bytearray(data)
        reach = min(len(data), 300) if trial % 2 else len(data)  # headers break more than pixels do
        for _ in range(rng.randrange(1, 8)):
            garbled[rng.randrange(reach)] = rng.randrange(256)
        try:
            assert open_picture(bytes(garbled)).mode == "RGB"
        except PictureError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    path = tmp_path / "bomb.png"
    path.write_bytes(png(12_000, 12_000))  # under Pillow's own limit of 179 million, over ours
    assert path.stat().st_size < 100_000 and MOST_PIXELS < 12_000**2
    script = (
        "import resource, sys\n"
        "from lvlm_fix.pictures import PictureError, open_picture\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "try:\n    open_picture(sys.argv[1])\n"
        "except PictureError:\n    print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert int(done.stdout) < 40, done.stderr  # MiB; decoded it is 137


def test_a_pillow_image_is_left_as_it_was() -> None:
    source = Image.open(io.BytesIO(rotated_by_exif()))
    source.load()
    before = (source.size, source.mode, source.tobytes(), source.getexif()[0x0112], dict(source.info))
    result = open_picture(source)
    assert result.size == (20, 40)
    result.paste(WHITE, (0, 0, 20, 40))
    after = (source.size, source.mode, source.tobytes(), source.getexif()[0x0112], dict(source.info))
    assert before == after


def test_the_result_shares_no_pixels_with_an_rgb_image() -> None:
    source = Image.new("RGB", (5, 5), RED)
    open_picture(source).paste(BLUE, (0, 0, 5, 5))
    assert source.getpixel((2, 2)) == RED


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_pillow_images_of_every_mode_come_out_as_rgb(mode: str) -> None:
    assert open_picture(Image.new(mode, (6, 4))).mode == "RGB"


def test_values_that_are_no_numbers_are_black() -> None:
    image = open_picture(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]


def test_a_stream_is_read_from_its_start() -> None:
    stream = io.BytesIO(encoded(Image.new("RGB", (3, 2), RED), "PNG"))
    stream.seek(11)
    assert open_picture(stream).size == (3, 2)


def test_pictures_of_all_kinds_go_in_one_batch(lvlm: LVLM) -> None:
    names = ["dot.png", "strip.png", "rgba.png", "animated.gif"]
    batch = [READABLE[name][0]() for name in names]
    together = lvlm.ask(batch, "Describe the image.", max_new_tokens=12)
    assert [answer.text for answer in together] == [lvlm.ask(one, max_new_tokens=12).text for one in batch]


@pytest.mark.parametrize("question", ["", "  \n", "What is <image> here?"])
def test_empty_questions_and_placeholders_are_refused(lvlm: LVLM, question: str) -> None:
    with pytest.raises(PromptError, match=r"empty: ask something|leave it out"):
        lvlm.ask(noise(), question)
