"""The Pareto front of safety and accuracy, with error bars: which cells no other cell beats in both.

front         no other cell has both a lower attack success rate and a higher accuracy (one of them may be equal)
within error  one has, but its intervals overlap this cell's in both
beaten        one has, and in at least one of the two its interval is apart
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from safecl.evaluation.statistics.pooled import Spread

Standing = Literal["front", "within error", "beaten"]
Trade = tuple[Spread, Spread]
"""The attack success rate and the accuracy of a cell."""


def standings(trades: Sequence[Trade | None]) -> list[Standing | None]:
    """Return the standing of each cell among all; None where it was not measured."""
    known = [trade for trade in trades if trade is not None]
    return [_standing(trade, known) if trade is not None else None for trade in trades]


def _standing(own: Trade, trades: Sequence[Trade]) -> Standing:
    better = [other for other in trades if _beats(other, own)]
    if not better:
        return "front"
    return (
        "beaten" if any(_apart(o, s) for other in better for o, s in zip(other, own, strict=True)) else "within error"
    )


def _beats(other: Trade, own: Trade) -> bool:
    (asr, accuracy), (own_asr, own_accuracy) = other, own
    no_worse = asr.mean <= own_asr.mean and accuracy.mean >= own_accuracy.mean
    return no_worse and (asr.mean < own_asr.mean or accuracy.mean > own_accuracy.mean)


def _apart(a: Spread, b: Spread) -> bool:
    (low_a, high_a), (low_b, high_b) = _bar(a), _bar(b)
    return high_a < low_b or high_b < low_a


def _bar(value: Spread) -> tuple[float, float]:
    low = value.mean if value.low is None else value.low
    return low, value.mean if value.high is None else value.high


def pareto_svg(names: Sequence[str], trades: Sequence[Trade | None]) -> str:
    """Draw the cells with their error bars, and the front as a line. Returns an SVG document, the same for the same
    numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "safecl", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        measured = [(n, t, s) for n, t, s in zip(names, trades, standings(trades), strict=True) if t is not None]
        for name, (asr, accuracy), standing in measured:
            colour = {"front": "#0b6e4f", "within error": "#8a8a00", "beaten": "#8c8c8c", None: "black"}[standing]
            bars = [[[v.mean - _bar(v)[0]], [_bar(v)[1] - v.mean]] for v in (asr, accuracy)]
            axes.errorbar(asr.mean, accuracy.mean, xerr=bars[0], yerr=bars[1], fmt="o", color=colour, capsize=2)
            axes.annotate(name, (asr.mean, accuracy.mean), xytext=(5, 4), textcoords="offset points", color=colour)
        front = sorted((asr.mean, accuracy.mean) for _, (asr, accuracy), standing in measured if standing == "front")
        axes.plot([x for x, _ in front], [y for _, y in front], color="#0b6e4f", linewidth=1, zorder=0)
        axes.set_xlabel("attack success rate (lower is better)")
        axes.set_ylabel("accuracy (higher is better)")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": "safety and accuracy of the cells"})
        pyplot.close(figure)
    return buffer.getvalue()
