"""Inline SVG without scripts: intervals and curves. Every drawing has a label that says the same in words."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

COLOURS = ("#2f5fb3", "#c4522b", "#3c8a5a", "#8a5aa8", "#a07a1f", "#4a8a96")
"""Most colour-blind readers can distinguish them, and each has a contrast of 3 or more on white. On a page the style
sheet replaces them by its classes f0, f1, ... (fill) and s0, s1, ... (stroke), which have a dark form."""

_INK = 'class="ink" fill="#1d2430"'


def interval(value: float, low: float, high: float, *, colour: int = 0, width: int = 150, height: int = 14) -> Markup:
    """Draw a rate between 0 and 1 as a dot on its 95 % interval. colour: place in COLOURS."""
    left, right, middle = (4 + (width - 8) * min(1.0, max(0.0, x)) for x in (low, high, value))
    y = height / 2
    known = math.isfinite(value)
    shown = f"{value:.3f}" if known else "undecided"
    dot = f'<circle cx="{middle:.1f}" cy="{y}" r="4" {_fill(colour)}/>' if known else ""
    label = f"{shown}, 95 % interval {low:.3f} to {high:.3f}"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    ends = f'x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"'
    return Markup(
        f'<svg class="interval" role="img" aria-label="{label}" {size}>'
        f'<line x1="4" x2="{width - 4}" y1="{y}" y2="{y}" class="rule" stroke="#d5d9e0" stroke-width="2"/>'
        f'<line {ends} {_stroke(colour)} stroke-width="5" stroke-opacity=".35"/>'
        f"{dot}</svg>"
    )


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    width: int = 720,
    height: int = 220,
    what: str = "loss",
    ends: tuple[float, float] | None = None,
) -> Markup:
    """Draw lines over steps, between given ends, else on a logarithmic scale where all values are positive. A line
    breaks off where a run went back, and long lines are thinned to about 300 points."""
    series = {name: finite for name, points in series.items() if (finite := [p for p in points if math.isfinite(p[1])])}
    values = [y for points in series.values() for _, y in points]
    if not values:
        return Markup("")
    low, high = ends or (min(values), max(values))
    log = ends is None and low > 0
    scale: Callable[[float], float] = math.log10 if log else lambda y: y
    xs = [x for points in series.values() for x, _ in points]
    box = _Box(min(xs), max(xs), scale(low), scale(high), width, height)
    lines = [
        box.line([(x, scale(y)) for x, y in _thinned(part)], i)
        for i, points in enumerate(series.values())
        for part in _onward(points)
    ]
    spans = (f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in series.items())
    label = html.escape(f"{what} over steps: {'; '.join(spans)}")
    return Markup(
        f'<svg class="curves" role="img" aria-label="{label}" viewBox="0 0 {width} {height}">'
        + box.axes(low, high, what + (", log scale" if log else ""))
        + "".join(lines)
        + "".join(_key(name, i) for i, name in enumerate(series))
        + "</svg>"
    )


class _Box:
    """Maps data to places in the drawing."""

    def __init__(self, left: float, right: float, low: float, high: float, width: int, height: int):
        self.left, self.low = left, low
        self.across, self.up = max(right - left, 1e-9), max(high - low, 1e-9)
        self.right, self.width, self.height = right, width, height

    def place(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.left) / self.across, (y - self.low) / self.up
        return 56 + across * (self.width - 70), self.height - 26 - up * (self.height - 56)

    def line(self, points: Sequence[tuple[float, float]], colour: int) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        return f'<polyline points="{path}" fill="none" {_stroke(colour)} stroke-width="1.6"/>'

    def axes(self, low: float, high: float, what: str) -> str:
        bottom, top = self.height - 26, 30
        return (
            f'<path d="M56 {top}V{bottom}H{self.width - 14}" class="axis" fill="none" stroke="#9aa3af"/>'
            f'<text x="50" y="{top + 4}" text-anchor="end">{high:.3g}</text>'
            f'<text x="50" y="{bottom}" text-anchor="end">{low:.3g}</text>'
            f'<text x="56" y="{self.height - 8}">step {self.left:.0f}</text>'
            f'<text x="{self.width - 14}" y="{self.height - 8}" text-anchor="end">{self.right:.0f}</text>'
            f'<text x="{self.width - 14}" y="14" text-anchor="end">{html.escape(what)}</text>'
        )

    def rates(self, across: str, up: str) -> str:
        """Draw the axes of two rates, with the ends of their ranges."""
        bottom, top, right = self.height - 26, 30, self.width - 14
        ends = self.low, self.low + self.up
        return (
            f'<path d="M56 {top}V{bottom}H{right}" class="axis" fill="none" stroke="#9aa3af"/>'
            f'<text x="50" y="{top + 4}" text-anchor="end">{ends[1]:.2f}</text>'
            f'<text x="50" y="{bottom}" text-anchor="end">{ends[0]:.2f}</text>'
            f'<text x="56" y="{self.height - 8}">{self.left:.2f}</text>'
            f'<text x="{right}" y="{self.height - 8}" text-anchor="end">{self.left + self.across:.2f}</text>'
            f'<text x="{(56 + right) / 2:.0f}" y="{self.height - 8}" text-anchor="middle">{html.escape(across)}</text>'
            f'<text x="56" y="18">{html.escape(up)}</text>'
        )


def _fill(place: int) -> str:
    place %= len(COLOURS)
    return f'class="f{place}" fill="{COLOURS[place]}"'


def _stroke(place: int) -> str:
    place %= len(COLOURS)
    return f'class="s{place}" stroke="{COLOURS[place]}"'


def _onward(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Split points where the step falls."""
    parts: list[list[tuple[float, float]]] = []
    for point in points:
        if not parts or point[0] < parts[-1][-1][0]:
            parts.append([])
        parts[-1].append(point)
    return parts


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """Average over intervals of equal length."""
    size = max(1, math.ceil(len(points) / most))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _key(name: str, place: int) -> str:
    x = 60 + 130 * place
    line = f'<rect x="{x}" y="6" width="14" height="4" {_fill(place)}/>'
    return f'{line}<text x="{x + 20}" y="14">{html.escape(name)}</text>'


