"""Drawings of a run's report as SVG text: curves over the steps, and a table before and after.

Colours are classes of the page's style sheet, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 300  # drawn of one curve
WIDTH, HEIGHT = 360, 210  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 34  # its margins
LABEL_WIDTH = 62  # of the numbers at a disc


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `lows` and `highs`, where given, bound its band; None in them is a point without one."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    dots: bool = False  # a mark at each point


def thinned(count: int, most: int) -> list[int]:
    """At most `most` >= 2 indices below `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def number(value: float) -> str:
    """Four digits of a number, whole ones in full."""
    return str(int(value)) if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high` > `low`, `most` + 1 of them or fewer, 1, 2 or 5 * 10^n apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


class Axes:
    """The place of (step, value) in a chart that holds all of `curves`."""

    def __init__(self, curves: Sequence[Curve]):
        steps = [step for curve in curves for step in curve.steps]
        drawn = [value for curve in curves for value in (*curve.values, *curve.lows, *curve.highs)]
        values = [value for value in drawn if value is not None]
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)
        low, high = min(values), max(values)
        margin = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-6)
        self.low, self.high = low - margin, high + margin

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def point(self, step: float, value: float) -> str:
        return f"{self.x(step):.1f},{self.y(value):.1f}"

    def grid(self) -> list[str]:
        """Lines and numbers of both axes."""
        bottom, parts = HEIGHT - BOTTOM, []
        marks = ticks(self.low, self.high, 6)
        digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
        for value in marks:
            y = self.y(value)
            text = f"{value:.{digits}f}" if digits < 6 else f"{value:.3g}"
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for step in ticks(self.first, self.last, 6):
            if step == int(step):
                x = self.x(step)
                parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{int(step)}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
        return parts


def line_chart(title: str, curves: Sequence[Curve], mark: int | None = None) -> str:
    """A chart of `curves`, of which one has a point at least; `mark` is a step to point out."""
    axes = Axes(curves)
    parts = axes.grid()
    if mark is not None:
        parts.append(f'<path class="mark" d="M{axes.x(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for index, curve in enumerate(curves):
        kept = thinned(len(curve.steps), MOST_POINTS)
        parts += _band(axes, curve, kept, index)
        points = " ".join(axes.point(curve.steps[i], curve.values[i]) for i in kept)
        parts.append(f'<polyline class="line c{index}" points="{points}"/>')
        if curve.dots or len(kept) == 1:
            parts += [_dot(axes, curve, i, index) for i in kept]
    label = html.escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _band(axes: Axes, curve: Curve, kept: Sequence[int], index: int) -> list[str]:
    bounds = [(curve.steps[i], *bound) for i in kept if (bound := _bound(curve, i)) is not None]
    outline = [axes.point(step, high) for step, _, high in bounds]
    outline += [axes.point(step, low) for step, low, _ in reversed(bounds)]
    return [f'<polygon class="band c{index}" points="{" ".join(outline)}"/>'] if bounds else []


def _bound(curve: Curve, i: int) -> tuple[float, float] | None:
    """Lower and upper edge of the band at a point; None where it has none."""
    low, high = (curve.lows[i], curve.highs[i]) if curve.lows else (None, None)
    return None if low is None or high is None else (low, high)


def _dot(axes: Axes, curve: Curve, i: int, index: int) -> str:
    step, value, bound = curve.steps[i], curve.values[i], _bound(curve, i)
    interval = "" if bound is None else f" ({number(bound[0])} to {number(bound[1])})"
    text = html.escape(f"{curve.label}, step {step}: {number(value)}{interval}")
    circle = f'<circle class="dot c{index}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="3.5">'
    return f"{circle}<title>{text}</title></circle>"


def table_picture(
    before: Sequence[Sequence[float]],
    before_weights: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    after_weights: Sequence[Sequence[float]],
    sigmas: Sequence[float] | None,
) -> str:
    """Positions `[N-1][K]` on the line of each interval, from its noisy end (0) to its clean one (1), as discs.

    A disc's area is its weight; above the line the table after, below it, hollow, the one before, both with their
    numbers. `sigmas` `[N]` name the ends where they are known.
    """
    left, right, width, lane = 136, 60, 900, 106
    span = width - left - right
    height = lane * len(after) + 30
    parts = [
        f'<text class="small" x="{left}" y="14">0, noisy end</text>',
        f'<text class="small" x="{left + span}" y="14" text-anchor="end">position in the interval, clean end, 1</text>',
    ]
    for row, rows in enumerate(zip(before, before_weights, after, after_weights, strict=True)):
        y = 30 + lane * (row + 0.5)
        parts.append(f'<path class="axis" d="M{left} {y:.1f}h{span}"/>')
        parts.append(f'<text class="name" x="0" y="{y + 4:.1f}">interval {row}</text>')
        if sigmas is not None:
            start, end = f"σ {sigmas[row]:.3g}", f"{sigmas[row + 1]:.3g}"
            parts.append(f'<text class="small" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{start}</text>')
            parts.append(f'<text class="small" x="{left + span + 8}" y="{y + 4:.1f}">{end}</text>')
        parts += _discs("old", f"before, interval {row}", left, span, y + 13, y + 34, *rows[:2])
        parts += _discs("new", f"after, interval {row}", left, span, y - 13, y - 38, *rows[2:])
    label = "positions and weights of each interval, before and after"
    return f'<svg class="table" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _discs(
    kind: str,
    name: str,
    left: float,
    span: float,
    y: float,
    text_y: float,
    positions: Sequence[float],
    weights: Sequence[float],
) -> list[str]:
    """The discs of one interval at height `y`, and below `text_y` their numbers, moved apart where they would touch."""
    parts, free = [], -math.inf
    for point, (position, weight) in enumerate(zip(positions, weights, strict=True)):
        x = left + position * span
        text_x = max(x, free)
        free = text_x + LABEL_WIDTH
        title = f"{name}, point {point}: position {position:.6f}, weight {weight:.6f}"
        radius = 13 * math.sqrt(weight)
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{title}</title></circle>'
        )
        for text, line in ((f"{position:.3f}", 0), (f"w {weight:.3f}", 13)):
            place = f'x="{text_x:.1f}" y="{text_y + line:.1f}" text-anchor="middle"'
            parts.append(f'<text class="value {kind}" {place}>{text}</text>')
    return parts
