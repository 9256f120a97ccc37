"""Fills the HTML templates. Every text from a run is escaped, since a model's answer may contain markup and control
characters."""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from safecl.config.texts import visible
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


def _visible(value: Any) -> Any:
    """Show control characters in all that the templates insert, also in markup that is made already."""
    if isinstance(value, Markup):
        return Markup(visible(value))
    return visible(value) if isinstance(value, str) else value


_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("safecl.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=_visible,
)
_environment.filters["bytes"] = bytes_text
_environment.globals |= {"interval": charts.interval, "curves": charts.curves}


def render(template: str, **values: Any) -> str:
    """Return the whole page as HTML."""
    return _environment.get_template(template).render(**values)
