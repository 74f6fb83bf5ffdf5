"""Draws a diagnosis as a PNG, in colours that the colour-blind can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvlm_fix import premises
from lvlm_fix.drawing import (
    BLUE,
    CHART_HEIGHT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    SCALE,
    Series,
    Sheet,
    chart,
)
from lvlm_fix.methods import DAMRO, VAR, ZipVL

if TYPE_CHECKING:
    from lvlm_fix.diagnosis import Diagnosis
    from lvlm_fix.observation import View

# Anchors of matplotlib's cividis, dark to light.
HEAT = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"]
SIDE, GAP, MARGIN, MOST_PICTURES = 216, 14, 24, 6


def draw_diagnosis(diagnosis: Diagnosis, path: str | Path) -> None:
    """Verdicts; each picture plain, under CLS attention with outliers, and cut to the kept tokens; charts by layer."""
    views = diagnosis.views[:MOST_PICTURES]
    columns = max(len(views), 5)
    width = 2 * MARGIN + columns * (SIDE + GAP) - GAP
    top = 118
    pruned = any(view.kept is not None for view in views)
    below = top + 20 + (3 if pruned else 2) * (SIDE + GAP) - 2
    rows = below - top + 28 if views else 0
    charts = top + rows + 26
    sheet = Sheet(width, charts + CHART_HEIGHT + 86)
    shown = f", {len(views)} shown" if len(views) < diagnosis.pictures else ""
    plural = "s" * (diagnosis.pictures != 1)
    sheet.text(MARGIN, 14, f"{diagnosis.model}: {diagnosis.pictures} picture{plural}{shown}", 17)
    for line, (name, premise) in enumerate(diagnosis.premises.items()):
        y = 42 + 18 * line
        _verdict(sheet, MARGIN + 6, y + 8, premise.holds)
        sheet.text(MARGIN + 18, y, f"{name} {'holds' if premise.holds else 'fails'}")
        sheet.text(MARGIN + 120, y, _fitting(sheet, premise.sentence, width - 2 * MARGIN - 120))
    for column, view in enumerate(views):
        _draw_view(sheet, view, MARGIN + column * (SIDE + GAP), top + 20)
    if views:
        _legend(sheet, MARGIN, below, views[0].seen.vision.source, pruned)
    _charts(sheet, diagnosis, charts, width)
    sheet.save(path)


def _draw_view(sheet: Sheet, view: View, x: float, y: float) -> None:
    rows, columns = view.grid
    plain = Image.fromarray((view.pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    # A picture keeps its shape inside the square that it is given.
    longest = max(plain.width, plain.height)
    width, height = SIDE * plain.width / longest, SIDE * plain.height / longest
    size = (round(width * SCALE), round(height * SCALE))
    plain = plain.resize(size, Image.Resampling.LANCZOS)
    sheet.text(x, y - 18, _fitting(sheet, view.name, SIDE), 12, INK)
    sheet.paste(plain, x, y)
    y += SIDE + GAP
    scores = view.seen.vision.feature_scores
    heat = _heat((scores / scores.max().clamp_min(1e-12)).sqrt().reshape(rows, columns))
    grey = plain.convert("L").convert("RGB")
    sheet.paste(Image.blend(grey, heat.resize(size, Image.Resampling.NEAREST), 0.6), x, y)
    cell = (width / columns, height / rows)
    found = premises.outliers(view.seen, DAMRO())[0]
    for index in found.cls.tolist():
        left, upper = x + index % columns * cell[0], y + index // columns * cell[1]
        at = (left + 1, upper + 1, left + cell[0] - 1, upper + cell[1] - 1)
        sheet.box(at, outline="white", width=3)
        sheet.box(at, outline=RED, width=2)
    for index in found.norm.tolist():
        centre = (x + (index % columns + 0.5) * cell[0], y + (index // columns + 0.5) * cell[1])
        sheet.ring(*centre, min(cell) * 0.36, "white", width=3)
        sheet.ring(*centre, min(cell) * 0.33, BLUE, width=2)
    if view.kept is None:
        return
    y += SIDE + GAP
    kept = Image.fromarray((view.kept.reshape(rows, columns).numpy() * 255).astype(np.uint8))
    faded = Image.blend(plain, Image.new("RGB", size, "white"), 0.85)
    sheet.paste(Image.composite(plain, faded, kept.resize(size, Image.Resampling.NEAREST)), x, y)


def _heat(values: Tensor) -> Image.Image:
    """Colours of values (rows, columns) in 0..1."""
    anchors = np.array([[int(code[at : at + 2], 16) for at in (1, 3, 5)] for code in HEAT])
    place = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values.numpy(), place, anchors[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def _legend(sheet: Sheet, x: float, y: float, source: str, pruned: bool) -> None:
    name = premises.attention_name(source)
    ramp = _heat(torch.linspace(0, 1, 90)[None]).resize((90 * SCALE, 12 * SCALE), Image.Resampling.BILINEAR)
    sheet.paste(ramp, x, y + 2)
    x = _label(sheet, x + 96, y, f"{name}, 0 to the picture's largest, root scale")
    sheet.box((x, y + 2, x + 12, y + 14), outline=RED, width=2)
    x = _label(sheet, x + 18, y, f"outlier: {premises.CLS_OUTLIER:g} times the mean {name}")
    sheet.ring(x + 6, y + 8, 6, BLUE)
    x = _label(sheet, x + 18, y, f"outlier: {premises.NORM_OUTLIER:g} times the upper quartile of norms")
    if pruned:
        sheet.text(MARGIN, y + 18, "Last row: the tokens that VTC-CLS keeps; the others are faded.", 12, GREY)


def _label(sheet: Sheet, x: float, y: float, text: str) -> float:
    """Write, and say where the next thing can begin."""
    sheet.text(x, y + 1, text, 12)
    return x + sheet.length(text, 12) + 24


def _charts(sheet: Sheet, diagnosis: Diagnosis, y: float, width: int) -> None:
    var, zipvl = diagnosis.premises[VAR.name].numbers, diagnosis.premises[ZipVL.name].numbers
    each = (width - 2 * MARGIN - 2 * 36) / 3
    places = [(MARGIN + number * (each + 36), y, each) for number in range(3)]
    sinks = list(var.get("image_sinks_by_layer", ()))
    highest = max([1.0, *sinks])
    chart(sheet, places[0], "VAR: image sinks a picture", [Series("image sinks", sinks, BLUE)], highest)
    heads = [
        Series("give the image 20 % or more", var.get("image_heads_by_layer", ()), BLUE),
        Series(
            "image-centric, in layers with sinks",
            var.get("image_centric_heads_by_layer", ()),
            ORANGE,
            "square",
        ),
    ]
    chart(sheet, places[1], "VAR: share of heads, for the last token", heads, 1.0)
    needed = [Series("tokens needed", zipvl.get("needed_by_layer", ()), GREEN)]
    limit = (premises.NEEDED, "ZipVL's limit for the mean")
    chart(sheet, places[2], "ZipVL: share of tokens with 97.5 % of attention", needed, 1.0, limit)


def _verdict(sheet: Sheet, x: float, y: float, holds: bool) -> None:
    """A full disc, or a crossed-out one: the words beside it do not need the colour."""
    if holds:
        sheet.ring(x, y, 5, GREEN, GREEN)
    else:
        sheet.line([(x - 4, y - 4), (x + 4, y + 4)], RED, 2)
        sheet.line([(x - 4, y + 4), (x + 4, y - 4)], RED, 2)


def _fitting(sheet: Sheet, text: str, width: float) -> str:
    while sheet.length(text) > width:
        text = (
            text.removesuffix(" ...").rpartition(" ")[0] + " ..." if " " in text else text[: len(text) // 2]
        )
    return text
