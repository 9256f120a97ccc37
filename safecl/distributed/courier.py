"""Carries heartbeats and the verdict between the ranks' watchdogs, through the store that the process group began with.

The store may lie in a process that is stopped, and then its calls never return. So they are made on a thread of their
own, and nobody waits for them without a limit.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from safecl.distributed.hearts import Heartbeat, Hearts, Verdict

_VERDICT = "verdict"
_CONNECT = timedelta(seconds=30)
_RUNS = itertools.count()


def own_connection(name: str) -> dist.Store | None:
    """Connect to the store of the process group a second time, with keys of our own; None for a store without TCP."""
    store = distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    again = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=_CONNECT)
    return dist.PrefixStore(f"safecl-watchdog-{name}", again)


def number_of_run() -> int:
    """Return a number that no earlier run of this process has."""
    return next(_RUNS)


class Courier:
    """The connection of one rank. Its methods return at once, or after `seconds` at most."""

    def __init__(self, store: dist.Store, rank: int, num_ranks: int):
        self._store, self._rank, self._ranks = store, rank, range(num_ranks)
        self._errands: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._is_broken = False
        self.verdict: Verdict | None = None
        """The decision to end the job, of whichever rank made it."""
        self.first_heart: Heartbeat | None = None
        """The last heartbeat of rank 0, whose process often holds the store."""
        self._thread = threading.Thread(target=self._run, name="safecl-courier", daemon=True)
        self._thread.start()

    def publish(self, beat: Heartbeat) -> None:
        """Show the heartbeat to the other ranks, and ask for a verdict, as soon as the store answers."""
        if len(self._errands) < 4:
            self._send(lambda: self._show(beat))

    def read(self, beat: Heartbeat, seconds: float) -> Hearts | None:
        """Read the hearts of all ranks; None where the store does not answer."""
        found: Hearts = {}

        def errand() -> None:
            self._show(beat)
            found.update({rank: self._heart(rank) for rank in self._ranks})

        return found if self._send(errand).wait(seconds) else None

    def post(self, verdict: Verdict, seconds: float) -> Verdict:
        """Let all ranks end by this verdict; return the one that was first. Where the store does not answer, this
        rank ends by its own."""

        def errand() -> None:
            self.verdict = Verdict.from_json(self._store.compare_set(_VERDICT, "", verdict.to_json()))

        self._send(errand).wait(seconds)
        return self.verdict or verdict

    def say_told(self) -> None:
        """Say that this rank has written its stacks."""
        self._send(lambda: self._store.set(f"told/{self._rank}", ""))

    def wait_until_told(self, ranks: list[int], seconds: float) -> None:
        """Wait until these ranks have written their stacks."""
        deadline = time.monotonic() + seconds

        def errand() -> None:
            while not self._store.check([f"told/{rank}" for rank in ranks]) and time.monotonic() < deadline:
                time.sleep(0.05)

        self._send(errand).wait(0.0 if self._is_broken else seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(1.0)  # it may wait for a store that does not answer

    # -------------------------------------------------------------------------------------------------------- errands

    def _send(self, errand: Callable[[], object]) -> threading.Event:
        """Do the errand on the thread. Return the event of its success."""
        done = threading.Event()

        def work() -> None:
            errand()
            done.set()

        with self._changed:
            self._errands.append(work)
            self._changed.notify()
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._errands and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                errand = self._errands.pop(0)
            try:
                errand()
            except RuntimeError:  # the process with the store has ended; errands wait in vain from now on
                self._is_broken = True
                return

    def _show(self, beat: Heartbeat) -> None:
        self._store.set(f"heart/{self._rank}", beat.to_json())
        self.first_heart = self._heart(0)
        if self.verdict is None and self._store.check([_VERDICT]):
            self.verdict = Verdict.from_json(self._store.get(_VERDICT))

    def _heart(self, rank: int) -> Heartbeat | None:
        name = f"heart/{rank}"
        return Heartbeat.from_json(self._store.get(name)) if self._store.check([name]) else None
