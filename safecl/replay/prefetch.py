"""The next step's rows, ready before they are asked for.

What a step needs is known before it begins (order and draws are functions of the step), so a thread can read it while
the step before it computes: `Prefetcher(load)` runs `load(step + 1)` as soon as `get(step)` has returned. Draws that
depend on losses use those of two steps before (scores.py), so fetching ahead changes nothing of what is drawn.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from safecl.replay.rows import TeacherOutputs

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `load(step)` one step ahead on a thread.

    stop: the first step that is not loaded any more, None for no end. wait_seconds: how long callers waited in all,
    what a step loses. What `load` raises is raised by the `get` of its step. Close it, or use it in a `with` block,
    before what `load` reads from goes away.
    """

    def __init__(self, load: Callable[[int], T], stop: int | None = None):
        self.load, self.stop = load, stop
        self.wait_seconds = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="safecl-prefetch")
        self._ahead: tuple[int, Future[T]] | None = None
        self._lock = threading.Lock()

    def get(self, step: int) -> T:
        """What `load(step)` returns; the next step is then begun. Any step may be asked for, but only the next one is
        ready."""
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
            ahead[1].exception()  # it runs already: wait, so that `load` never runs twice at once
        return self._thread.submit(self.load, step)

    def settle(self) -> None:
        """Returns when nothing is being loaded; what was loaded stays ready, and errors wait for their step."""
        with self._lock:
            if self._ahead is not None:
                self._ahead[1].exception()

    def close(self) -> None:
        """Waits for the load under way, if any, and drops it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def can_pin() -> bool:
    """True where host memory can be pinned for copies that do not stall: where there is a CUDA device."""
    return torch.cuda.is_available()


def pinned(value: Any) -> Any:
    """The same nested dicts, lists, tuples and dataclasses with CPU tensors in pinned memory; unchanged without a CUDA
    device."""
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


def stack_outputs(outputs: Sequence[TeacherOutputs]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs of several rows one after the other, copied once, from the mapped files to (pinned) memory.

    Returns log_probs fp16 [targets, k], indices int32 [targets, k], log_tail fp32 [targets]. Raises ValueError where k
    or dtypes differ.
    """
    widths = {(o.log_probs.shape[1], str(o.log_probs.dtype)) for o in outputs}
    if len(widths) != 1:
        raise ValueError(f"outputs of one batch must have one k and dtype, not {sorted(widths)}")
    return tuple(_joined([getattr(o, name) for o in outputs]) for name in ("log_probs", "indices", "log_tail"))


def _joined(arrays: list[np.ndarray]) -> torch.Tensor:
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    tensor = torch.empty(shape, dtype=_TORCH[arrays[0].dtype.type], pin_memory=can_pin())
    np.concatenate(arrays, out=tensor.numpy())
    return tensor


_TORCH = {np.float16: torch.float16, np.float32: torch.float32, np.int32: torch.int32}
