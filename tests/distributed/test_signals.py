"""Handlers of signals: the first asks, a later one insists, and the handlers of before come back."""

from __future__ import annotations

import os
import pty
import signal

import pytest

from safecl.distributed import signals
from safecl.distributed.signals import SIGNALS, StopRequest, StopSignals, name_of, set_handler


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """The process's own handlers, which are back after each test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    found = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == before


def test_a_signal_only_asks_and_a_second_ctrl_c_after_a_second_ends_at_once(monkeypatch, capfd):
    with StopRequest() as stop:
        assert not stop.requested
        send(signal.SIGINT)
        send(signal.SIGINT)  # passed on by a launcher
        assert stop.name == "Ctrl-C"
        monkeypatch.setattr(signals, "SECONDS_BEFORE_A_SECOND_COUNTS", 0.0)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert capfd.readouterr().err == "\nsafecl: Ctrl-C: finishing this step and saving; Ctrl-C again stops at once\n"


def test_a_rank_that_does_not_announce_is_silent(capfd):
    with StopRequest(announce=False) as stop:
        send(signal.SIGUSR1)
    assert stop.name == "SIGUSR1" and capfd.readouterr().err == ""


def test_an_inner_handler_gives_back_to_the_outer_one():
    came = []
    with StopSignals(lambda number: came.append(name_of(number)), came.append):
        with StopRequest(announce=False) as stop:
            send(signal.SIGTERM)
        assert stop.requested and came == []
        send(signal.SIGTERM)
    assert came == ["SIGTERM"]


def test_a_handler_that_was_set_meanwhile_stays(handlers):
    with StopSignals(lambda number: None, lambda number: None):
        set_handler(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]
    set_handler(signal.SIGTERM, handlers[signal.SIGTERM])


def test_a_closed_terminal_asks_like_sigterm_and_is_written_to_no_more(handlers):
    """SIGHUP comes when the terminal is gone; a write to it would be an error in the middle of the last save."""
    set_handler(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    here, there = pty.openpty()
    kept = os.dup(2)
    os.dup2(there, 2)
    try:
        with StopRequest() as stop:
            os.close(here)
            send(signal.SIGHUP)
            os.write(2, b"saving")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(there)
        set_handler(signal.SIGHUP, handlers[signal.SIGHUP])
    assert stop.name == "SIGHUP"


def test_nohup_is_obeyed(handlers):
    set_handler(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(announce=False) as stop:
        send(signal.SIGHUP)
    assert not stop.requested
    set_handler(signal.SIGHUP, handlers[signal.SIGHUP])
