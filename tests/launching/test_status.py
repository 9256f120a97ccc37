"""`safecl status` and the ranks that are named for being slow."""

from __future__ import annotations

import json

from safecl.launching import status
from safecl.launching.stragglers import compare
from safecl.storage.locks import FileLock
from safecl.training.folder import RunFolder


def run_folder(tmp_path, steps: int):
    (tmp_path / "run.json").write_text('{"config": {}}')
    status.write_ranks(tmp_path, ["a", "a", "b", "b"], {"one": 20, "two": 30})
    lines = [{"step": n, "task": "one", "tokens": 100, "tokens_per_second": 50.0} for n in range(steps)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000012").mkdir()  # not whole yet
    return tmp_path


def test_progress_step_time_checkpoint_and_ranks_are_read_from_the_folder(safecl, tmp_path):
    folder = run_folder(tmp_path, 15)
    lock = FileLock(folder / "run.lock")
    assert lock.take()
    code, out, _ = safecl("status", folder)
    lock.close()
    assert code == 0
    for part in ("running", "step 15 of 50, 30%, task one", "2 s (median of the last 15), about 70 s left"):
        assert part in out
    assert "step-00000010" in out and "4 on 2 nodes: a, b" in out
    _, out, _ = safecl("status", folder, "--json")
    found = json.loads(out)
    assert (found["state"], found["steps_done"], found["steps"], found["seconds_per_step"]) == ("ended", 15, 50, 2.0)


def test_a_run_that_was_stopped_or_is_finished_says_so(safecl, tmp_path):
    folder = run_folder(tmp_path, 3)
    RunFolder(folder).write_exit_code(75)
    assert "stopped by a signal; the same command resumes it" in safecl("status", folder)[1]
    (folder / "results.json").write_text("{}")
    RunFolder(folder).write_exit_code(3)
    assert "finished, exit code 3" in safecl("status", folder)[1]


def test_a_folder_without_a_run_is_refused(safecl, tmp_path):
    code, _, err = safecl("status", tmp_path)
    assert code == 2 and "holds no run (run.json is missing)" in err


def test_the_slowest_rank_and_the_stragglers_are_shown(safecl, tmp_path):
    folder = run_folder(tmp_path, 3)
    found = compare(["a", "a", "b", "b"], [[0.0, 1e-3], [0.0, 1e-3], [0.0, 1.5e-3], [0.3, 1e-3]], step=1.0)
    line = {"step": 50, "slowest": found.slowest, "stragglers": found.stragglers}
    (folder / status.SPEEDS).write_text(json.dumps(line) + "\n")
    out = safecl("status", folder)[1]
    assert "rank 2 on b, 50% behind the median of the ranks" in out and "rank 3 on b holds up the others" in out


def test_a_rank_is_a_straggler_from_20_percent_on():
    hosts = ["a", "b", "c"]
    assert compare(hosts, [[0.01, 1.0], [0.0, 1.19], [0.2, 1.0]], step=1.0).stragglers == []
    found = compare(hosts, [[0.0, 1.0], [0.0, 1.21], [0.25, 1.0]], step=1.0)
    assert "rank 1 on b computes 21% slower than the others" in found.stragglers[0]
    assert "rank 2 on c holds up the others: it waits 250 ms for its rows in a step of 1000 ms" in found.stragglers[1]


def test_real_ranks_name_the_one_whose_rows_come_late(rank_pool, tmp_path):
    from tests.launching import pace_scenes

    said = rank_pool(2).run(pace_scenes.late_rows_on_rank_1, folder=str(tmp_path))
    assert len(said[0]) == 1 and "rank 1 on b holds up the others" in said[0][0] and said[1] == []
    (line, again) = [json.loads(text) for text in (tmp_path / status.SPEEDS).read_text().splitlines()]
    assert line["step"] == 3 and line["waits"] == [0.0, 1.0] and again["stragglers"] == line["stragglers"]
