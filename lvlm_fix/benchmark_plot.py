"""Ratios to plain as bars: what each setting costs, with quartiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_fix.drawing import BLUE, GREEN, GREY, INK, ORANGE, Sheet, round_step

MEASURES = (
    ("first_token", "first token", BLUE),
    ("token", "each token", ORANGE),
    ("answer", "whole answer", GREEN),
)
NAMES, BARS, BAR = 250, 520, 11


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG of a result of `lvlm-fix bench`: a group of bars for each setting of each case.

    Raises:
        OSError: the file cannot be written.
    """
    groups = [
        (_case(case), name, entry) for case in result["cases"] for name, entry in case["settings"].items()
    ]
    rows = len(groups) * (len(MEASURES) * BAR + 22)
    sheet = Sheet(NAMES + BARS + 60, 90 + rows + 30)
    sheet.text(16, 14, f"time, as ratio to plain: {result['model']}, {result['new_tokens']} tokens", 15)
    x = 16.0
    for _, label, colour in MEASURES:
        sheet.box((x, 42, x + 10, 52), fill=colour)
        sheet.text(x + 16, 47, label, 12, INK, "lm")
        x += 30 + sheet.length(label, 12)
    highest = max(entry["ratios"][key]["high"] for _, _, entry in groups for key, _, _ in MEASURES)
    step = float(round_step(highest))
    for tick in range(6):
        at = NAMES + BARS * tick / 5
        sheet.line([(at, 76), (at, 80 + rows)], "#e2e2e2" if tick else GREY)
        sheet.text(at, 70, f"{step * tick:.3g}", 11, GREY, "mm")
    y = 84.0
    for case, name, entry in groups:
        sheet.text(NAMES - 10, y + 10, _short(sheet, name), 12, INK, "rm")
        sheet.text(NAMES - 10, y + 25, case, 10, GREY, "rm")
        for key, _, colour in MEASURES:
            ratio = entry["ratios"][key]
            low, middle, high = (NAMES + BARS * ratio[end] / (5 * step) for end in ("low", "median", "high"))
            sheet.box((NAMES, y, middle, y + BAR - 2), fill=colour)
            sheet.line([(low, y + BAR / 2 - 1), (high, y + BAR / 2 - 1)], INK, 1.5)
            sheet.text(max(middle, high) + 5, y + BAR / 2 - 1, f"{ratio['median']:.2f}", 10, INK, "lm")
            y += BAR
        y += 22
    one = NAMES + BARS / (5 * step)
    sheet.line([(one, 76), (one, 80 + rows)], INK, 1)
    sheet.save(path)


def _case(case: Mapping[str, Any]) -> str:
    return f"batch of {case['batch_size']}, {case['prompt_tokens']} tokens"


def _short(sheet: Sheet, name: str) -> str:
    while sheet.length(name, 12) > NAMES - 26:
        name = name[:-2].rstrip("…") + "…"
    return name
