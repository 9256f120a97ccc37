"""A signal that stops a run of a benchmark ends the benchmark, and a run that fails does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import harness
from benchmarks.real_model import run as real_model
from benchmarks.retention import materials
from benchmarks.retention import run as retention
from benchmarks.safety import controller

STOPPED, FAILED, FINISHED = "stopped", "failed", "finished although it was asked to stop"


@pytest.fixture
def ends(monkeypatch, tmp_path) -> list[str]:
    """How runs end, which take no time: the first by the first of these words."""
    from safecl import config
    from safecl.training import trainer

    how: list[str] = []

    class Trainer:
        def __init__(self, path):
            self.how = how.pop(0)
            self.was_asked_to_stop = self.how != FAILED

        def fit(self):
            if self.how == FAILED:
                raise RuntimeError("out of luck")
            (tmp_path / "arm").mkdir(exist_ok=True)
            return SimpleNamespace(stopped=self.how == STOPPED)

    monkeypatch.setattr(trainer, "Trainer", Trainer)
    monkeypatch.setattr(config, "load_config", lambda path: path)
    return how


ARM = SimpleNamespace(name="arm", config=lambda folder: {}, task=None, seed=0)


@pytest.mark.parametrize("how", [STOPPED, FINISHED])
def test_a_signal_ends_a_benchmark_with_75_and_no_other_arm_begins(ends, tmp_path, monkeypatch, how):
    monkeypatch.setattr(materials, "make", lambda *_: None)
    ends += [how, how]
    for train_arm in (retention._train_or_report, real_model.train_and_measure):
        with pytest.raises(SystemExit) as ended:
            train_arm(tmp_path, ARM)
        assert ended.value.code == 75
    noted = json.loads((tmp_path / "arm" / "cpu-seconds.json").read_text())
    assert noted["cpu_seconds"] >= 0 and noted["peak_bytes"] > 10**7


def test_the_controllers_benchmark_ends_too(ends, tmp_path):
    ends.append(STOPPED)
    with pytest.raises(SystemExit) as ended:
        controller.train("arm", controller.steered(Path("m"), 0.1, 0), tmp_path)
    assert ended.value.code == 75


def test_an_arm_that_fails_is_printed_and_the_others_go_on(ends, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(materials, "make", lambda *_: None)
    ends += [FAILED, FAILED]
    for train_arm in (retention._train_or_report, real_model.train_and_measure):
        train_arm(tmp_path, ARM)
    assert capsys.readouterr().out.count("arm: RuntimeError: out of luck") == 2


def test_the_peak_counts_from_its_reset():
    harness.reset_peak_memory()
    large = bytearray(200_000_000)
    large[::4096] = b"x" * len(large[::4096])
    before = harness.peak_memory()
    del large
    harness.reset_peak_memory()
    assert harness.peak_memory() < before - 150_000_000
