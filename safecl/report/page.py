"""Fills the HTML templates. Every text from a run is escaped, since a model's answer may contain markup and control
characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from safecl.config import ConfigError
from safecl.config.texts import visible
from safecl.report import charts
from safecl.storage.durable import replace_file

GENERATOR = '<meta name="generator" content="safecl">'

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
    loader=jinja2.PackageLoader("safecl.report", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=_visible,
)
_environment.filters["bytes"] = bytes_text
_environment.globals |= {"interval": charts.interval, "curves": charts.curves}


def render(template: str, **values: Any) -> str:
    """Return the whole page as HTML, with the style sheet in it."""
    return _environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> Path:
    """Write a page, whole or not at all; into a folder as report.html. Returns the path.

    Raises ConfigError where there is no such folder, and where the file exists and is not a page of safecl.
    """
    if path.is_dir():
        path = path / "report.html"
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ConfigError(
            f"{path}: exists already and was not made by `safecl report`; choose another file with --output"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: no such folder {path.absolute().parent}")
    replace_file(path, page)
    return path
