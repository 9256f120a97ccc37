"""Names the ranks that hold up the others.

Ranks wait for each other in every step, so the time of a step is the same on all of them. What differs is what a rank
does alone: the time that it waits for its rows, and the time that a fixed matrix product takes on its device. A rank is
a straggler where its median over 50 steps

    of the wait for rows is above that of all ranks by more than 20 % of the step, or
    of the matrix product is above that of all ranks by more than 20 %.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from safecl.distributed import collectives
from safecl.launching.status import SPEEDS

STEPS = 50
SLOWER = 0.2
_SIZES = {"cpu": 192, "cuda": 1024}
"""Sides of the matrices: a product takes about a millisecond on a core, and a tenth of one on a GPU."""


@dataclass
class Pace:
    """The times of this rank, and every 50 steps a comparison with the others. hosts: of all ranks, by rank.

    folder: the run folder; only rank 0 writes. note: prints a line on rank 0.
    """

    hosts: list[str]
    folder: Path
    note: Callable[[str], None]
    _probe: Probe = field(default_factory=lambda: Probe(collectives.device()))
    _steps: list[float] = field(default_factory=list)
    _waits: list[float] = field(default_factory=list)
    _named: set[str] = field(default_factory=set)

    def step(self, global_step: int, seconds: float, waited: float) -> None:
        """Take note of a step: its seconds, and those in which it waited for its rows. A collective call in every
        50th."""
        self._probe.start()
        self._steps.append(seconds)
        self._waits.append(waited)
        if len(self._steps) < STEPS:
            return
        own = [statistics.median(self._waits), self._probe.median()]
        every = collectives.gather_tensors(torch.tensor(own, dtype=torch.float64, device=collectives.device()))
        found = compare(self.hosts, every.tolist(), statistics.median(self._steps))
        self._steps.clear()
        self._waits.clear()
        if collectives.rank() == 0:
            self._report(global_step, found)

    def _report(self, global_step: int, found: Comparison) -> None:
        with (self.folder / SPEEDS).open("a", encoding="utf-8") as file:
            line = {"step": global_step, "slowest": found.slowest, "stragglers": found.stragglers}
            file.write(json.dumps(line | {"waits": found.waits, "products": found.products}) + "\n")
        for rank, message in zip(found.ranks, found.stragglers, strict=True):
            if rank not in self._named:  # once, not every 50 steps
                self.note(f"step {global_step}: {message}")
        self._named = set(found.ranks)


@dataclass(frozen=True)
class Comparison:
    """The ranks of a job side by side. waits, products: seconds by rank. ranks: names of the stragglers."""

    slowest: str
    stragglers: list[str]
    ranks: list[str]
    waits: list[float]
    products: list[float]


def compare(hosts: list[str], times: list[list[float]], step: float) -> Comparison:
    """Compare the ranks' medians. times: [wait for rows, matrix product] by rank, in seconds. step: seconds of a
    step."""
    waits, products = [each[0] for each in times], [each[1] for each in times]
    usual_wait, usual_product = statistics.median_low(waits), statistics.median_low(products)
    stragglers: dict[str, str] = {}
    costs = []
    for rank, (wait, product) in enumerate(times):
        late, slow = (wait - usual_wait) / step, product / usual_product - 1
        costs.append(max(late, slow))
        name = f"rank {rank} on {hosts[rank]}"
        if late > SLOWER:
            stragglers[name] = (
                f"{name} holds up the others: it waits {1e3 * wait:.0f} ms for its rows in a step of "
                f"{1e3 * step:.0f} ms (all ranks: {1e3 * usual_wait:.0f} ms); look at its disk"
            )
        elif slow > SLOWER:
            stragglers[name] = (
                f"{name} computes {slow:.0%} slower than the others: a fixed product takes {1e3 * product:.2f} ms "
                f"there and {1e3 * usual_product:.2f} ms elsewhere; look for heat, power limits and other processes"
            )
    worst = max(range(len(times)), key=costs.__getitem__)
    described = f"rank {worst} on {hosts[worst]}, {max(0.0, costs[worst]):.0%} behind the median of the ranks"
    return Comparison(described, list(stragglers.values()), list(stragglers), waits, products)


class Probe:
    """A fixed matrix product, timed once a step. On a GPU it is queued, and its time is read later."""

    def __init__(self, device: torch.device):
        size = _SIZES["cuda" if device.type == "cuda" else "cpu"]
        self._a = torch.full((size, size), 0.5, device=device)
        self._out = torch.empty_like(self._a)
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Make the product once."""
        if not self._a.is_cuda:
            began = time.perf_counter()
            torch.mm(self._a, self._a, out=self._out)
            self._seconds.append(time.perf_counter() - began)
            return
        pair = _event(), _event()
        pair[0].record()
        torch.mm(self._a, self._a, out=self._out)
        pair[1].record()
        self._events.append(pair)

    def median(self) -> float:
        """Return the median seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds = [begin.elapsed_time(end) / 1e3 for begin, end in self._events]
        found = statistics.median(self._seconds)
        self._seconds, self._events = [], []
        return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # it has no annotations
