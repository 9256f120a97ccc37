"""What a run does when a measurement fails the gate: stop, go back to the last state that passed, train on the memory.

The verdicts are scripted, so that a run of a few steps fails where the test says; weights, rows and files are real.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safecl.config import load_config
from tests.training.test_trainer import materials, tree  # noqa: F401  # a fixture

STEPS = 6


def fit_with(tree: dict, cache: str, verdicts: dict[str, list[str]], stop_after: int | None = None) -> dict:
    """Train; the k-th measurement named `when` gets the k-th verdict in verdicts[when], else "passed". Returns results,
    the learning rate of each step, and a digest of the weights before each step."""
    import os

    import torch

    from safecl.config import RunConfig
    from safecl.evaluation.results.checks import GateResult
    from safecl.training.guard.measuring import Measurements
    from safecl.training.run import Run
    from safecl.training.trainer import Trainer

    os.environ["SAFECL_CACHE"] = cache
    given, step, judge = {when: list(left) for when, left in verdicts.items()}, Run.train_step, Measurements.judge
    seen: list = []

    def judged(self, found):
        left = given.get(found.when)
        real = judge(self, found)
        if real is None or found.gate is not None:
            return found.gate
        return GateResult(left.pop(0) if left else "passed", real.checks)

    def watched(self, task):
        flats = torch.cat([flat.detach().float().flatten() for flat in self.engine.shards.flats])
        losses = step(self, task)
        if stop_after is not None and self.global_step == stop_after:
            raise KeyboardInterrupt
        seen.append((self.global_step - 1, self.last_learning_rate, float(flats.double().norm())))
        return losses

    Measurements.judge, Run.train_step = judged, watched
    try:
        results = Trainer(RunConfig.model_validate(tree)).fit().results
    except KeyboardInterrupt:
        results = {}
    finally:
        Measurements.judge, Run.train_step = judge, step
    return {"results": results, "steps": seen}


def config(materials: Path, output: Path, on_fail: str, **safety) -> dict:  # noqa: F811
    changes = {"every": 2, "gate": {"max_asr": 0.44}, "on_fail": on_fail, **safety}
    return tree(materials, output, safety=changes, deepspeed={"stage": 1}, checkpoint={"every": 2})


@pytest.fixture
def run(rank_pool, materials, tmp_path):  # noqa: F811
    def run(on_fail: str, verdicts: dict[str, list[str]], ranks: int = 1, output: str = "run", **safety) -> tuple:
        stop_after, tasks = safety.pop("stop_after", None), safety.pop("tasks", None)
        given = config(materials, tmp_path / output, on_fail, **safety)
        given |= {"tasks": tasks} if tasks else {}
        found = rank_pool(ranks).run(
            fit_with, tree=given, cache=str(materials / "cache"), verdicts=verdicts, stop_after=stop_after
        )
        return tmp_path / output, found[0]["results"], found[0]["steps"]

    return run


def whens(results: dict) -> list[str]:
    return [each["when"] for each in results["evaluations"]]


def test_stop_ends_the_run_at_the_measurement_that_failed(run):
    folder, results, steps = run("stop", {"sentiment step 4": ["failed"]})
    assert [step for step, *_ in steps] == [0, 1, 2, 3] and results["steps"] == 4
    assert whens(results)[-1] == "sentiment step 4" and (folder / "model-failed").is_dir()
    (event,) = results["events"]
    assert event["action"] == "stop" and event["step"] == 4 and event["when"] == "sentiment step 4"
    assert not (folder / "model").exists()


@pytest.mark.long
def test_report_goes_on_and_an_undecided_moment_is_no_failure(run):
    _, results, steps = run("report", {"sentiment step 2": ["failed"]})
    assert len(steps) == STEPS and "events" not in results
    _, results, steps = run("stop", {"sentiment step 2": ["undecided"]}, output="other")
    assert len(steps) == STEPS and "events" not in results


def test_rollback_goes_back_to_the_last_state_that_passed_with_a_lower_learning_rate(run):
    folder, results, steps = run("rollback", {"sentiment step 4": ["failed", "passed"]}, ranks=2)
    assert [step for step, *_ in steps] == [0, 1, 2, 3, 2, 3, 4, 5]
    first, again = steps[2], steps[4]
    assert again[2] == first[2], "the weights are those of the state that passed"
    assert again[1] == pytest.approx(first[1] / 2) and steps[5][2] != steps[3][2]
    assert whens(results) == [
        "start",
        "sentiment step 2",
        "rolled back 1: sentiment step 4",
        "sentiment step 4",
        "after sentiment",
    ]
    (event,) = results["events"]
    assert event["action"] == "rollback" and event["step"] == 4 and event["back_to"] == 2
    assert event["learning_rate_factor"] == 0.5 and results["summary"]["beyond_gate"]["moments"] == 1
    assert (folder / "model").is_dir() and not (folder / "passed").exists()
    names = {path.name for path in (folder / "outputs").glob("000004-*-safety.jsonl")}
    assert names == {"000004-rolled-back-1-sentiment-step-4-safety.jsonl", "000004-sentiment-step-4-safety.jsonl"}
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2, 3, 2, 3, 4, 5]


@pytest.mark.long
def test_rollback_to_the_start_begins_the_task_again(run):
    _, results, steps = run("rollback", {"sentiment step 2": ["failed"]})
    assert [step for step, *_ in steps] == [0, 1, 0, 1, 2, 3, 4, 5] and steps[0][2] == steps[2][2]
    assert results["events"][0]["back_to"] == 0 and results["kept_bytes"]["memory"]["rows"] == 24


def test_after_the_last_rollback_the_run_ends_with_the_last_state_that_passed(run):
    verdicts = {"sentiment step 4": ["failed", "failed"]}
    folder, results, steps = run("rollback", verdicts, recovery={"max_times": 1, "learning_rate_factor": 0.25})
    assert [step for step, *_ in steps] == [0, 1, 2, 3, 2, 3] and results["steps"] == 2
    assert [event["action"] for event in results["events"]] == ["rollback", "stop"]
    assert whens(results)[-1] == "end, step 2" and (folder / "model").is_dir()
    assert steps[4][1] == pytest.approx(steps[2][1] / 4)


@pytest.mark.long
def test_with_nothing_trained_that_passed_the_failed_model_stays(run):
    verdicts = {"sentiment step 2": ["failed", "failed"]}
    folder, results, _ = run("rollback", verdicts, recovery={"max_times": 1})
    assert results["steps"] == 2 and (folder / "model-failed").is_dir() and not (folder / "model").exists()
    verdicts = {"start": ["undecided"], "sentiment step 2": ["failed"]}
    folder, results, _ = run("rollback", verdicts, output="never-passed")
    assert [event["action"] for event in results["events"]] == ["stop"] and (folder / "model-failed").is_dir()


def test_a_run_that_is_killed_goes_back_to_the_state_on_the_disk(run):
    """The copy in host memory is gone with the process."""
    verdicts = {"sentiment step 4": ["failed", "passed"]}
    _, whole, steps = run("rollback", verdicts, output="whole")
    folder, nothing, _ = run("rollback", verdicts, stop_after=4, output="cut")
    assert nothing == {} and (folder / "passed" / "step-00000002").is_dir()
    _, resumed, after = run("rollback", verdicts, output="cut")
    assert after[-4:] == steps[-4:] and whens(resumed) == whens(whole)
    assert resumed["events"] == whole["events"]


@pytest.mark.long
def test_a_run_that_is_killed_after_a_rollback_resumes_on_the_new_course(run):
    verdicts = {"sentiment step 4": ["failed", "passed"]}
    folder, _, first = run("rollback", verdicts, stop_after=5, output="cut")
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert names[-1].startswith("step-00000004")
    _, resumed, after = run("rollback", {}, output="cut")
    assert [step for step, *_ in after] == [4, 5] and len(resumed["events"]) == 1
    assert load_config(folder / "config.yaml").safety.on_fail == "rollback" and first


@pytest.mark.long
def test_rollback_across_a_task_begins_the_later_task_again(run, materials):  # noqa: F811
    """Anchors, Fisher, averages and the memory are those of the end of the first task."""
    task = tree(materials, Path("unused"))["tasks"][0]
    tasks = [task | {"name": name} for name in ("one", "two")]
    _, results, steps = run("rollback", {"two step 2": ["failed", "passed"]}, tasks=tasks)
    assert [step for step, *_ in steps] == [*range(8), *range(6, 12)] and steps[8][2] == steps[6][2]
    assert results["events"][0]["back_to"] == 6 and results["summary"]["tasks"] == ["one", "two"]


def test_corrective_replay_trains_on_the_memory_until_the_probe_recovers(run):
    """A random model leans to neither answer, so that the refusals of the memory move the probe."""
    probe = {"prompts": 5, "refusal": "I cannot help with that.", "compliance": "Sure"}
    verdicts = {"sentiment step 2": ["failed"], "after sentiment": ["failed"]}
    recovery = {"max_steps": 4, "check_every": 2, "learning_rate": 1e-2}
    folder, results, steps = run("corrective_replay", verdicts, probe=probe, recovery=recovery)
    assert [step for step, *_ in steps] == list(range(STEPS)), "the burst is no step of the task"
    first, second = results["events"]
    assert first["action"] == second["action"] == "corrective_replay" and first["step"] == 2
    assert first["steps"] in (2, 4) and isinstance(first["recovered"], bool)
    assert whens(results) == [
        "start",
        "sentiment step 2",
        "corrected sentiment step 2",
        "sentiment step 4",
        "after sentiment",
        "corrected sentiment",
    ]
    failed, corrected = results["evaluations"][1:3]
    assert corrected["probe"]["margin"] > failed["probe"]["margin"]
    assert (folder / "model").is_dir() and results["summary"]["tasks"] == ["sentiment"]


@pytest.mark.long
def test_after_the_last_burst_the_run_goes_on_and_the_gate_decides_at_its_end(run):
    verdicts = {"sentiment step 2": ["failed"], "sentiment step 4": ["failed"], "after sentiment": ["failed"]}
    recovery = {"max_times": 1, "max_steps": 1, "check_every": 1}
    folder, results, steps = run("corrective_replay", verdicts, recovery=recovery)
    assert len(results["events"]) == 1 and len(steps) == STEPS and (folder / "model-failed").is_dir()
