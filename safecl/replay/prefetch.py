"""Prefetch of the next step's rows.

The rows of a step are known before it begins (order and draws are functions of the step), so a thread can read them
while the step before it computes: `Prefetcher(load)` runs `load(step + 1)` as soon as `get(step)` has returned. Draws
that depend on losses use those of two steps before (scores.py), so prefetching does not change what is drawn.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from safecl.distributed import devices

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `load(step)` one step ahead on a thread.

    stop: the first step that is not loaded, None for no end. wait_seconds: seconds that callers have waited in total.
    An exception in `load` is raised by the `get` of its step. Close it, or use it in a `with` block, before the source
    that `load` reads is closed.
    """

    def __init__(self, load: Callable[[int], T], stop: int | None = None):
        self.load, self.stop = load, stop
        self.wait_seconds = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="safecl-prefetch")
        self._ahead: tuple[int, Future[T]] | None = None
        self._lock = threading.Lock()

    def get(self, step: int) -> T:
        """Return `load(step)` and start to load the next step. Any step is allowed, but only the next one is ready."""
        began = time.perf_counter()
        with self._lock:
            future = self._take(step)
            try:
                value = future.result()
            finally:
                self.wait_seconds += time.perf_counter() - began
            if self.stop is None or step + 1 < self.stop:
                self._ahead = (step + 1, self._thread.submit(self.load, step + 1))
        return value

    def _take(self, step: int) -> Future[T]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            return ahead[1]
        if ahead is not None and not ahead[1].cancel():
            ahead[1].exception()  # it is running: wait, so that `load` never runs twice at once
        return self._thread.submit(self.load, step)

    def settle(self) -> None:
        """Return when nothing is being loaded. A loaded step stays ready, and an error waits for its step."""
        with self._lock:
            if self._ahead is not None:
                self._ahead[1].exception()

    def close(self) -> None:
        """Wait for the running load, if any, and drop it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def can_pin() -> bool:
    """True where host memory can be pinned for asynchronous copies: where ranks compute on GPUs."""
    return devices.on_gpu()


def pinned(value: Any) -> Any:
    """Copy the CPU tensors in nested dicts, lists, tuples and dataclasses to pinned memory. On the CPU the value is
    returned unchanged."""
    if not can_pin():
        return value
    if isinstance(value, torch.Tensor):
        return value.pin_memory() if value.device.type == "cpu" and not value.is_pinned() else value
    if isinstance(value, dict):
        return {key: pinned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(pinned(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: pinned(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        )
    return value
