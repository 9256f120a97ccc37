"""Functions that a library decorates with torch.compile while it starts, and that a run never calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def compiling_late() -> Iterator[None]:
    """Let functions that are decorated with torch.compile in the `with` block be compiled at their first call.

    `deepspeed.initialize` imports DeepSpeed's Muon optimizer to see that the optimizer is another one. That decorates
    three functions, for which torch would load its compiler: a third of the start of a run.
    """
    compile_now = torch.compile

    def compile_late(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_late, **options)
        if isinstance(function, torch.nn.Module):
            return compile_now(function, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **named)

        return call

    torch.compile = compile_late  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
