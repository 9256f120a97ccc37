"""The lines and the bar that a run shows while it trains."""

from __future__ import annotations

import io
import re
import threading

import pytest

from safecl.distributed.progress import counted, phase
from safecl.distributed.verbosity import Level, verbosity
from safecl.terminal import Terminal
from safecl.training.output.console import Console
from safecl.training.output.heartbeat import SECONDS, Heartbeat

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
    terminal = Terminal(file=out, width=width, force_terminal=True, color_system=None)
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


def lines_of(every: int = 100, steps: int = 3, of: int = 10) -> list[str]:
    """The lines of a log, where no terminal is."""
    out = io.StringIO()
    console = Console(every=every, rank=0, terminal=Terminal(file=out, width=200))
    with console, console.progress("t", of) as lines:
        console.fact("output", "runs/x")
        for _ in range(steps):
            lines.step(VALUES)
        console.warn("warning: few prompts")
    return out.getvalue().splitlines()


def test_lines_of_a_log_begin_with_the_time_and_say_about_how_long_it_takes():
    lines = lines_of()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines) and len(lines) == 3
    assert "t 1/10" in lines[1] and re.search(r"about [\d.]+ (s|min|h) left$", lines[1])


def test_quiet_keeps_warnings_alone_and_verbose_has_a_line_for_every_step(monkeypatch):
    monkeypatch.setattr(verbosity, "level", Level.QUIET)
    assert [line[9:] for line in lines_of()] == ["warning: few prompts"]
    monkeypatch.setattr(verbosity, "level", Level.VERBOSE)
    assert sum("/10" in line for line in lines_of()) == 3


def test_a_run_that_says_nothing_is_heard_of_and_one_that_speaks_is_not_interrupted():
    said, now = [], threading.Event()
    heartbeat = Heartbeat(lambda text: (said.append(text), now.set()), lambda: "t 1/10, still in phase save", 0.05)
    heartbeat.start()
    assert now.wait(10.0)
    heartbeat.stop()
    assert set(said) == {"t 1/10, still in phase save"} and not heartbeat._thread.is_alive()
    assert SECONDS + 1 < 60, "it looks once a second"
    silent = Heartbeat(said.append, lambda: "never", 1000.0)
    silent.start()
    silent.stop()
    assert "never" not in said


def test_the_heartbeat_of_a_log_says_the_phase_and_the_step():
    out = io.StringIO()
    console = Console(every=100, rank=0, terminal=Terminal(file=out, width=200))
    with console.progress("t", 10) as lines, phase("evaluation"):
        lines.step(VALUES)
        assert re.fullmatch(r"t 1/10  about \S+ \S+ left, still in phase evaluation", console._position())
        with counted("answers", 8):
            assert console._position().endswith("in phase evaluation: 0 of 8 answers")
    assert console._position().startswith("still in phase")
