"""The clock of the benchmarks on a GPU, which is a stand-in here: what it counts, and what it leaves out."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine.step_clock import Watch
from benchmarks.harness import seconds_of


class Gpu:
    """A GPU that does its work in order, each piece as early as the host has given it. Times in milliseconds."""

    def __init__(self):
        self.host = self.done = 0.0

    def launch(self, takes: float, on_the_host: float = 0.1) -> None:
        self.host += on_the_host
        self.done = max(self.done, self.host) + takes

    def install(self, monkeypatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                pass

            def record(self):
                self.at = max(gpu.done, gpu.host)

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other):
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e6, 0.0))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(self, "host", max(self.host, self.done)))


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()
    gpu.install(monkeypatch)
    return gpu


def test_the_launch_of_kernels_is_not_counted_and_their_time_is(gpu):
    def job() -> None:
        for _ in range(3):
            gpu.launch(2.0, on_the_host=0.25)

    assert seconds_of(job, torch.device("cuda")) == pytest.approx(6.0e-3)


def test_steps_are_timed_in_a_row_and_the_last_one_until_all_work_is_done(gpu, monkeypatch):
    """Work that a step leaves for the time of the next one is not waited for in between."""

    class Engine:
        def forward(self):
            gpu.launch(3.0)

        def backward(self):
            gpu.launch(6.0)

        def step(self):
            gpu.launch(1.0)

    engine, waits = Engine(), []
    watch = Watch(engine, cuda=True)
    synchronize = torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (waits.append(gpu.host), synchronize()))
    for _ in range(3):
        watch.begin_step()
        for _ in range(2):
            engine.forward()
            engine.backward()
        engine.step()
    assert not waits
    expected = {"forward": 6.0e-3, "backward": 12.0e-3, "step": 1.0e-3, "whole step": 19.0e-3}
    first, second, third = watch.seconds()
    for name, seconds in expected.items():
        assert second[name] == third[name] == pytest.approx(seconds), name
    assert first["whole step"] == pytest.approx(19.0e-3, abs=0.2e-3)
