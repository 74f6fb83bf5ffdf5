"""Draws a decoder's sink dimensions as a PNG, in colours that the colour-blind can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lvlm_fix.drawing import BLUE, GREY, INK, RED, Sheet, round_step

if TYPE_CHECKING:
    from lvlm_fix.sinks import SinkDims


def draw_sink_dims(sinks: SinkDims, massive: float, path: str | Path) -> None:
    """Activation of BOS by dimension, with the threshold and the dimensions found; `massive` as in `find_sink_dims`."""
    sheet = Sheet(1000, 360)
    left, right, top, bottom = 48.0, 900.0, 70.0, 310.0
    profile = np.array(sinks.profile)
    tick = round_step(max(float(profile.max()), sinks.threshold) * 1.1)
    highest = tick * 5
    title = "Activation of BOS by dimension: |x| / rms, median over prompts and layers from the third"
    sheet.text(16, 12, title, 15)
    found = ", ".join(map(str, sinks.dims)) or "none"
    rule = f"above the threshold, and {massive:g} times the token's median, which is {np.median(profile):.2g}"
    sheet.text(16, 36, f"sink dimensions: {found} ({rule})", 13)

    def place(dim: int, value: float) -> tuple[float, float]:
        across = (right - left) * (dim + 0.5) / sinks.width
        return left + across, bottom - (bottom - top) * value / highest

    for step in range(6):
        at = place(0, tick * step)[1]
        sheet.line([(left, at), (right, at)], "#e2e2e2" if step else GREY)
        sheet.text(left - 6, at, f"{tick * step:g}", 11, GREY, "rm")
    for dim in range(0, sinks.width, round(round_step(sinks.width))):
        sheet.text(place(dim, 0)[0], bottom + 6, str(dim), 11, GREY, "ma")
    sheet.text((left + right) / 2, bottom + 24, "dimension of the hidden state", 11, GREY, "ma")
    bar = max((right - left) / sinks.width * 0.8, 0.7)
    for dim, value in enumerate(profile.tolist()):
        if dim not in sinks.dims:
            sheet.line([place(dim, 0), place(dim, value)], BLUE, bar)
    at = place(0, sinks.threshold)[1]
    sheet.dashes(left, right, at, INK)
    sheet.text(right + 6, at, f"threshold {sinks.threshold:.3g}", 11, INK, "lm")
    for dim in sinks.dims:
        x, y = place(dim, profile[dim])
        sheet.line([place(dim, 0), (x, y)], RED, max(bar, 2.0))
        sheet.text(x, y - 2, f"{dim}: {profile[dim]:.1f}", 12, RED, "md")
    sheet.save(path)
