"""`safecl proof` measures: with the remedy the usual way gives the right value, and the command fails if safecl is
wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safecl.exits import ExitCode
from safecl.proof import gathered_ema, lost_tail, rounded_logits, run, torn_save, two_backwards
from safecl.proof.finding import Finding

ROOT = Path(__file__).parents[2]
FINDING = Finding("lost-tail", "a failure", "a number", "1", "0", "1", seen=True, holds=True)


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """Run the command: (its output, its proof.json, its folder)."""
    folder = tmp_path_factory.mktemp("proof")
    command = [sys.executable, "-m", "safecl", "proof", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "proof.json").read_text()), folder


@pytest.mark.long
def test_every_failure_is_seen_in_the_usual_way_and_safecl_is_right(proof):
    printed, results, _ = proof
    findings = {finding["name"]: finding for finding in results["findings"]}
    assert tuple(findings) == run.NAMES
    assert all(finding["seen"] and finding["holds"] for finding in findings.values()), findings
    assert (findings["gathered-ema"]["usual"], findings["gathered-ema"]["safecl"]) == ("0.000", "0.875")
    assert (findings["two-backwards"]["usual"], findings["two-backwards"]["safecl"]) == ("0.00, 0.00", "1.00, 1.00")
    assert 40 <= int(findings["rounded-logits"]["usual"].removesuffix(" %")) <= 90
    assert (findings["torn-save"]["usual"], findings["torn-save"]["safecl"]) == ("nothing whole", "step 2")
    assert "5 of 5 failures seen here" in printed and "safecl is right in all" in printed


@pytest.mark.long
def test_the_kill_has_left_a_file_that_is_cut_off_and_a_save_of_safecls_that_was_under_way(proof):
    *_, folder = proof
    in_place = folder / "saved-in-place" / torn_save.TAG
    assert torn_save.LIMIT_BYTES == min(path.stat().st_size for path in in_place.glob("*.pt"))
    assert [path.name for path in (folder / "saved-by-safecl").glob("step-*")] == ["step-00000002"]
    assert all(
        path.stat().st_size == torn_save.LIMIT_BYTES for path in (folder / "saved-by-safecl" / ".partial").glob("rank*")
    )


def test_a_gathered_average_that_names_its_writer_is_measured_as_right(rank_pool):
    assert rank_pool(2).run(gathered_ema.by_gathering, modifier_rank=0) == [0.875, 0.875]


@pytest.mark.parametrize("stage", two_backwards.STAGES)
def test_two_backwards_with_the_boundary_set_are_measured_as_whole(rank_pool, stage):
    for gradient in rank_pool(2).run(two_backwards.by_two_backwards, stage=stage, boundaries=True):
        assert two_backwards.shares(gradient) == pytest.approx((1, 1), abs=1e-3)


def test_the_shares_of_two_gradients_are_told_apart():
    task, replay = two_backwards.true_gradients()
    assert two_backwards.shares(0.25 * task - 2.0 * replay) == pytest.approx((0.25, -2.0), abs=1e-6)


def test_fp32_logits_are_measured_as_right():
    case = rounded_logits.student_near_teacher()
    right = rounded_logits.exact(*case)
    assert (
        rounded_logits.error(rounded_logits.by_rounded_logits(*case, logits=torch.float32), right)
        < rounded_logits.BOUND
    )


def test_stored_tokens_with_their_tail_stay_at_the_teacher():
    hidden, head = lost_tail.teacher_states()
    assert lost_tail.drift(lost_tail.by_stored_tokens(hidden, head, with_tail=True), hidden, head) < 1e-6


def test_a_save_in_place_that_is_not_killed_can_be_loaded(rank_pool, tmp_path):
    pool = rank_pool(2)
    pool.run(torn_save.save_usual, folder=tmp_path / "last", die=False)
    found = pool.run(torn_save.load_usual, folder=tmp_path / "last")
    assert [(rank["step"], rank["error"]) for rank in found] == [(3, None)] * 2


@pytest.mark.parametrize(
    "found",
    [
        {"step": None, "equal": False, "error": "no checkpoint"},
        {"step": 3, "equal": False, "error": None},
        {"step": 2, "equal": False, "error": None},
    ],
)
def test_another_state_than_the_saved_one_counts_as_lost(found):
    kept = {"step": 2, "equal": True, "error": None}
    assert torn_save.finding(found, kept).seen and torn_save.finding(found, kept).holds
    assert not torn_save.finding(kept, found).seen and not torn_save.finding(kept, found).holds


@pytest.mark.parametrize(("change", "code", "said"), [
    ({"holds": False}, ExitCode.FAILED, "safecl is WRONG in: lost-tail"),
    ({"seen": False}, ExitCode.DONE, "0 of 1 failures seen here.*Not seen: lost-tail"),
])  # fmt: skip
def test_the_command_fails_where_safecl_is_wrong_and_says_what_was_not_seen(
    tmp_path, monkeypatch, capsys, change, code, said
):
    monkeypatch.setattr(run, "_run_sets", lambda folder, console: replace(FINDING, **change).write(folder) or 0)
    assert run.run_proof(tmp_path) == code
    assert re.search(said, capsys.readouterr().out, re.S)


def test_a_folder_with_other_files_keeps_them(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.setattr(run, "_run_sets", lambda folder, console: 1)
    run.run_proof(tmp_path)
    assert (tmp_path / "mine.json").exists()
