"""Line charts as small PNGs, drawn with Pillow: panels two a row, one legend below."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PANEL_PX = (400, 290)
PANELS_A_ROW = 2
MARGINS_PX = (56, 30, 14, 42)  # left, top, right, bottom of the axes within a panel
LEGEND_ROW_PX = 22
LEGEND_COLUMN_PX = 200
FONT_PX = 13
OVERSAMPLE = 2  # drawn larger and scaled down, for smooth lines
COLOURS = 48
INK, GRID = "#333333", "#dddddd"
# Okabe and Ito's palette: told apart by colour-blind readers; the first is the teacher's.
PALETTE = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Axis:
    """One direction of a panel. low, high: in data units, ends of the axis; ticks: where it is labelled."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, label: str, values: Sequence[float]) -> Axis:
        """An axis whose ends are round numbers that hold all values."""
        low, high = min(values), max(values)
        span = high - low or abs(high) or 1.0
        step = _round_step(span / 5)
        first, last = math.floor(low / step), math.ceil(high / step)
        last += first == last
        return cls(label, first * step, last * step, tuple(i * step for i in range(first, last + 1)))

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


def draw_panels(panels: Sequence[Panel], x_label: str, y_label: str) -> Image.Image:
    """Panels on common axes. A label has one colour and marker in all of them, in order of appearance.

    Raises: ValueError when there is no point to draw.
    """
    points = [point for panel in panels for line in panel.lines for point in line.points]
    if not points:
        raise ValueError("a chart needs at least one point")
    x = Axis.around(x_label, [point[0] for point in points])
    y = Axis.around(y_label, [point[1] for point in points])
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    width = PANEL_PX[0] * min(len(panels), PANELS_A_ROW)
    below = PANEL_PX[1] * -(-len(panels) // PANELS_A_ROW)
    columns = width // LEGEND_COLUMN_PX
    height = below + LEGEND_ROW_PX * -(-len(labels) // columns) + 6
    image = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE), "white")
    canvas = _Canvas(ImageDraw.Draw(image))
    for i, panel in enumerate(panels):
        corner = (i % PANELS_A_ROW * PANEL_PX[0], i // PANELS_A_ROW * PANEL_PX[1])
        _draw_panel(canvas, panel, corner, x, y, labels)
    for i, label in enumerate(labels):
        left, top = i % columns * LEGEND_COLUMN_PX + 14, below + i // columns * LEGEND_ROW_PX + 8
        canvas.line([(left, top), (left + 26, top)], _colour(i))
        canvas.marker((left + 13, top), i)
        canvas.text((left + 34, top), label, "lm")
    return image.resize((width, height), Image.Resampling.LANCZOS).quantize(COLOURS)


class _Canvas:
    """Drawing in units of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw
        self.font = ImageFont.load_default(FONT_PX * OVERSAMPLE)

    def line(self, points: Sequence[Point], colour: str, width: float = 2) -> None:
        if len(points) > 1:
            self.draw.line([_scaled(p) for p in points], colour, round(width * OVERSAMPLE), joint="curve")

    def text(self, at: Point, text: str, anchor: str) -> None:
        """Without accents, which Pillow's own font lacks."""
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        self.draw.text(_scaled(at), text, fill=INK, font=self.font, anchor=anchor)

    def marker(self, at: Point, index: int, radius: float = 4) -> None:
        """Filled circle, square, triangle or diamond, by the line's place in the legend."""
        x, y = at
        r, colour, kind = radius, _colour(index), index % 4
        corners = [
            [],
            [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
            [(x, y - r), (x + r, y + r), (x - r, y + r)],
            [(x, y - r - 1), (x + r + 1, y), (x, y + r + 1), (x - r - 1, y)],
        ][kind]
        if corners:
            self.draw.polygon([_scaled(corner) for corner in corners], fill=colour)
        else:
            self.draw.ellipse([_scaled((x - r, y - r)), _scaled((x + r, y + r))], fill=colour)


def _draw_panel(canvas: _Canvas, panel: Panel, corner: Point, x: Axis, y: Axis, labels: Sequence[str]) -> None:
    left, top = corner[0] + MARGINS_PX[0], corner[1] + MARGINS_PX[1]
    right, bottom = corner[0] + PANEL_PX[0] - MARGINS_PX[2], corner[1] + PANEL_PX[1] - MARGINS_PX[3]

    def at(point: Point) -> Point:
        return left + x.place(point[0]) * (right - left), bottom - y.place(point[1]) * (bottom - top)

    for tick in x.ticks:
        canvas.line([at((tick, y.low)), at((tick, y.high))], GRID, 1)
        canvas.text((at((tick, y.low))[0], bottom + 6), f"{tick:.6g}", "mt")
    for tick in y.ticks:
        canvas.line([at((x.low, tick)), at((x.high, tick))], GRID, 1)
        canvas.text((left - 6, at((x.low, tick))[1]), f"{tick:.6g}", "rm")
    canvas.line([(left, top), (left, bottom), (right, bottom)], INK, 1)
    canvas.text(((left + right) / 2, bottom + 24), x.label, "mt")
    canvas.text((left, top - 8), ": ".join(part for part in (panel.title, y.label) if part), "lb")
    for line in panel.lines:
        index = labels.index(line.label)
        canvas.line([at(point) for point in line.points], _colour(index))
        for point in line.points:
            canvas.marker(at(point), index)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _scaled(point: Point) -> Point:
    return point[0] * OVERSAMPLE, point[1] * OVERSAMPLE
