"""Ends a job in which a rank hangs, and says which one, where, and what all ranks were doing.

A thread of each rank looks once a second whether the process has made progress (progress.py), and shows the other ranks
its heartbeat (courier.py). A rank whose phase has lasted longer than its limit without a beat asks for the end. The
ranks that hold up the others are found from two readings of all hearts (hearts.py). Then every rank writes its Python
stacks and its last collective calls into the run folder and ends with code 1. A rank that cannot, because it is stopped
or holds Python's lock, is woken, asked for its stacks, and killed by a living rank of its host (ending.py).

Time counts only while the process is awake: a laptop that slept, or a job that was paused as a whole, has not hung.
Signals work during a hang too: SIGTERM shortens the limit, and a second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safecl.distributed import collectives, courier, environment, rank_files, recorder
from safecl.distributed.ending import STACKS, end_members, say, write_stacks
from safecl.distributed.hearts import Heartbeat, Hearts, Verdict, describe, judge, this_member
from safecl.distributed.progress import PROGRESS, STEP, HangTimeout, phase
from safecl.distributed.signals import name_of, set_handler

FAILED, STOPPED = 1, 75
"""Exit codes, see safecl.exits."""

SECONDS_AFTER_A_SIGNAL = 20.0
"""Limit of a step once a signal has asked for the end; 3 x the median step where that is more."""
SECONDS_AFTER_A_SIGNAL_ELSEWHERE = 300.0
SECONDS_AFTER_A_SECOND_CTRL_C = 3.0
SECONDS_AFTER_A_DEATH = 15.0
"""Time in which a rank may fail by itself when another rank of its host has ended."""
TICKS_OF_SILENCE = 6
"""A heart that stands still for as long no longer beats."""
SECONDS_FOR_THE_STORE = 5.0
SECONDS_FOR_STACKS = 5.0
SECONDS_BETWEEN_LOOKS = 1.0


class Watchdog:
    """Watches the ranks of one run. `attach`, and `close` with `together`, are collective calls."""

    def __init__(self, folder: Path, timeout: HangTimeout):
        """folder: the run folder. timeout: train.hang_timeout."""
        self.folder = folder / "hangs" / time.strftime("%Y%m%d-%H%M%S")
        PROGRESS.begin_run(timeout)
        self.tick = min(SECONDS_BETWEEN_LOOKS, timeout / 8) if isinstance(timeout, float | int) else 1.0
        self._memory = os.memfd_create("safecl-stacks")
        self.own = this_member(f"/proc/{os.getpid()}/fd/{self._memory}")
        self.members = {self.own.rank: self.own}
        self._courier: courier.Courier | None = None
        self._awake, self._progressed_at, self._position = 0.0, 0.0, PROGRESS.position()
        self._ticks, self._died_at = 0, -1.0
        self._interrupts: list[tuple[float, object]] = []
        self._signal: str | None = None
        self._timeouts: dict[str, float] = {}
        self._pipe, self._closing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC), threading.Event()
        self._wakeup: int | None = None
        self._launcher = environment.launcher()
        self._thread = threading.Thread(target=self._watch, name="safecl-watchdog", daemon=True)

    # --------------------------------------------------------------------------------------------------- start and end

    def start(self) -> None:
        """Watch this process alone. Ranks are watched after `attach`."""
        PROGRESS.entered = self._set_timeouts
        with contextlib.suppress(ValueError):  # outside of the main thread Python handles no signals
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        set_handler(STACKS, signal.SIG_DFL)
        faulthandler.register(STACKS, file=self._memory, all_threads=True, chain=True)
        self._thread.start()

    def attach(self) -> None:
        """Join the other ranks. A collective call of all of them, once the process group is there."""
        self._set_timeouts()
        if collectives.world_size() == 1:
            return
        rank_0 = collectives.gather_objects([(self.folder, courier.number_of_run())])[0]
        self.folder = rank_0[0]
        self.members = {member.rank: member for member in collectives.gather_objects([self.own])}
        if (store := courier.own_connection(f"{rank_0[1]}")) is not None:
            self._courier = courier.Courier(store, self.own.rank, len(self.members))

    def close(self, *, together: bool = False) -> None:
        """Stop watching. A second call does nothing. together: all ranks call it now, so that none misses another."""
        if self._closing.is_set():
            return
        if together:
            self._agree()
        self._closing.set()
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        if self._courier is not None:
            self._courier.close()
        PROGRESS.entered = lambda: None
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
        faulthandler.unregister(STACKS)
        set_handler(STACKS, signal.SIG_IGN)
        for handle in (*self._pipe, self._memory):
            os.close(handle)

    def _agree(self) -> None:
        """Wait for all ranks. A rank that was woken after the others had given it up must not end well."""
        collectives.barrier()
        if self._courier is not None:
            self._courier.read(self._heartbeat(), SECONDS_FOR_THE_STORE)
            if self._courier.verdict is not None:
                self._thread.join()  # it ends the process

    # ------------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closing.is_set():
            if select.select([self._pipe[0]], [], [], self.tick)[0]:
                self._take_signals(os.read(self._pipe[0], 512))
            now = time.monotonic()
            if now - before >= self.tick / 2 and not self._closing.is_set():
                self._awake += min(now - before, 2 * self.tick)  # more means that the process or the machine slept
                before = now
                self._look()

    def _look(self) -> None:
        if (position := PROGRESS.position()) != self._position:
            self._position, self._progressed_at = position, self._awake
        self._ticks += 1
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            say("the launcher has ended: finishing this step and saving")
            os.kill(os.getpid(), signal.SIGTERM)
        beat = self._heartbeat()
        verdict = None
        if self._courier is not None:
            self._courier.publish(beat)
            verdict = self._courier.verdict
        verdict = verdict or self._verdict_on_a_death()
        if verdict is None and beat.age > beat.limit:
            verdict = self._ask_for_the_end(beat)
        if self._ignores_a_second_ctrl_c():
            say(f"stopped: Ctrl-C twice, in the phase {PROGRESS.phase}; the same command resumes the last checkpoint")
            rank_files.leave(STOPPED)
        if verdict is not None and not self._closing.is_set():
            self._end(verdict)

    def _heartbeat(self) -> Heartbeat:
        age = self._awake - self._progressed_at
        last = recorder.last_collective(only_running=age < 3 * self.tick)
        return Heartbeat(PROGRESS.phase, age, self._limit(), str(last), last.number, last.waits, self._ticks)

    def _limit(self) -> float:
        limit = PROGRESS.limit()
        if self._signal is None:
            return limit
        if PROGRESS.phase != STEP:
            return min(limit, SECONDS_AFTER_A_SIGNAL_ELSEWHERE)
        seconds = list(PROGRESS.step_seconds)
        return min(limit, max(SECONDS_AFTER_A_SIGNAL, 3 * statistics.median(seconds) if seconds else 0.0))

    def _set_timeouts(self) -> None:
        """Let collective calls fail by themselves only after the watchdog should have acted, those of groups that
        DeepSpeed has made since the last call as well."""
        seconds = collectives.timeout_of_phase()
        for group in recorder.groups():
            if self._timeouts.get(group.group_name) != seconds:
                recorder.set_timeout(group, seconds)
                self._timeouts[group.group_name] = seconds

    # -------------------------------------------------------------------------------------------------------- verdicts

    def _verdict_on_a_death(self) -> Verdict | None:
        """Return a verdict where another rank of this host has ended, and this one has not failed by itself since."""
        here = [m for m in self.members.values() if m.host == self.own.host and m.rank != self.own.rank]
        dead = next((m for m in here if not m.is_alive), None)
        if dead is None:
            self._died_at = -1.0
            return None
        self._died_at = self._awake if self._died_at < 0 else self._died_at
        if self._awake - self._died_at < SECONDS_AFTER_A_DEATH:
            return None
        return self._post(Verdict((dead.rank,), f"{dead} has ended, and the other ranks still wait for it"))

    def _ask_for_the_end(self, beat: Heartbeat) -> Verdict:
        before = after = self._hearts(beat)
        now = replace(beat, ticks=beat.ticks + 1)
        for _ in range(TICKS_OF_SILENCE):
            if before is None or after is None:
                return self._verdict_without_a_store(now)
            if all(after[rank] != before[rank] for rank in before):
                break
            time.sleep(self.tick)
            after = self._hearts(now)
        assert before is not None
        if after is None:
            return self._verdict_without_a_store(now)
        return self._post(self._verdict(now, judge(before, after), before, after))

    def _hearts(self, beat: Heartbeat) -> Hearts | None:
        if self._courier is None:
            return {self.own.rank: beat}
        return self._courier.read(beat, SECONDS_FOR_THE_STORE)

    def _verdict_without_a_store(self, own: Heartbeat) -> Verdict:
        """The store is in the process of rank 0, or in that of torchrun on its host."""
        if environment.launcher_keeps_store():
            verdict = self._verdict(own, (), {}, {})
            return replace(verdict, message=f"{verdict.message}torchrun on the host of rank 0 does not answer")
        hearts: Hearts = {0: self._courier.first_heart if self._courier is not None else None, self.own.rank: own}
        return self._post(self._verdict(own, (0,), hearts, hearts))

    def _verdict(self, own: Heartbeat, guilty: tuple[int, ...], before: Hearts, after: Hearts) -> Verdict:
        lines = [
            describe(self.members[rank], after[rank], silent=after[rank] is None or after[rank] == before[rank])
            for rank in guilty
        ]
        others = {beat.collective for rank, beat in after.items() if rank not in guilty and beat and beat.waits} - {""}
        key = ", train.hang_timeout" if own.phase == STEP and self._signal is None else ""
        why = f"no progress for {own.age:.0f} s in the phase {own.phase} (limit {own.limit:.0f} s{key})"
        why = f"{self._signal} came, and there was {why}" if self._signal is not None else why
        end = f"; others wait in {', '.join(sorted(others))}" if others else ""
        return Verdict(guilty, f"{why}: {'; '.join(lines)}{end}")

    def _post(self, verdict: Verdict) -> Verdict:
        return verdict if self._courier is None else self._courier.post(verdict, SECONDS_FOR_THE_STORE)

    # --------------------------------------------------------------------------------------------------------- signals

    def _take_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._signal = self._signal or name_of(number)
            if number == signal.SIGINT and (not self._interrupts or self._awake - self._interrupts[-1][0] > 1.0):
                self._interrupts.append((self._awake, PROGRESS.position()))

    def _ignores_a_second_ctrl_c(self) -> bool:
        """Whether Ctrl-C has come twice, and the main thread does not react."""
        if len(self._interrupts) < 2:
            return False
        came_at, position = self._interrupts[1]
        return self._awake - came_at > SECONDS_AFTER_A_SECOND_CTRL_C and PROGRESS.position() == position

    # ------------------------------------------------------------------------------------------------------------- end

    def _end(self, verdict: Verdict) -> None:
        """Write the stacks, say what has happened, end the guilty ranks of this host, and end. The main thread does
        nothing more: it might finish the run with a rank that was woken."""
        PROGRESS.is_over = True
        here = [m for m in self.members.values() if m.host == self.own.host]
        able = [m.rank for m in here if m.rank not in verdict.guilty] or [m.rank for m in here]
        with contextlib.suppress(OSError):
            write_stacks(self.folder, self.own.rank, f"{verdict.message}\n\n{describe(self.own, self._heartbeat())}")
        if self._courier is not None:
            self._courier.say_told()
        if self.own.rank == able[0]:
            say(
                f"failed: {verdict.message}. The stacks of all ranks are in {self.folder}; the same command resumes "
                "from the last checkpoint"
            )
            end_members([m for m in here if m.rank in verdict.guilty and m.rank != self.own.rank], self.folder)
        if self._courier is not None:
            others = [rank for rank in self.members if rank not in verdict.guilty]
            self._courier.wait_until_told(others, SECONDS_FOR_STACKS)
        rank_files.leave(FAILED)


@contextlib.contextmanager
def watching(folder: Path, timeout: HangTimeout = "auto") -> Iterator[Watchdog]:
    """Watch this process for the `with` block; its ranks from `attach` on."""
    watchdog = Watchdog(folder, timeout)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()


@contextlib.contextmanager
def watched(folder: Path, work: str) -> Iterator[None]:
    """Watch the ranks of a process group that is there while they do one kind of work (a phase). A collective call; a
    process alone is not watched."""
    if collectives.world_size() == 1:
        yield
        return
    with watching(folder) as watchdog, phase(work):
        watchdog.attach()
        yield
        watchdog.close(together=True)
