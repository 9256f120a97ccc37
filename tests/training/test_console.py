"""The lines and the bar that a run shows while it trains."""

from __future__ import annotations

import io

import pytest
import rich.console

from safecl.training.console import Console

VALUES = {
    "loss/task": 2.8689,
    "loss/replay": 0.05,
    "loss/penalty": 0.02,
    "grad_norm": 7.29,
    "skipped_steps": 0,
    "memory_bytes": 2**30,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.0,
}


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_count_of_steps_shows_on_any_terminal_and_the_losses_as_far_as_there_is_room(width):
    out = io.StringIO()
    terminal = rich.console.Console(file=out, width=width, force_terminal=True, color_system=None)
    with Console(every=1, rank=0, terminal=terminal).progress("my-first-task", 1200, done=340) as steps:
        steps.step(VALUES)
    shown = out.getvalue().replace("\r", "\n")
    assert "341/1200" in shown and "task 2.8689" in shown and "my-first-task" in shown
    assert ("tok/s" in shown) == (width == 160)
    console = Console(every=1, rank=0, terminal=terminal)
    with console.progress("t", 2) as steps, console.working("measuring"):  # a second display would spoil the first
        steps.step(VALUES)
    with console.working("measuring after"):
        pass
    assert "measuring after" in out.getvalue() and "measuring\n" not in out.getvalue()
    assert all(len(line) <= width for line in shown.split("\n") if "\x1b" not in line)
