"""What the model looked at, drawn over the picture in colours that the colour-blind can tell apart."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageDraw

from lvlm_fix.demo.looking import Look
from lvlm_fix.diagnosis_plot import HEAT
from lvlm_fix.drawing import BLUE, RED

SIDE = 420  # longest side of a drawing, in pixels


def heat(look: Look, values: Sequence[float], most: float) -> Image.Image:
    """The picture in grey under a map (N,) in cividis, on a root scale from 0 to `most`."""
    plain = _enlarged(look)
    rows, columns = look.grid
    scaled = np.sqrt(np.clip(np.asarray(values, dtype=np.float64) / max(most, 1e-12), 0, 1)).reshape(
        rows, columns
    )
    anchors = np.array([[int(code[at : at + 2], 16) for at in (1, 3, 5)] for code in HEAT])
    place = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(scaled, place, anchors[:, channel]) for channel in range(3)]
    colours = Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
    grey = plain.convert("L").convert("RGB")
    return Image.blend(grey, colours.resize(plain.size, Image.Resampling.NEAREST), 0.6)


def hatched(image: Image.Image, grid: tuple[int, int], tokens: Collection[int]) -> Image.Image:
    """White strokes across tokens that the model never got to see, which no colour of the map could tell."""
    pen = ImageDraw.Draw(image)
    for left, top, right, bottom in _cells(image, grid, tokens):
        for part in (0.25, 0.75):
            across, down = (right - left) * part, (bottom - top) * part
            pen.line((left, top + down, left + across, top), fill="white", width=1)
            pen.line((left + across, bottom, right, top + down), fill="white", width=1)
    return image


def boxed(image: Image.Image, grid: tuple[int, int], tokens: Collection[int]) -> Image.Image:
    """Orange frames around tokens."""
    pen = ImageDraw.Draw(image)
    for left, top, right, bottom in _cells(image, grid, tokens):
        pen.rectangle((left, top, right - 1, bottom - 1), outline="white", width=5)
        pen.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=RED, width=3)
    return image


def ringed(image: Image.Image, grid: tuple[int, int], tokens: Collection[int]) -> Image.Image:
    """Blue rings in tokens."""
    pen = ImageDraw.Draw(image)
    for left, top, right, bottom in _cells(image, grid, tokens):
        inset = (right - left) * 0.18
        box = (left + inset, top + inset, right - inset, bottom - inset)
        pen.ellipse(box, outline="white", width=6)
        pen.ellipse(box, outline=BLUE, width=3)
    return image


def kept(look: Look, tokens: Collection[int]) -> Image.Image:
    """The picture with all but these tokens faded to white."""
    plain = _enlarged(look)
    mask = np.zeros(look.grid[0] * look.grid[1], dtype=np.uint8)
    mask[list(tokens)] = 255
    shown = Image.fromarray(mask.reshape(look.grid)).resize(plain.size, Image.Resampling.NEAREST)
    return Image.composite(plain, Image.blend(plain, Image.new("RGB", plain.size, "white"), 0.85), shown)


def data_uri(image: Image.Image) -> str:
    """The drawing inside the page: no file of it is left on the server."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def where(look: Look, values: Sequence[float]) -> str:
    """In which part of the picture a map is highest, in words for those who cannot see it.

    >>> from PIL import Image
    >>> where(Look(Image.new("RGB", (3, 3)), (3, 3), [], [], []), [0, 0, 0, 0, 0, 0, 0, 0, 1.0])
    'bottom right'
    """
    rows, columns = look.grid
    field = np.asarray(values, dtype=np.float64).reshape(rows, columns)
    thirds = [
        [part.sum() for part in np.array_split(band, 3, axis=1)] for band in np.array_split(field, 3, axis=0)
    ]
    row, column = divmod(int(np.argmax(thirds)), 3)
    name = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
    return "centre" if name == "middle centre" else name


def _enlarged(look: Look) -> Image.Image:
    factor = SIDE / max(look.pixels.size)
    size = (round(look.pixels.width * factor), round(look.pixels.height * factor))
    return look.pixels.resize(size, Image.Resampling.LANCZOS)


def _cells(image: Image.Image, grid: tuple[int, int], tokens: Collection[int]) -> list[tuple[float, ...]]:
    high, wide = image.height / grid[0], image.width / grid[1]
    return [
        (
            token % grid[1] * wide,
            token // grid[1] * high,
            (token % grid[1] + 1) * wide,
            (token // grid[1] + 1) * high,
        )
        for token in sorted(tokens)
    ]
