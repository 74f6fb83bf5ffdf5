"""Plots of a report as inline SVG: drawn at the size of a phone, in colours and shapes that the page's CSS names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .report_markup import Markup, element, join
from .settings import PLAIN

WIDTH, HEIGHT = 380, 300  # units of the drawing; about one CSS pixel each on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 44
RADIUS = 5.5
COLOURS = 8  # classes s0 to s7 of report.css; s0 is the plain model's
_SHAPES = ("circle", "square", "triangle", "diamond", "upturned", "pentagon", "hexagon")
_LETTER = 6.9  # mean width of a letter of a label
_LINE = 13.0
LONGEST_LABEL = 24
Box = tuple[float, float, float, float]  # left, top, right, bottom
_Place = tuple[float, float]
_At = Callable[[float, float], _Place]


@dataclass(frozen=True)
class Point:
    """A setting in a plot: its place, and the interval of its y."""

    name: str
    index: int  # decides colour and shape
    x: float
    y: float
    low: float
    high: float


def scatter(points: Sequence[Point], x_label: str, y_label: str, title: str, text: str, name: str) -> Markup:
    """A labelled scatter plot with intervals, x from zero on.

    Args:
        title, text: for those who cannot see it; `text` must hold the numbers.
        name: unique on the page.
    """
    most = max(point.x for point in points)
    low, high = min(point.low for point in points), max(point.high for point in points)
    margin = (high - low) * 0.06 or 0.5
    x_ticks, y_ticks = ticks(0, most * 1.06), ticks(low - margin, high + margin)
    x_span = (0.0, most * 1.14 or 1.0)
    y_span = (min(low - margin, y_ticks[0]), max(high + margin, y_ticks[-1]))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_span[0]) / (x_span[1] - x_span[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - y_span[0]) / (y_span[1] - y_span[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    places = [at(point.x, point.y) for point in points]
    bars = [(at(point.x, point.low)[1], at(point.x, point.high)[1]) for point in points]
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", text, id=f"{name}-desc"),
        *_axes(x_ticks, y_ticks, at, x_label, y_label),
        *(_bar(point, x, *bar) for point, (x, _), bar in zip(points, places, bars, strict=True)),
        *(marker(point.index, x, y) for point, (x, y) in zip(points, places, strict=True)),
        *_labels(points, places, bars),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
        class_="plot",
    )


def marker(index: int, x: float, y: float, radius: float = RADIUS) -> Markup:
    """A setting's sign at a place of a drawing: no two of the first 56 settings share colour and shape."""
    shape, colour = _SHAPES[index % len(_SHAPES)], f"s{index % COLOURS}"
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=radius, class_=colour)
    corners, turn = {
        "square": (4, 45.0), "triangle": (3, 0.0), "diamond": (4, 0.0),
        "upturned": (3, 180.0), "pentagon": (5, 0.0), "hexagon": (6, 30.0),
    }[shape]  # fmt: skip
    reach = radius * (1.35 if corners == 3 else 1.2)
    angles = [math.radians(turn + 360 * corner / corners) for corner in range(corners)]
    places = [(x + reach * math.sin(angle), y - reach * math.cos(angle)) for angle in angles]
    return element("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), class_=colour)


def sign(index: int) -> Markup:
    """A setting's sign beside its name in running text."""
    return element(
        "svg",
        marker(index, 8, 8),
        viewBox="0 0 16 16",
        width=16,
        height=16,
        class_="sign",
        aria_hidden="true",
    )


def level(index: int, share: float) -> Markup:
    """A bar as long as `share` (0 to 1) of what there is room for; the number stands beside it as text."""
    bar = element("rect", width=f"{100 * share:.2f}%", height="100%", rx=1.5, class_=f"s{index % COLOURS}")
    return element("svg", bar, class_="level", aria_hidden="true")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two bounds, at least two of them.

    >>> ticks(0, 0.034), ticks(83.1, 89.9)
    ([0.0, 0.01, 0.02, 0.03], [84.0, 85.0, 86.0, 87.0, 88.0, 89.0])
    """
    if not high > low:
        low, high = low - 0.5, low + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    if last <= first:  # bounds on either side of one round number
        first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], at: _At, x_label: str, y_label: str
) -> Iterator[Markup]:
    floor, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in y_ticks:
        y = at(0, value)[1]
        yield element("line", x1=LEFT, x2=end, y1=y, y2=y, class_="grid")
        yield element("text", f"{value:g}", x=LEFT - 6, y=y + 4, class_="tick end")
    for value in x_ticks:
        x = at(value, 0)[0]
        yield element("line", x1=x, x2=x, y1=floor, y2=floor + 4, class_="axis")
        yield element("text", f"{value:,g}", x=x, y=floor + 16, class_="tick middle")
    yield element("line", x1=LEFT, x2=end, y1=floor, y2=floor, class_="axis")
    yield element("text", x_label, x=(LEFT + end) / 2, y=HEIGHT - 8, class_="name middle")
    middle = (TOP + floor) / 2
    turned = f"rotate(-90 12 {middle:g})"
    yield element("text", y_label, x=12, y=middle, transform=turned, class_="name middle")


def _bar(point: Point, x: float, low: float, high: float) -> Markup:
    path = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    return element("path", d=path, class_=f"interval s{point.index % COLOURS}")


def _labels(points: Sequence[Point], places: Sequence[_Place], bars: Sequence[_Place]) -> Iterator[Markup]:
    """Names beside their signs, where they cover least; far ones with a line to their sign."""
    taken: list[tuple[float, Box]] = [(2, (x - 8, y - 8, x + 8, y + 8)) for x, y in places]
    for (x, _), span in zip(places, bars, strict=True):
        taken.append((1, (x - 4, span[1], x + 4, span[0])))
        # A label's halo wipes out thin lines, and the end of this one is what tells the interval.
        taken += [(8, (x - 8, y - 5, x + 8, y + 5)) for y in span]
    for point, (x, y) in zip(points, places, strict=True):
        text = setting_name(point.name)
        text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
        width = len(text) * _LETTER
        choices = []
        for lift in (0, -14, 14, -26, 26, -40, 40, -56, 56, -72, 72):
            for anchor, left, away in (
                ("start", x + 11, 0.0),
                ("end", x - 11 - width, 1.0),
                ("middle", x - width / 2, 14.0),
            ):
                box = (left, y + lift - _LINE / 2, left + width, y + lift + _LINE / 2)
                choices.append((_covered(box, taken) + 1.5 * (abs(lift) + away), abs(lift), anchor, box))
        _, lift, anchor, box = min(choices)
        taken.append((4, box))
        edge = {"start": box[0], "end": box[2], "middle": x}[anchor]
        if lift > 20:
            yield element("line", x1=x, y1=y, x2=edge, y2=box[3] if box[3] < y else box[1], class_="leader")
        yield element("text", text, x=edge, y=box[3] - 3, class_=f"label {anchor}")


def _covered(box: Box, taken: Sequence[tuple[float, Box]]) -> float:
    """How much of other things a label covers, each by its weight; what leaves the drawing counts most."""
    inside = _shared(box, (LEFT + 2, TOP - 10, WIDTH - 8, HEIGHT - BOTTOM - 2))
    outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
    return 8 * outside + sum(weight * _shared(box, other) for weight, other in taken)


def _shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def setting_name(name: str) -> str:
    """What a page calls a setting.

    >>> setting_name("none"), setting_name("damro")
    ('plain', 'damro')
    """
    return "plain" if name == PLAIN else name


def breakable(name: str) -> Markup:
    """What a page calls a setting, with places where a narrow column may break it."""
    parts = re.split(r"(?<=[(,])", setting_name(name))
    return join([piece for part in parts for piece in (element("wbr"), part)][1:])


def legend(names: Sequence[str]) -> Markup:
    """The signs of all settings with their full names."""
    entries = [element("li", join([sign(index), setting_name(name)])) for index, name in enumerate(names)]
    return element("ul", *entries, class_="legend")
