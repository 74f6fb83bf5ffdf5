"""A white sheet to draw on with Pillow, and line charts by layer, in colours that the colour-blind can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Everything is drawn this much larger and scaled down, for Pillow's lines have no soft edges."""

# Okabe and Ito's palette
INK, GREY, BLUE, ORANGE, GREEN = "#1a1a1a", "#8a8a8a", "#0072b2", "#e69f00", "#009e73"
RED = "#d55e00"
CHART_HEIGHT = 190


class Sheet:
    """A white sheet in points; `SCALE` pixels each until it is saved."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: int = 13, fill: str = INK, anchor: str = "la"
    ) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), text, fill, font, anchor)

    def length(self, text: str, size: int = 13) -> float:
        return self.pen.textlength(text, ImageFont.load_default(size * SCALE)) / SCALE

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float = 1) -> None:
        at = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(at, fill, round(width * SCALE), joint="curve")

    def dashes(self, start: float, end: float, y: float, fill: str) -> None:
        x = start
        while x < end:
            self.line([(x, y), (min(x + 6, end), y)], fill, 1.5)
            x += 10

    def box(
        self, at: tuple[float, ...], outline: str | None = None, fill: Any = None, width: float = 1
    ) -> None:
        self.pen.rectangle([value * SCALE for value in at], fill, outline, round(width * SCALE))

    def ring(
        self, x: float, y: float, radius: float, outline: str | None, fill: Any = None, width: float = 2
    ) -> None:
        at = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self.pen.ellipse(at, fill, outline, round(width * SCALE))

    def paste(self, image: Image.Image, x: float, y: float) -> None:
        self.image.paste(image, (round(x * SCALE), round(y * SCALE)))

    def save(self, path: str | Path) -> None:
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(path, format="PNG")


@dataclass(frozen=True)
class Series:
    """One line of a chart; `mark` is `round` or `square`, so that lines differ in more than colour."""

    name: str
    values: Sequence[float]
    colour: str
    mark: str = "round"


def chart(
    sheet: Sheet,
    place: tuple[float, float, float],
    title: str,
    series: Sequence[Series],
    highest: float,
    limit: tuple[float, str] | None = None,
) -> None:
    x, y, width = place
    left, right, top, bottom = x + 34, x + width, y + 24, y + CHART_HEIGHT
    sheet.text(x, y, title, 13)
    for step in range(5):
        at = bottom - (bottom - top) * step / 4
        sheet.line([(left, at), (right, at)], "#e2e2e2" if step else GREY)
        sheet.text(left - 6, at, f"{highest * step / 4:.3g}", 11, GREY, "rm")
    layers = max(len(one.values) for one in series)
    if not layers:
        sheet.text((left + right) / 2, (top + bottom) / 2, "not measured", 12, GREY, "mm")
        return
    spacing = (right - left - 16) / max(layers - 1, 1)
    every = max(1, -(-layers // 12))
    for layer in range(0, layers, every):
        sheet.text(left + 8 + layer * spacing, bottom + 4, str(layer + 1), 11, GREY, "ma")
    sheet.text((left + right) / 2, bottom + 20, "layer of the decoder", 11, GREY, "ma")
    for order, one in enumerate(series):
        points = [
            (left + 8 + layer * spacing, bottom - (bottom - top) * min(value / highest, 1))
            for layer, value in enumerate(one.values)
        ]
        wider = 1.6 if order < len(series) - 1 else 1.0  # so that it shows where the next lies over it
        sheet.line(points, one.colour, 2 * wider)
        for point in points:
            _mark(sheet, *point, one, wider)
    if limit is not None:
        at = bottom - (bottom - top) * limit[0] / highest
        sheet.dashes(left, right, at, RED)
    entries: list[tuple[Series | None, str]] = [(one, one.name) for one in series] if len(series) > 1 else []
    entries += [(None, limit[1])] if limit is not None else []
    for line, (entry, name) in enumerate(entries):
        at = bottom + 44 + 16 * line
        if entry is None:
            sheet.dashes(left, left + 16, at, RED)
        else:
            sheet.line([(left, at), (left + 16, at)], entry.colour, 2)
            _mark(sheet, left + 8, at, entry)
        sheet.text(left + 22, at, name, 11, INK, "lm")


def _mark(sheet: Sheet, x: float, y: float, series: Series, wider: float = 1.0) -> None:
    size = 4 * wider
    if series.mark == "square":
        sheet.box((x - size, y - size, x + size, y + size), outline="white", fill=series.colour)
    else:
        sheet.ring(x, y, size, "white", series.colour, 1)


def round_step(highest: float) -> float:
    """A round number that five times is at least `highest`."""
    power = 10.0 ** np.floor(np.log10(highest / 5))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step * 5 >= highest)
