"""A plot of one number by setting, with intervals, as inline SVG that keeps its order and labels on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lvlm_fix.evals.report_markup import Markup, element
from lvlm_fix.evals.report_plots import ticks

WIDTH, LEFT, RIGHT, TOP, BOTTOM, STEP = 380, 148, 14, 8, 40, 25  # about one CSS pixel each on a phone


@dataclass(frozen=True)
class Row:
    """A setting: its name, the number, its interval, and whether it is the one that the others are held against."""

    name: str
    value: float
    low: float
    high: float
    plain: bool = False


def intervals(rows: Sequence[Row], label: str, title: str) -> Markup:
    """A point and a line a setting, from the top down, with a dashed line through the plain model's.

    Args:
        rows: at least one.
        label: of the axis.
        title: for those who cannot see it; the numbers follow of themselves.
    """
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    marks = ticks(low - 0.04 * (high - low), high + 0.04 * (high - low), 7)
    low, high = min(low, marks[0]), max(high, marks[-1])
    floor = TOP + STEP * len(rows)

    def at(value: float) -> float:
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    told = "; ".join(f"{row.name}: {row.value:.1f} ({row.low:.1f} to {row.high:.1f})" for row in rows)
    return element(
        "svg",
        element("title", title, id="intervals-title"),
        element("desc", told, id="intervals-desc"),
        *(part for mark in marks for part in _tick(mark, at(mark), floor)),
        *(
            element("line", x1=at(row.value), x2=at(row.value), y1=TOP, y2=floor, class_="held")
            for row in rows
            if row.plain
        ),
        *(
            part
            for number, row in enumerate(rows)
            for part in _row(row, TOP + STEP * (number + 0.5), *map(at, (row.low, row.value, row.high)))
        ),
        element("text", label, x=(LEFT + WIDTH - RIGHT) / 2, y=floor + 34, class_="name middle"),
        viewBox=f"0 0 {WIDTH} {floor + BOTTOM}", role="img", class_="plot",
        aria_labelledby="intervals-title", aria_describedby="intervals-desc",
    )  # fmt: skip


def _tick(mark: float, x: float, floor: float) -> Iterator[Markup]:
    yield element("line", x1=x, x2=x, y1=TOP, y2=floor, class_="grid")
    yield element("text", f"{mark:g}", x=x, y=floor + 15, class_="tick middle")


def _row(row: Row, y: float, low: float, value: float, high: float) -> Iterator[Markup]:
    kind = "plain" if row.plain else "other"
    yield element("text", row.name, x=LEFT - 8, y=y + 4, class_="label end")
    yield element(
        "path",
        d=f"M{low:.1f} {y:g}H{high:.1f}M{low:.1f} {y - 4:g}v8M{high:.1f} {y - 4:g}v8",
        class_="interval",
    )
    yield element("circle", cx=value, cy=y, r=4.5, class_=kind)
