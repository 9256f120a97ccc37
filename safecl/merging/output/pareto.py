"""The plot of a sweep: utility against attack success rate, with the front of points that no other beats."""

from __future__ import annotations

import io
from collections.abc import Sequence

from safecl.merging.choice import Measured
from safecl.merging.points import text_of

PLOT = "sweep.svg"


def draw(kind: str, points: Sequence[Measured], front: Sequence[int], picked: int | None) -> bytes:
    """Return the plot as SVG. Intervals are 95 %; utility has one where there is one task."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "safecl", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="utility", ylabel="attack success rate", title=f"{kind}: safety and utility")
        for index, point in enumerate(points):
            if point.asr is None or point.utility is None:
                continue
            colour = "#c4522b" if index == picked else "#2f5fb3" if index in front else "#9aa3af"
            axes.errorbar(point.utility, point.asr, _beside(point), _across(point), "o", color=colour, elinewidth=0.8)
            axes.annotate(
                text_of(point.settings), (point.utility, point.asr), (5, 4), textcoords="offset points", size=8
            )
        line = sorted(
            (u, a) for i in front if (u := points[i].utility) is not None and (a := points[i].asr) is not None
        )
        axes.plot([u for u, _ in line], [a for _, a in line], color="#2f5fb3", linewidth=1, label="front")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _beside(point: Measured) -> list[list[float]]:
    """Distances from the ASR to the ends of its interval, as matplotlib takes them."""
    safety = point.evaluation.safety
    assert safety is not None, "a point without an ASR is not drawn"
    return [[max(0.0, safety.asr.value - safety.asr.low)], [max(0.0, safety.asr.high - safety.asr.value)]]


def _across(point: Measured) -> list[list[float]] | None:
    if len(point.evaluation.tasks) != 1:
        return None
    ((_, task),) = point.evaluation.tasks.items()
    low, high = task.value.value - task.value.low, task.value.high - task.value.value
    ends = (low, high) if task.higher_is_better else (high, low)
    return [[max(0.0, end)] for end in ends]
