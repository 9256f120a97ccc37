"""`safecl env` prints what an issue report needs."""

from __future__ import annotations

import json

import safecl
from safecl.exits import ExitCode


def test_env_prints_the_same_sections_as_text_and_as_json(run):
    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == ExitCode.DONE and set(found) == {"versions", "device", "kernels", "launcher"}
    assert found["versions"]["safecl"].startswith(safecl.__version__) and found["versions"]["torch"] != "not installed"
    assert found["kernels"]["adamw_step_"].startswith(("triton", "cpp (", "torch (")) and found["device"]["cpu"]
    text = run("env")[1]
    assert all(name in text for section in found.values() for name in section)


def test_env_names_what_it_cannot_find_out(monkeypatch):
    from safecl.commands import env

    def broken():
        raise RuntimeError("driver mismatch\nmore")

    monkeypatch.setattr(env, "_device", broken)
    assert env.collect_environment()["device"] == {"not available": "RuntimeError: driver mismatch"}
