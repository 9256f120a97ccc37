"""`safecl status RUN`: the state of a run, read from its folder on any machine that sees it."""

from __future__ import annotations

from pathlib import Path

from safecl.launching.status import status_of
from safecl.terminal import Terminal, fact


def show_status(folder: Path, as_json: bool) -> None:
    """Print the state of the run in a folder. Raises ConfigError where there is none."""
    found = status_of(folder)
    if as_json:
        print(found.to_json())
        return
    console = Terminal()
    for label, text in found.facts:
        console.print(fact(label, text))
