"""Curves over the number of steps as one picture, drawn with Pillow: small panels side by side, one a quantity."""

import dataclasses
import math

from PIL import Image, ImageDraw, ImageFont

PANEL = 360, 250  # pixels
MARGIN = 62, 34, 14, 40  # left, top, right, bottom of a panel's field
LEGEND = 18  # a line of it
COLORS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e5ea2", "#c98a1b", "#4a4a4a")


@dataclasses.dataclass(frozen=True)
class Panel:
    """`curves`: by name, the value at each number of steps; `level`: a line across, such as the teacher's."""

    title: str
    curves: dict[str, dict[int, float]]
    level: float | None


def round_step(span: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a span into three to eight."""
    power = 10.0 ** math.floor(math.log10(span / 3))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= span / 3)


def draw_curves(panels: list[Panel]) -> Image.Image:
    """White, RGB; the curves of one name have one colour in all panels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    legend = [*names, "dashed: teacher"]
    picture = Image.new("RGB", (PANEL[0] * len(panels), PANEL[1] + LEGEND * len(legend) + 10), "white")
    drawing, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for place, panel in enumerate(panels):
        draw_panel(drawing, font, panel, colors, place * PANEL[0])
    for line, name in enumerate(legend):
        drawing.text((MARGIN[0], PANEL[1] + LEGEND * line), name, colors.get(name, "#555555"), font)
    return picture


def draw_panel(drawing: ImageDraw.ImageDraw, font, panel: Panel, colors: dict[str, str], left_edge: int) -> None:
    steps = sorted({step for curve in panel.curves.values() for step in curve})
    values = [value for curve in panel.curves.values() for value in curve.values()] + [0.0]
    values += [] if panel.level is None else [panel.level]
    low, high = min(values), max(max(values), 1e-9)
    left, right = left_edge + MARGIN[0], left_edge + PANEL[0] - MARGIN[2]
    top, bottom = MARGIN[1], PANEL[1] - MARGIN[3]

    def x_of(step: int) -> float:
        return left + (right - left) * (steps.index(step) + 0.5) / len(steps)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (1.05 * (high - low))

    drawing.text((left, 10), panel.title, "black", font)
    mark = math.ceil(low / (step := round_step(high - low))) * step
    while mark <= high:
        drawing.line([(left, y_of(mark)), (right, y_of(mark))], "#e4e4e4")
        drawing.text((left - 6, y_of(mark)), f"{mark:.4g}", "#555555", font, anchor="rm")
        mark += step
    drawing.line([(left, top), (left, bottom), (right, bottom)], "#888888")
    for number in steps:
        drawing.text((x_of(number), bottom + 6), f"{number}", "#555555", font, anchor="ma")
    drawing.text(((left + right) / 2, bottom + 22), "steps", "#555555", font, anchor="ma")
    if panel.level is not None:
        for x in range(left, right, 10):
            drawing.line([(x, y_of(panel.level)), (x + 5, y_of(panel.level))], "#555555", 2)
    for name, curve in panel.curves.items():
        points = [(x_of(number), y_of(curve[number])) for number in sorted(curve)]
        drawing.line(points, colors[name], 2)
        for x, y in points:
            drawing.ellipse([x - 3, y - 3, x + 3, y + 3], colors[name])
