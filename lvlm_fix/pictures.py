"""Reading pictures as a person expects: upright, in colour, whole; or one sentence that says why not."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lvlm_fix.errors import PictureError

MOST_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
LONGEST_SIDE = 4096  # a larger picture is scaled down: no tower looks closer
THINNEST = 20  # a picture thinner than 1 : 20 is padded, or processors that fit the short side blow it up

# what Pillow's decoders raise on damaged files: RuntimeError is AVIF's, the last four its plug-ins' slips
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    IndexError,
    TypeError,
    struct.error,
)

Picture = str | Path | bytes | IO[bytes] | Image.Image


def open_picture(source: Picture) -> Image.Image:
    """Read a picture as upright RGB.

    EXIF rotation is applied, transparency is laid over white, 16-bit and float pictures are scaled to 8 bits, of an
    animation the first frame is taken, and very large or very thin pictures are scaled down or padded with white.

    Args:
        source: a path, the bytes of a file, an open binary file, or a Pillow image.

    Raises:
        PictureError: the file is missing, empty, cut short, no picture, or has more than 100 million pixels.

    >>> open_picture(Image.new("L", (3, 2))).mode
    'RGB'
    """
    name = _name(source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # our own limit is below; EXIF may be damaged
            image = source if isinstance(source, Image.Image) else Image.open(_stream(source, name))
            if image.width * image.height > MOST_PIXELS:
                raise PictureError(
                    f"cannot read picture {name}: it is {image.width} x {image.height} pixels, and the limit is "
                    f"{MOST_PIXELS:,}; scale it down first"
                )
            image.load()
            return _bounded(_rgb(ImageOps.exif_transpose(image)))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"cannot read picture {name}: it has more than {MOST_PIXELS:,} pixels; scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise PictureError(
            f"cannot read picture {name}: it is not in a picture format that is known here"
        ) from error
    except _DECODER_ERRORS as error:
        raise PictureError(
            f"cannot read picture {name}: the file is damaged or cut short ({error})"
        ) from error


def _name(source: Picture) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return getattr(source, "filename", None) or getattr(source, "name", None) or "given in memory"


def _stream(source: str | Path | bytes | IO[bytes], name: str) -> IO[bytes]:
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise PictureError(f"cannot read picture {name}: there is no such file")
        if path.is_dir():
            raise PictureError(f"cannot read picture {name}: it is a folder")
        try:
            source = path.read_bytes()
        except OSError as error:
            raise PictureError(f"cannot read picture {name}: {error.strerror}") from error
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    if isinstance(stream, io.BytesIO) and not stream.getbuffer().nbytes:
        raise PictureError(f"cannot read picture {name}: the file is empty")
    return stream


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion of deep grey pictures clips at 255 instead of scaling."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    most = values.max(initial=0)
    if image.mode.startswith("I;16") or 255 < most <= 65535:
        values = values / 257  # a dark 16-bit picture stays dark
    elif most > 65535:
        values = values * (255 / most)
    elif image.mode == "F" and most <= 1:
        values = values * 255
    return Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))


def _bounded(image: Image.Image) -> Image.Image:
    if max(image.size) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), reducing_gap=2.0)
    width, height = image.size
    if max(width, height) > THINNEST * min(width, height):
        size = (max(width, -(-height // THINNEST)), max(height, -(-width // THINNEST)))
        canvas = Image.new("RGB", size, "white")
        canvas.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
        return canvas
    return image