Interval = tuple[float, float, float]
"""(value, low, high)."""


def dot_plot(
    rows: Sequence[tuple[str, Sequence[Interval | None]]], panels: Sequence[str], *, width: int = 760
) -> Markup:
    """Draw rates with their 95 % intervals, on scales from 0 to 1, as a standalone SVG file.

    Args: `rows`, one per model: (title, interval or None for each panel); `panels`: titles, one per rate.
    """
    left, gap, step, top = max(160, 9 * max(len(title) for title, _ in rows)), 84, 30, 48
    each = (width - left) / len(panels) - gap
    height = top + step * len(rows) + 34
    parts = [f'<rect class="paper" width="{width}" height="{height}" fill="#ffffff"/>']
    for place, title in enumerate(panels):
        x = left + place * (each + gap)
        parts.append(_panel(title, x, each, top, height - 30))
        for i, (_, values) in enumerate(rows):
            if (value := values[place]) is not None:
                parts.append(_dot(value, x, each, top + step * (i + 0.5), 2 * place))
    for i, (title, _) in enumerate(rows):
        y = top + step * (i + 0.5) + 5
        parts.append(
            f'<text x="{left - 16}" y="{y}" text-anchor="end" font-size="14" {_INK}>{html.escape(title)}</text>'
        )
    label = html.escape(_in_words(rows, panels))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = 'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" {size} {font}>'
    return Markup(head + "".join(parts) + "</svg>")


def _panel(title: str, x: float, width: float, top: float, bottom: float) -> str:
    lines = [f'<text x="{x:.0f}" y="24" font-size="14" font-weight="600" {_INK}>{html.escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        at = x + share * width
        lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{bottom}" class="rule" stroke="#e2e6ec"/>')
        lines.append(
            f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle" font-size="12" class="quiet" fill="#5a6472">'
            f"{share:.0%}</text>"
        )
    return "".join(lines)


def _dot(value: Interval, x: float, width: float, y: float, colour: int) -> str:
    middle, low, high = (x + width * part for part in value)
    ends = f'x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"'
    return (
        f'<line {ends} {_stroke(colour)} stroke-width="7" stroke-opacity=".3" stroke-linecap="round"/>'
        f'<circle cx="{middle:.1f}" cy="{y}" r="5.5" {_fill(colour)}/>'
        f'<text x="{x + width + 12:.1f}" y="{y + 5}" font-size="13" {_INK}>{value[0]:.1%}</text>'
    )


@dataclass(frozen=True)
class Place:
    """A dot in a drawing of two rates, with their intervals. is_front: no other dot is better in both."""

    name: str
    across: Interval
    up: Interval
    is_front: bool


def trades(places: Sequence[Place], across: str, up: str, *, width: int = 720, height: int = 340) -> Markup:
    """Draw two rates against each other with their error bars, and the front as a line. across, up: titles of the
    axes."""
    if not places:
        return Markup("")
    xs, ys = (
        [end for rate in rates for end in rate] for rates in zip(*((p.across, p.up) for p in places), strict=True)
    )
    box = _Box(*_with_margin(xs), *_with_margin(ys), width, height)
    front = sorted((p.across[0], p.up[0]) for p in places if p.is_front)
    label = html.escape("; ".join(f"{p.name}: {across} {p.across[0]:.3f}, {up} {p.up[0]:.3f}" for p in places))
    return Markup(
        f'<svg class="curves trades" role="img" aria-label="{label}" viewBox="0 0 {width} {height}">'
        + box.rates(across, up)
        + (box.line(front, 2) if len(front) > 1 else "")
        + "".join(_cross(place, box, 2 if place.is_front else 0) for place in places)
        + "</svg>"
    )


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis: a twentieth beyond the values, and at least a tenth apart."""
    low, high = min(values), max(values)
    margin = max((high - low) / 20, (0.1 - (high - low)) / 2)
    return low - margin, high + margin


def _cross(place: Place, box: _Box, colour: int) -> str:
    x, y = box.place(place.across[0], place.up[0])
    left, right = (box.place(end, place.up[0])[0] for end in place.across[1:])
    bottom, top = (box.place(place.across[0], end)[1] for end in place.up[1:])
    bars = f"M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {bottom:.1f}V{top:.1f}"
    anchor, at = ("end", x - 8) if x > box.width * 0.75 else ("start", x + 8)
    return (
        f'<path d="{bars}" fill="none" {_stroke(colour)} stroke-width="1.6" stroke-opacity=".5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {_fill(colour)}/>'
        f'<text x="{at:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">{html.escape(place.name)}</text>'
    )


def _in_words(rows: Sequence[tuple[str, Sequence[Interval | None]]], panels: Sequence[str]) -> str:
    texts = [
        f"{title}: " + ", ".join(f"{panel} {v[0]:.1%}" for panel, v in zip(panels, values, strict=True) if v)
        for title, values in rows
    ]
    return "; ".join(texts)
