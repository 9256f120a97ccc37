"""`safecl status RUN`: the state of a run, read from its folder on any machine that sees it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from safecl.launching.status import status_of


def show_status(folder: Path, as_json: bool) -> None:
    """Print the state of the run in a folder. Raises ConfigError where there is none."""
    found = status_of(folder)
    if as_json:
        print(found.to_json())
        return
    console = Console(highlight=False, soft_wrap=True)
    for label, text in found.facts:
        console.print(f"[bold]{label:<14}[/bold]", end="")
        console.print(text, markup=False)
