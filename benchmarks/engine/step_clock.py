"""The seconds of an engine's steps and of the phases in them, without a wait between the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

PHASES = ("forward", "backward", "step")


class Watch:
    """Seconds of steps, and of an engine's forward, backward and step in them, by events on a GPU."""

    def __init__(self, engine: Any, cuda: bool):
        self.cuda, self.begins = cuda, []
        self.marks: list[dict[str, list[tuple[Any, Any]]]] = []
        if cuda:
            torch.cuda.synchronize()
        for phase in PHASES:
            setattr(engine, phase, self._timed(phase, getattr(engine, phase)))

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            begin = self._now()
            result = call(*arguments, **settings)
            self.marks[-1][phase].append((begin, self._now()))
            return result

        return timed

    def begin_step(self) -> None:
        self.begins.append(self._now())
        self.marks.append({phase: [] for phase in PHASES})

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each phase and of the whole, by step: until the next one begins, or all work is
        done."""
        if self.cuda:
            torch.cuda.synchronize()
        ends = [*self.begins[1:], self._now()]
        if self.cuda:
            torch.cuda.synchronize()
        between = (lambda a, b: a.elapsed_time(b) / 1e3) if self.cuda else (lambda a, b: b - a)
        return [
            {phase: sum(between(*pair) for pair in pairs) for phase, pairs in marks.items()}
            | {"whole step": between(begin, end)}
            for marks, begin, end in zip(self.marks, self.begins, ends, strict=True)
        ]
