"""What a visitor may ask for: every input is checked here, and refused with one sentence."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_fix.errors import PictureError
from lvlm_fix.methods import Method, parse
from lvlm_fix.pictures import open_picture

MOST_BYTES = 10 * 2**20  # of a picture's file
MOST_PIXELS = 24_000_000  # refused before it is decoded: 72 MB as RGB
LONGEST_QUESTION = 500  # characters
LONGEST_SETTING = 300  # characters of `fix`
MOST_TOKENS = 256  # of an answer


def picture(source: bytes | Path | Image.Image | None) -> Image.Image:
    """An upright RGB picture.

    Raises:
        ValueError: there is none, it is too large, or (`PictureError`) it cannot be read. No message holds a path.
    """
    if source is None:
        raise ValueError("there is no picture: upload, paste or take one, or pick a sample")
    if isinstance(source, Path):
        size = source.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(_too_heavy(size))
        source = source.read_bytes()
    if isinstance(source, bytes):
        if len(source) > MOST_BYTES:
            raise ValueError(_too_heavy(len(source)))
        try:
            width, height = Image.open(io.BytesIO(source)).size  # reads the header only
        except Image.DecompressionBombError as error:
            raise ValueError(f"the picture is too large: the limit is {MOST_PIXELS:,} pixels") from error
        except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
            raise PictureError(
                "cannot read the picture: the file is damaged or in no known format"
            ) from error
    else:
        width, height = source.size
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"the picture has {width} x {height} pixels, and the limit is {MOST_PIXELS:,}: scale it down first"
        )
    try:
        return open_picture(source)
    except PictureError as error:  # its message may quote the file's own bytes
        raise PictureError("cannot read the picture: the file is damaged or cut short") from error


def _too_heavy(size: int) -> str:
    return f"the picture's file has {size / 2**20:.1f} MB, and the limit is {MOST_BYTES // 2**20} MB: scale it down"


def question(text: Any) -> str:
    """A question that is not too long.

    Raises:
        ValueError: it is no text, empty, or longer than `LONGEST_QUESTION` characters.

    >>> question(" Is there a dog? ")
    'Is there a dog?'
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the question is empty: ask something, such as 'Describe the image.'")
    if len(text) > LONGEST_QUESTION:
        raise ValueError(f"the question has {len(text):,} characters, and the limit is {LONGEST_QUESTION}")
    return text.strip()


def tokens(count: Any) -> int:
    """A length of answers.

    Raises:
        ValueError: it is no whole number from 1 to `MOST_TOKENS`.

    >>> tokens(64.0)
    64
    """
    whole = isinstance(count, int | float) and math.isfinite(count) and count == int(count)
    if not whole or not 1 <= count <= MOST_TOKENS:
        raise ValueError(f"max_new_tokens must be a whole number from 1 to {MOST_TOKENS}, not {count!r:.40}")
    return int(count)


def methods(fix: Any) -> list[Method]:
    """Methods written as on the command line.

    Raises:
        ValueError: too long, an unknown method, or a value out of range.

    >>> methods("vtc_cls(keep=0.5)")
    [VTCCLS(keep=0.5, start_layer=-4)]
    """
    if not isinstance(fix, str):
        raise ValueError("fix must be text such as 'vtc_cls(keep=0.5),var', or 'none'")
    if len(fix) > LONGEST_SETTING:
        raise ValueError(f"fix has {len(fix):,} characters, and the limit is {LONGEST_SETTING}")
    return parse(fix)
