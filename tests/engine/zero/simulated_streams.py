"""CUDA streams and events without a GPU. Work waits in the queue of its stream and is done in an order that a seed
chooses among all that the waits allow, so a missing wait gives other numbers for some seed."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator

import torch


class Mark:
    """A place in a stream; `reached` once all work before it is done."""

    reached = False

    def reach(self) -> None:
        self.reached = True


class Stream:
    def __init__(self, machine: Machine):
        self.machine, self.queue = machine, deque[Callable[[], object] | Mark]()
        machine.streams.append(self)

    def mark(self) -> Mark:
        mark = Mark()
        self.queue.append(mark.reach)
        return mark

    def wait_stream(self, other: Stream) -> None:
        self.queue.append(other.mark())

    def wait_event(self, event: Event) -> None:
        if event.mark is not None:
            self.queue.append(event.mark)

    @property
    def is_free(self) -> bool:
        """True where the stream has work, and waits for no other one."""
        return bool(self.queue) and (not isinstance(self.queue[0], Mark) or self.queue[0].reached)

    def synchronize(self) -> None:
        self.machine.work_until(lambda: not self.queue)


class Event:
    mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        self.mark = stream.mark()


class Machine:
    """All streams of a device, and the one that work goes to."""

    def __init__(self, seed: int):
        self.random, self.streams = random.Random(seed), list[Stream]()
        self.current = Stream(self)

    def install(self, monkeypatch) -> None:
        """Take the place of CUDA in torch."""
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.entered)

    @contextlib.contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def later(self, function: Callable[..., object], result: object = None) -> Callable[..., object]:
        """Return a function that gives this one to the current stream and returns `result` at once."""

        def given(*arguments: object, **named: object) -> object:
            self.current.queue.append(lambda: function(*arguments, **named))
            return result

        return given

    def work_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            if self.random.random() < 0.1:  # seldom, so that one stream runs far ahead of the others
                self.random.shuffle(self.streams)
            queue = next((stream.queue for stream in self.streams if stream.is_free), None)
            assert queue is not None, "every stream waits for another one"
            entry = queue.popleft()
            if not isinstance(entry, Mark):
                entry()

    def finish(self) -> None:
        self.work_until(lambda: not any(stream.queue for stream in self.streams))
