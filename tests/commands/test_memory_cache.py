"""`safecl memory cache` keeps outputs under what changes them, so that a run finds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safecl.distributed import environment
from safecl.exits import ExitCode


@pytest.fixture
def cache(run, task_config, materials):
    """`cache(max_length, max_tokens)`: what the store did for a run with these limits, and its folder of outputs."""
    memory = {"source": str(materials.folder / "data" / "memory.jsonl"), "max_rows": 6, "teacher": {"k": 4}}

    def call(max_length: int, max_tokens: int, **train: object) -> tuple[str, str]:
        config = task_config(
            train={"max_length": max_length, **train}, memory=memory | {"max_tokens": max_tokens}, methods={"der": {}}
        )
        code, out, err = run("memory", "cache", config)
        assert code == ExitCode.DONE, err
        told = " ".join(out.split()).partition("teacher-cache: ")[2].split()
        return told[0], Path(told[2].rstrip(",")).name

    return call


def test_outputs_are_reused_under_any_limit_that_cuts_no_row_and_made_anew_under_one_that_does(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment.join_launcher, "__defaults__", (os.environ,))  # the test's own environment
    built, folder = cache(256, 96)
    assert built == "built"
    assert cache(200, 96) == cache(256, 90) == cache(80, 96, tokens_per_batch=100) == ("reused", folder)
    built, cut = cache(256, 26)
    assert built == "built" and cut != folder
    assert cache(26, 96) == ("reused", cut)  # either limit cuts alike
    assert cache(256, 96) == ("reused", folder)
