"""Fills the HTML templates. Every text from a run is escaped, since a model's answer may contain markup."""

from __future__ import annotations

from typing import Any

import jinja2

from safecl.report import charts

PLAIN_STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's own moments. Plain fine-tuning has them too, so they are not part of a method's cost."""


def bytes_text(count: float) -> str:
    """Format a number of bytes: 1,234,567 -> 1.2 MB."""
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
    """Return the whole page as HTML."""
    return _environment.get_template(template).render(**values)
