"""Fills a template; every text from a run is escaped, since a model's answer is nothing to be trusted."""

from __future__ import annotations

from typing import Any

import jinja2

from safecl.report import charts

PLAIN_STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's own moments, which plain fine-tuning has too: not what a method costs."""


def bytes_text(count: float) -> str:
    """1,234,567 -> 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("safecl.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_environment.filters["bytes"] = bytes_text
_environment.globals |= {"interval": charts.interval, "curves": charts.curves}


def render(template: str, **values: Any) -> str:
    """The whole page as text."""
    return _environment.get_template(template).render(**values)
